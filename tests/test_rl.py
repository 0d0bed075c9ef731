"""RL: the loss is -log p x advantage over the sampled tokens alone, rollouts depend on (seed, step, problem), pass@k is
unbiased, and a model learns from rewards but not from permuted ones.
"""

import copy
import dataclasses
import itertools
import json
import math
import os

import pytest
import tiny_pipeline as tiny
import torch

from nanochat.common import Runtime, UserError
from nanochat.engine import Completion, Engine, SamplingParams
from nanochat.gpt import GPT, GPTConfig
from nanochat.load import pick_kernels
from nanochat.metrics import metrics_path
from nanochat.optim import MuonAdamW
from nanochat.report import Report
from nanochat.rl import (
    PASS_AT,
    FittingProblems,
    Rollout,
    RolloutBatches,
    RolloutSettings,
    collate,
    derive_seed,
    evaluate_pass_at_k,
    logprob_gap,
    pass_at,
    to_rollout,
)
from nanochat.tasks import Task, exchange
from nanochat.tokenizer import Tokenizer
from nanochat.train import Schedule, Trainer

CPU = Runtime(torch.device("cpu"))
CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["seven plus eight is fifteen 7 8 15 what is the answer"] * 3, 280)


def make_model(tokenizer, *, spread: float = 0.0) -> GPT:
    """Return a tiny model; with `spread` the head is random, so that the distribution over tokens is not uniform."""
    torch.set_num_threads(1)
    config = GPTConfig(CONTEXT, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    model = GPT.build(config, pick_kernels("eager", CPU.device, torch.float32, config), torch.float32, CPU.device, 3)
    if spread:
        torch.nn.init.normal_(model.lm_head.weight, std=spread, generator=torch.Generator().manual_seed(1))
    return model


class Questions(Task):
    """Numbered questions; the reward is what `rewarder` says of (question number, completion)."""

    name = "questions"

    def __init__(self, size: int, rewarder=lambda number, answer: 0.0):
        self.size, self.rewarder = size, rewarder

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return exchange(f"question {index}", "fine") | {"number": index}

    def reward(self, conversation, answer):
        return float(self.rewarder(conversation["number"], answer))


class ScriptedEngine:
    """Answers prompts by a function of (prompt, params, sample) and remembers what it was asked."""

    def __init__(self, tokenizer, model, answer):
        self.tokenizer, self.model, self.source, self.answer = tokenizer, model, model, answer
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.syncs = 0

    def sync_weights(self):
        self.syncs += 1

    def reset(self):
        """Holds nothing."""

    def generate(self, prompts, params):
        self.asked += zip(prompts, params, strict=True)
        return [[self.answer(prompt, p, i) for i in range(p.n)] for prompt, p in zip(prompts, params, strict=True)]


def said(ids, mask=None, reason="stop", text="") -> Completion:
    """An answer that, where it stopped, did so by token 99."""
    return Completion(list(ids), list(mask or [1] * len(ids)), [0.0] * len(ids), reason, text, [],
                      stopped_by=99 if reason == "stop" else None)


def settings(**changes) -> RolloutSettings:
    return RolloutSettings(**{"examples_per_step": 4, "num_samples": 3, "max_tokens": 8, "seed": 5, **changes})


def error_of(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


# --- rows -----------------------------------------------------------------------------------------


def test_prompt_and_forced_tokens_carry_no_loss_and_the_stop_token_does():
    row = to_rollout([1, 2, 3], said([10, 11, 12, 13], mask=[1, 0, 0, 1]), 0.5)
    assert row == Rollout([1, 2, 3, 10, 11, 12, 13, 99], [False] * 3 + [True, False, False, True, True], 0.5)
    cut = to_rollout([1, 2, 3], said([10], reason="length"), -0.5)
    assert cut == Rollout([1, 2, 3, 10], [False] * 3 + [True], -0.5)
    x, y, weight = collate([cut, row], context=64, pad_id=7)
    assert x.shape == y.shape == weight.shape == (2, 16)
    assert x[0].tolist() == [1, 2, 3] + [7] * 13 and x[1].tolist() == [1, 2, 3, 10, 11, 12, 13] + [7] * 9
    assert y[0].tolist() == [-1, -1, 10] + [-1] * 13
    assert y[1].tolist() == [-1, -1, 10, -1, -1, 13, 99] + [-1] * 9
    assert weight[0, :3].tolist() == [-0.5] * 3 and weight[1, :7].tolist() == [0.5] * 7
    assert weight.dtype == torch.float32 and x.dtype == y.dtype == torch.int64


def test_the_token_that_stopped_an_answer_is_learnt_and_no_other(tokenizer):
    by_bos = dataclasses.replace(said([10]), stopped_by=tokenizer.bos_id)
    assert to_rollout([1], by_bos, 1.0) == Rollout([1, 10, tokenizer.bos_id], [False, True, True], 1.0)
    by_string = dataclasses.replace(said([10]), stopped_by="a stop string")
    assert to_rollout([1], by_string, 1.0).ids == [1, 10]


def test_a_row_that_fills_the_context_is_not_padded_beyond_it():
    row = to_rollout(list(range(50)), said(range(14), reason="stop"), 1.0)
    x, y, _ = collate([row], context=64, pad_id=7)
    assert x.shape == (1, 64) and y[0, -1] == 99
    assert collate([row], context=100, pad_id=7)[0].shape == (1, 64)


def test_advantages_are_rewards_minus_the_mean_over_the_prompt(tokenizer):
    """Problems answered all alike are left out; what stays, 12 of 24 sampled tokens, is scaled to count as before."""
    rewards = {0: (1, 0, 0), 1: (1, 1, 1), 2: (0, 0, 0), 3: (1, 0, 1)}
    engine = ScriptedEngine(tokenizer, make_model(tokenizer), lambda prompt, p, i: said([65 + i]))
    task = Questions(4, lambda number, answer: rewards[number][answer.ids[0] - 65])
    batches = RolloutBatches(task, engine, settings(), 4, CPU)
    micro_batches = batches.micro_batches()
    assert [len(x) for x, _, _ in micro_batches] == [4, 2]
    got = {}
    for x, y, weight in micro_batches:
        for i in range(len(x)):
            (first,) = (y[i] >= 0).nonzero()[:1, 0].tolist()
            prompt = tokenizer.decode(x[i, : first + 1]).removeprefix("<|bos|><|user_start|>question ")
            got[int(prompt[0]), int(y[i, first]) - 65] = float(weight[i, first])
    third = 1 / 3
    want = {(0, 0): 2 * third, (0, 1): -third, (0, 2): -third, (3, 0): third, (3, 1): -2 * third, (3, 2): third}
    assert got == pytest.approx({key: advantage * 12 / 24 for key, advantage in want.items()})
    metrics = batches.metrics()
    assert metrics["reward"] == pytest.approx(6 / 12) and metrics["mixed"] == 0.5 and metrics["stopped"] == 1.0
    assert metrics["answer_tokens"] == 1.0


def test_a_step_whose_answers_are_all_alike_changes_nothing(tokenizer):
    engine = ScriptedEngine(tokenizer, make_model(tokenizer), lambda prompt, p, i: said([65 + i]))
    ((x, _, weight),) = RolloutBatches(Questions(4), engine, settings(), 8, CPU).micro_batches()
    assert len(x) == 1 and not weight.any()


def test_permuted_advantages_are_the_same_numbers_on_other_answers(tokenizer):
    def weights(permute: bool) -> list[float]:
        engine = ScriptedEngine(tokenizer, make_model(tokenizer), lambda prompt, p, i: said([65 + i]))
        task = Questions(8, lambda number, answer: (number + answer.ids[0]) % 3 == 0)
        batches = RolloutBatches(task, engine, settings(examples_per_step=8, permute_advantages=permute), 24, CPU)
        ((_, _, weight),) = batches.micro_batches()
        return weight[:, 0].tolist()

    assert sorted(weights(True)) == sorted(weights(False))
    assert weights(True) != weights(False)
    assert weights(True) == weights(True)


# --- the gradient ---------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_formula(tokenizer, tmp_path):
    """Token by token on unpadded rows: -sum(advantage x log p of each sampled token) / number of sampled tokens."""
    model = make_model(tokenizer, spread=0.3)
    answers = {0: said([70, 71, 72], mask=[1, 0, 1]), 1: said([80], reason="length"), 2: said([90, 91, 92, 93])}
    engine = ScriptedEngine(tokenizer, model, lambda prompt, p, i: answers[i])
    task = Questions(3, lambda number, answer: (answer.ids[0] - 70) * number)  # number 0: advantage 0 throughout
    rows, rewards = [], []
    for number in range(3):
        prompt = tokenizer.render_for_completion(task[number])
        for answer in answers.values():
            end = [99] if answer.finish_reason == "stop" else []
            rows.append((prompt, [*answer.ids, *end], [*answer.mask, *[1] * len(end)]))
            rewards.append(task.reward(task[number], answer))
    n_sampled = sum(sum(mask) for _, _, mask in rows)
    loss = torch.zeros(())
    for index, (prompt, ids, mask) in enumerate(rows):
        mean = sum(rewards[index // 3 * 3 : index // 3 * 3 + 3]) / 3
        log_probs = model(torch.tensor([[*prompt, *ids[:-1]]])).log_softmax(-1)[0, len(prompt) - 1 :]
        for position, (token, m) in enumerate(zip(ids, mask, strict=True)):
            loss = loss - m * (rewards[index] - mean) * log_probs[position, token] / n_sampled
    want = dict(zip((name for name, _ in model.named_parameters()),
                    torch.autograd.grad(loss, list(model.parameters())), strict=True))

    optimizer = MuonAdamW(model, model.kernels)
    trainer = Trainer("rl", tmp_path, model, optimizer, CPU, Schedule(1), identity={}, args={}, fingerprint="f" * 64)
    batches = RolloutBatches(task, engine, settings(examples_per_step=3), 4, CPU)
    seen = {}
    optimizer.step = lambda *args: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
    trainer.run(batches)
    assert trainer.last_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in want.items():
        torch.testing.assert_close(seen[name], grad, rtol=1e-4, atol=1e-6)
    assert any(grad.abs().max() > 1e-3 for grad in want.values())


@pytest.mark.parametrize("top_k", [0, 20])
def test_training_sees_the_tokens_that_the_engine_drew_at_their_places(tokenizer, top_k):
    """The engine's log-probability of every sampled token is the training forward's at that token's place in y."""
    model = make_model(tokenizer, spread=0.5)
    engine = Engine(model, tokenizer, max_batch=8)
    heard = []
    generate = engine.generate
    engine.generate = lambda *args: heard.append(generate(*args)) or heard[-1]
    task = Questions(4, lambda number, answer: sum(answer.ids))
    batches = RolloutBatches(task, engine, settings(max_tokens=30, top_k=top_k), 12, CPU)
    ((x, y, _),) = batches.micro_batches()
    answers = sorted(((tokenizer.render_for_completion(Questions(4)[number]), answer)
                      for number, samples in enumerate(heard[0]) for answer in samples),
                     key=lambda pair: len(pair[0]) + len(pair[1].ids) + (pair[1].finish_reason == "stop"))
    with torch.no_grad():
        logits = model(x)
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
        log_probs = logits.log_softmax(-1)
    compared = 0
    for row, (_, answer) in enumerate(answers):
        places = (y[row] >= 0).nonzero()[:, 0]
        drawn = [p for p, m in zip(answer.logprobs, answer.mask, strict=True) if m]
        assert len(places) == len(drawn) + (answer.finish_reason == "stop")
        got = log_probs[row, places, y[row, places]][: len(drawn)]
        torch.testing.assert_close(got, torch.tensor(drawn), rtol=1e-3, atol=1e-4)
        compared += len(drawn)
    assert compared > 100


@pytest.mark.parametrize("top_k", [0, 20])
def test_engine_and_training_agree_on_the_distribution_that_was_drawn_from(tokenizer, top_k):
    model = make_model(tokenizer, spread=0.5)
    engine = Engine(model, tokenizer, max_batch=8)
    batches = RolloutBatches(Questions(4), engine, settings(max_tokens=30, top_k=top_k, temperature=0.7), 12, CPU)
    batches.micro_batches()
    metrics = batches.metrics()
    assert 0 <= metrics["logprob_gap"] <= metrics["logprob_gap_max"] < 1e-4
    engine.source, engine.sync_weights = copy.deepcopy(model), lambda: None  # an engine that stays behind shows
    with torch.no_grad():
        engine.source.lm_head.weight.mul_(1.1)
    batches.micro_batches()
    assert batches.metrics()["logprob_gap_max"] > 0.01


def test_the_gap_is_per_sampled_token(tokenizer):
    model = make_model(tokenizer, spread=0.5)
    prompt, ids = [1, 2, 3], [70, 71, 72]
    with torch.no_grad():
        log_probs = (model(torch.tensor([[*prompt, *ids]]))[0] / 2).log_softmax(-1)[[2, 3, 4], ids].tolist()
    answer = Completion(ids, [1, 0, 1], [log_probs[0] + 0.25, 0.0, log_probs[2] - 0.5], "stop", "", [])
    gap = logprob_gap(model, prompt, answer, settings(temperature=2.0))
    torch.testing.assert_close(gap, torch.tensor([0.25, 0.5]), rtol=1e-4, atol=1e-5)


# --- position, seeds, ranks -----------------------------------------------------------------------


def asked(tokenizer, n_steps: int, *, state=None, runtime=CPU, **changes):
    """Return what each step asks the engine, by prompt, and the state after the last."""
    engine = ScriptedEngine(tokenizer, make_model(tokenizer), lambda prompt, p, i: said([65]))
    batches = RolloutBatches(Questions(6), engine, settings(**changes), 4, runtime, state)
    steps = []
    for _ in range(n_steps):
        before = len(engine.asked)
        batches.micro_batches()
        steps.append([(tokenizer.decode(prompt), params.seed) for prompt, params in engine.asked[before:]])
    assert engine.syncs == n_steps  # the engine takes over the new weights before every rollout
    return steps, batches.state_dict()


def test_rollouts_depend_on_run_seed_step_and_problem(tokenizer):
    steps, state = asked(tokenizer, 4)
    flat = [pair for step in steps for pair in step]
    assert state == {"next_problem": 16}
    assert [prompt.split("question ")[1][0] for prompt, _ in flat] == list("0123450123450123")
    assert len({seed for _, seed in flat}) == len(flat), "a problem that comes again is answered anew"
    assert asked(tokenizer, 4)[0] == steps
    assert all(a[1] != b[1] for a, b in zip(flat, sum(asked(tokenizer, 4, seed=6)[0], []), strict=True))


def test_a_resumed_position_asks_what_the_uninterrupted_run_asks(tokenizer):
    steps, end = asked(tokenizer, 5)
    first, state = asked(tokenizer, 2)
    rest, after = asked(tokenizer, 3, state=json.loads(json.dumps(state)))
    assert first + rest == steps and after == end


def test_ranks_share_the_problems_of_a_step_and_ask_them_alike(tokenizer, monkeypatch):
    monkeypatch.setattr(Runtime, "all_reduce", lambda self, tensor, op="sum": tensor)  # no process group here
    alone, state = asked(tokenizer, 3)
    shares = [asked(tokenizer, 3, runtime=Runtime(CPU.device, rank, 2)) for rank in range(2)]
    assert all(share[1] == state for share in shares)
    for step in range(3):
        assert alone[step] == [pair for pairs in zip(*(share[0][step] for share in shares), strict=True)
                               for pair in pairs]


# --- pass@k ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", range(9))
def test_pass_at_k_is_the_chance_over_all_subsets(right):
    samples = [True] * right + [False] * (8 - right)
    for k in range(1, 9):
        hits = [any(chosen) for chosen in itertools.combinations(samples, k)]
        assert pass_at(k, 8, right) == pytest.approx(sum(hits) / len(hits))


def test_pass_at_k_of_a_task(tokenizer):
    rights = (0, 8, 2)
    engine = ScriptedEngine(tokenizer, make_model(tokenizer), lambda prompt, p, i: said([65 + i]))
    task = Questions(3, lambda number, answer: answer.ids[0] - 65 < rights[number])
    got = evaluate_pass_at_k(task, engine, settings(temperature=0.5, seed=1), CPU)
    assert got == pytest.approx([sum(pass_at(k, 8, r) for r in rights) / 3 for k in range(1, 9)])
    assert got == sorted(got) and len(got) == PASS_AT
    assert {(p.temperature, p.n, p.max_tokens) for _, p in engine.asked} == {(1.0, 8, 8)}
    seeds = [p.seed for _, p in engine.asked]
    evaluate_pass_at_k(task, engine, settings(seed=2), CPU)
    assert [p.seed for _, p in engine.asked[3:]] == seeds, "the same draws at every evaluation and for every run seed"
    assert len(set(seeds)) == 3


def test_seeds_are_stable_numbers_the_engine_takes():
    assert derive_seed(1, 2, 3) == 1853286989701629226
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**63 for seed in seeds)


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("permute", [False, True])
def test_rewards_are_learned_and_permuted_rewards_are_not(tokenizer, tmp_path, permute):
    """The reward is 1 when the first token is even: half of all tokens, so an untrained model gets 0.5."""
    model = make_model(tokenizer)
    engine = Engine(model, tokenizer, max_batch=256)
    task = Questions(64, lambda number, answer: bool(answer.ids) and answer.ids[0] % 2 == 0)
    batches = RolloutBatches(task, engine, settings(examples_per_step=16, num_samples=16, max_tokens=1,
                                                    permute_advantages=permute), 256, CPU)
    optimizer = MuonAdamW(model, model.kernels, lr_scale=0.3)
    trainer = Trainer("rl", tmp_path, model, optimizer, CPU, Schedule(8), identity={}, args={}, fingerprint="f" * 64)
    trainer.run(batches)
    rows = [json.loads(line) for line in metrics_path("rl").read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows]
    assert 0.4 < rewards[0] < 0.6
    if permute:
        assert 0.35 < rewards[-1] < 0.65
    else:
        assert rewards[-1] > 0.75


# --- the program ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A folder in which base, mid, SFT and RL ran."""
    folder = tmp_path_factory.mktemp("tiny")
    before = os.environ["NANOCHAT_BASE_DIR"]
    tiny.prepare_base_dir(folder)
    for stage in tiny.PROGRAMS:
        tiny.train(stage, folder, "--num-steps", "2", "--eval-every", "1")
    os.environ["NANOCHAT_BASE_DIR"] = before
    yield folder
    tiny.forget_task()


def test_the_metrics_and_the_report_tell_reward_pass_at_k_and_engine(tiny_run, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tiny_run / "artifacts"))
    rows = [json.loads(line) for line in metrics_path("rl").read_text(encoding="utf-8").splitlines()]
    passed = [row for row in rows if "pass_at_k" in row]
    assert [row["step"] for row in passed] == [0, 1, 2]
    assert all(len(row["pass_at_k"]) == 8 and row["pass_at_1"] == row["pass_at_k"][0] for row in passed)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["lr"] for row in steps] == [1.0, 0.5], "linear to zero"
    assert all(0 <= row["reward"] <= 1 and row["answer_tokens"] > 0 for row in steps)
    assert all(0 <= row["logprob_gap"] <= row["logprob_gap_max"] < 1e-3 for row in steps)
    data = json.loads((Report().folder / "section_rl.json").read_text(encoding="utf-8"))["data"]
    assert data["Started from"] == "sft step 2" and data["Task"] == "even-length"
    assert data["Reward, mean of the first tenth of the steps"] == steps[0]["reward"]
    assert data["Reward, mean of the last tenth"] == steps[-1]["reward"]
    assert data["|log p of engine - of trainer| in nats, mean"] == sum(row["logprob_gap"] for row in steps) / 2
    assert data["The same, largest"] == max(row["logprob_gap_max"] for row in steps)
    table = data["pass@k on 3 held-out problems"]
    assert [row["k"] for row in table] == list(range(1, 9))
    assert [row["before"] for row in table] == passed[0]["pass_at_k"]
    assert [row["after"] for row in table] == passed[-1]["pass_at_k"]
    assert data["Engine requests"] == 2 * 2 + 3 * 3 and data["Engine tokens_per_s"] > 0
    assert data["Engine pages_total"] >= data["Engine pages_peak"] > 0


@pytest.mark.parametrize("flags, sentence", [
    (["--task", "nothing"], "unknown task 'nothing': choose from "),
    (["--task", "choice"], "--task must be one whose answers are sampled and rewarded, choice is categorical"),
    (["--num-samples", "1"],
     "--num-samples must be at least 2 (the only answer to a problem has advantage 0), got 1"),
    (["--examples-per-step", "0"], "--examples-per-step must be at least 1, got 0"),
    (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
    (["--top-k", "-1"], "--top-k must be at least 0, got -1"),
    (["--temperature", "0"], "--temperature must be a number above 0 (equal answers have advantage 0), got 0.0"),
    (["--temperature", "nan"], "--temperature must be a number above 0 (equal answers have advantage 0), got nan"),
    (["--num-steps", "0"], "--num-steps must be at least 1, or -1 for one pass over the problems, got 0"),
    (["--eval-problems", "0"], "task even-length needs at least one problem, not 0"),
    (["--rollout-batch-size", "0"], "max_batch must be at least 1, got 0"),
    (["--depth", "7"], "stage sft has no whole checkpoint in "),
])
def test_user_mistakes_are_one_sentence_and_leave_nothing(tiny_run, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "replaced by the copy, restored after the test")
    tiny.copy_base_dir(tiny_run, tmp_path / "copy", without=("rl",))
    message = error_of(tiny.train, "rl", tiny_run, *flags)
    assert message.startswith(sentence)
    assert not (tmp_path / "copy" / "artifacts" / "checkpoints" / "rl").exists()


def test_examples_that_do_not_divide_by_the_ranks_are_refused(tokenizer):
    engine = ScriptedEngine(tokenizer, make_model(tokenizer), None)
    assert error_of(RolloutBatches, Questions(6), engine, settings(), 4, Runtime(CPU.device, 0, 3)) == (
        "--examples-per-step must be a multiple of ranks 3, got 4")


def test_problems_that_leave_no_room_for_an_answer_are_left_out_and_counted(tokenizer):
    task = Questions(12, lambda number, answer: number)
    lengths = [len(tokenizer.render_for_completion(task[i])) for i in range(12)]
    assert lengths[9] < lengths[10] == lengths[11]
    fitting = FittingProblems(task, tokenizer, lengths[10])
    assert (len(fitting), fitting.left_out) == (10, 2)
    assert [fitting[i]["number"] for i in range(10)] == list(range(10))
    assert FittingProblems(task, tokenizer, lengths[10] + 1).left_out == 0
    assert fitting.reward(fitting[9], said([1])) == 9.0 and fitting.kind == "generative"
    assert error_of(FittingProblems, task, tokenizer, lengths[0]) == (
        f"task questions must have a problem of fewer tokens than the context of {lengths[0]}, all 12 are longer")


def test_a_problem_that_the_engine_cannot_serve_stops_the_run(tokenizer):
    batches = RolloutBatches(Questions(2), Engine(make_model(tokenizer), tokenizer), settings(examples_per_step=2), 4,
                             CPU)
    batches.task = [exchange("short", "x"), exchange("word " * 200, "x")]
    n = len(tokenizer.render_for_completion(batches.task[1]))
    assert error_of(batches.micro_batches) == (
        f"rl: a problem of {n} tokens could not be answered: a prompt must fit the context of {CONTEXT} tokens, "
        f"got {n}")
