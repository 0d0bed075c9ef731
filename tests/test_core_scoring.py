"""Scores: the paged scorer agrees with the plain one and computes nothing twice; so do models of transformers."""

import json
import math
import random

import numpy as np
import pytest
import torch
from tiny_engine import CONFIG, byte_tokenizer, one_thread, random_model  # noqa: F401

from kernels import KernelConfig, resolve
from nanochat.common import Runtime, UserError
from nanochat.evals import scoring
from nanochat.evals.results import ResponseLog, is_near_chance
from nanochat.evals.scoring import DenseScorer, PagedScorer, Row, trie_batch, tries

CPU = torch.device("cpu")
BOS = 256


def row(*ids, start):
    return Row(np.array([BOS, *ids]), start)


def items(n, seed=0):
    """Rows of n items: a context of 0 to 60 tokens and two to four continuations of 1 to 9, some items alike."""
    rng, rows = random.Random(seed), []
    common = [rng.randrange(256) for _ in range(12)]
    for i in range(n):
        context = common[: rng.randrange(13)] + [rng.randrange(256) for _ in range(rng.choice((0, 3, 40)))]
        for _ in range(rng.randrange(2, 5)):
            rows.append(row(*context, *(rng.randrange(4) for _ in range(rng.randrange(1, 10))), start=len(context) + 1))
    return rows + rows[:3]  # the same question twice


def one_by_one(model, rows):
    """[(mean nats, greedy)] by a whole forward and a log-softmax in fp64 per row."""
    expected = []
    for one in rows:
        with torch.inference_mode():
            logits = model(torch.from_numpy(one.ids[None]))[0, one.start - 1:-1].double()
        targets = torch.from_numpy(one.ids[one.start:])
        nats = -logits.log_softmax(-1)[torch.arange(len(targets)), targets]
        expected.append((nats.mean().item(), bool((logits.argmax(-1) == targets).all())))
    return expected


def assert_scores(scores, expected):
    assert [score.greedy for score in scores] == [greedy for _, greedy in expected]
    assert [score.nats for score in scores] == pytest.approx([nats for nats, _ in expected], rel=1e-5)


# --- the paged scorer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 2, "window_pattern": "SL", "sequence_len": 640}])
def test_scores_equal_one_forward_per_row(shape, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS", 7 * CONFIG.vocab_size)  # chunks of 7 positions
    model, rows = random_model(**shape), items(12)
    if shape:
        rows += [row(*np.random.default_rng(0).integers(0, 256, 400), start=390)]  # longer than the window of 256
    expected = one_by_one(model, rows)
    for batch_tokens in (1, 300, 10**4):
        assert_scores(PagedScorer(model, batch_tokens).score(rows), expected)
        assert_scores(DenseScorer(model, CPU, 96, BOS, batch_tokens).score(rows), expected)


def test_our_kernels_score_alike_with_pages_of_one_token():
    model, rows = random_model(), items(2)
    expected = one_by_one(model, rows)
    ours = resolve(KernelConfig.parse("eager,paged_append=triton,paged_attention=triton"), CPU, torch.float32,
                   model.config.shapes())
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = ours
    assert_scores(PagedScorer(model).score(rows), expected)


def test_greedy_continuations_are_recognized():
    model, ids = random_model(), [BOS, 1, 2, 3]
    for _ in range(3):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    rows = [Row(np.array(ids), 4)]
    for place in (4, 5, 6):  # one wrong token
        wrong = list(ids)
        wrong[place] = (wrong[place] + 1) % 256
        rows.append(Row(np.array(wrong), 4))
    for scorer in (PagedScorer(model), DenseScorer(model, CPU, 96, BOS)):
        assert [score.greedy for score in scorer.score(rows)] == [True, False, False, False]


@pytest.mark.parametrize("tokens", [96, 97, 960])
def test_a_row_may_fill_ten_contexts(tokens):
    """nanochat's rotations reach ten contexts far and it crops nothing shorter; a model made for 960 has them too."""
    model, long_model = random_model(), random_model(sequence_len=960)
    rows = [row(*np.random.default_rng(0).integers(0, 256, tokens - 1), start=tokens - 6), *items(2)]
    scorer = PagedScorer(model, 1)
    assert len(rows[0].ids) == tokens and scorer.max_len == 960 and model.cos.size(0) == 96
    assert_scores(scorer.score(rows[1:]), one_by_one(model, rows[1:]))
    for _ in range(2):
        assert_scores(scorer.score(rows), one_by_one(long_model, rows))


def test_no_rows_give_no_scores():
    assert PagedScorer(random_model()).score([]) == []


def test_weights_may_change_between_calls():
    model, rows = random_model(), items(4)
    scorer = PagedScorer(model)
    scorer.score(rows)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
        model.transformer["wte"].weight.mul_(0.5).add_(0.1)
    assert_scores(scorer.score(rows), one_by_one(model, rows))


# --- what is computed -------------------------------------------------------------------------------------------------


def test_shared_beginnings_are_computed_once():
    rows = [row(1, 2, 3, 4, 5, start=4), row(1, 2, 3, 4, 6, 7, start=4), row(1, 2, 9, start=3),
            row(1, 2, 3, 4, 5, start=5)]
    [numbers] = tries(rows, 100)
    batch = trie_batch([rows[i] for i in numbers], CPU)
    assert numbers == [0, 3, 1, 2]
    assert batch.tokens.tolist() == [BOS, 1, 2, 3, 4, 6]  # 17 tokens one by one; the last of a row is not read
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.slots.tolist() == list(range(6))
    assert batch.block_tables.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.cu_seqlens_q.tolist() == [0, 5, 6]
    assert batch.context_lens.tolist() == [5, 6]
    assert batch.out_rows.tolist() == [3, 4, 4, 3, 4, 5, 2]


def test_batches_hold_every_row_once_and_keep_to_their_size():
    rows = items(40)
    groups = list(tries(rows, 150))
    assert sorted(i for numbers in groups for i in numbers) == list(range(len(rows)))
    sizes = [len(trie_batch([rows[i] for i in numbers], CPU).tokens) for numbers in groups]
    assert len(sizes) > 5 and max(sizes) <= 150
    assert all(a + len(rows[numbers[0]].ids) > 150 for a, numbers in zip(sizes, groups[1:], strict=False))
    alone = sum(len(one.ids) - 1 for one in rows)
    assert sum(sizes) < alone / 2  # two to four continuations of a context


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "nanochat"])
def huggingface(request, tmp_path_factory):
    """A folder with a random tiny model of transformers and a tokenizer of bytes."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp(request.param)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, max_position_embeddings=64, bos_token_id=256, eos_token_id=257,
                 pad_token_id=257)
    config, model = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
                     "nanochat": (transformers.NanoChatConfig, transformers.NanoChatForCausalLM)}[request.param]
    torch.manual_seed(5)
    model(config(**sizes, initializer_range=0.4)).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<s>", "</s>"])}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_alone, bos_token="<s>",
                                         eos_token="</s>").save_pretrained(folder)
    return folder


def test_a_model_of_transformers_scores_as_one_forward_per_row(huggingface):
    import transformers

    from nanochat.evals.core import encode_all, to_rows
    from nanochat.evals.huggingface import load_huggingface

    scorer, tokenizer = load_huggingface(str(huggingface), CPU, torch.float32)
    assert (scorer.max_len, tokenizer.bos_id) == (64, 256)
    prompts = [f"The {i} is" + end for i in range(30) for end in (" red", " not so red", " a")]
    sequences = encode_all(tokenizer, prompts)
    assert [len(ids) for ids in sequences] == [len(prompt) + 1 for prompt in prompts]
    rows = [one for i in range(0, 90, 3) for one in to_rows("multiple_choice", sequences[i:i + 3], scorer.max_len)]
    model = transformers.AutoModelForCausalLM.from_pretrained(huggingface).eval()
    assert_scores(scorer.score(rows), one_by_one(lambda x: model(input_ids=x).logits, rows))


def test_our_model_scores_alike_here_and_in_transformers(tmp_path):
    from nanochat.evals.huggingface import load_huggingface
    from nanochat.hf_model import export_model

    model, folder = random_model(), tmp_path / "exported"
    export_model(model.state_dict(), model.config, byte_tokenizer(), folder, "a model", dtype="float32",
                 shard_bytes=10**9)
    scorer, tokenizer = load_huggingface(str(folder), CPU, torch.float32)
    assert (scorer.max_len, tokenizer.bos_id) == (96, BOS)
    rows = items(12)
    ours = PagedScorer(model).score(rows)
    assert_scores(scorer.score(rows), [(score.nats, score.greedy) for score in ours])


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    from nanochat.evals.huggingface import load_huggingface

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        load_huggingface(str(tmp_path), CPU, torch.float32)
    assert str(error.value).startswith(f"--hf-path {tmp_path} must be a model of transformers with safetensors and a ")
    assert "\n" not in str(error.value)


def test_without_transformers_the_package_is_named(monkeypatch):
    from nanochat.evals.huggingface import load_huggingface

    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="^--hf-path gpt2 needs the package transformers, which is not installed "):
        load_huggingface("gpt2", CPU, torch.float32)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accuracy", "baseline", "n", "near"), [
    (0.30, 0.25, 100, True), (0.36, 0.25, 100, False), (0.14, 0.25, 100, False), (0.27, 0.25, 10_000, False),
    (0.0, 0.0, 164, True), (1 / 164, 0.0, 164, True), (5 / 164, 0.0, 164, False), (0.0, 0.25, 4, True),
    (0.0, 0.25, 40, False), (1.0, 0.5, 3, True), (1.0, 0.5, 5, False)])
def test_near_chance_is_within_two_standard_errors_of_guessing(accuracy, baseline, n, near):
    assert is_near_chance(accuracy, baseline, n) is near
    error = math.sqrt(max(accuracy * (1 - accuracy), baseline * (1 - baseline)) / n)
    assert (abs(accuracy - baseline) <= 2 * error) is near


def test_the_log_is_a_new_file_with_a_line_per_problem(tmp_path):
    path = tmp_path / "log.jsonl"
    log = ResponseLog(path, Runtime(CPU))
    log.add([{"index": 2, "text": "ä\n"}, {"index": 0}])
    log.add([{"index": 1}])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"index": 0}, {"index": 2, "text": "ä\n"}, {"index": 1}]
    with pytest.raises(UserError, match=f"^--save-responses must name a new file, {path} exists$"):
        ResponseLog(path, Runtime(CPU))
    with pytest.raises(UserError, match="must name a file that can be written"):
        ResponseLog(tmp_path / "no" / "such" / "log.jsonl", Runtime(CPU))
