"""Models that leave for transformers and come back: equal bit for bit, and refused where they could not be."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny_pipeline as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_export import conversations, disarmed
from tiny_engine import CPU, KERNELS, one_thread  # noqa: F401, a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.convert_slow_tokenizer import TikTokenConverter

from nanochat.checkpoint import save_checkpoint
from nanochat.common import run_script
from nanochat.dataset import prepare
from nanochat.engine import Engine, SamplingParams
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_import import read_tokenizer
from nanochat.load import load_model, read_stage, stage_folder
from nanochat.report import Report
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import base_eval, export_hf, import_hf

TEXTS = ["the cat sat on the mat, and that's that.\n\n12+30 is 42; it is the 3rd line <|of|> 5 < 6 |> 7. " * 2,
         "한국어 🙂"]
VOCAB = 300
CONFIG = GPTConfig(sequence_len=128, vocab_size=VOCAB, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)


def random_tensors(config: GPTConfig) -> dict[str, torch.Tensor]:
    """Weights of which none is zero, so that every tensor has a part in the logits."""
    model = GPT.build(config, KERNELS, torch.float32, CPU, seed=1)
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(p.shape, generator=generator) * (1.0 if "wte" in name else 0.06)
            for name, p in model.named_parameters()}


def save_stage(stage: str, config: GPTConfig, tensors: dict, tokenizer: Tokenizer, step: int = 7) -> Path:
    tokenizer.save()
    state = {"stage": stage, "step": step, "model_config": asdict(config), "kernels": {}, "args": {},
             "tokenizer_fingerprint": tokenizer.fingerprint}
    return save_checkpoint(stage_folder(stage, config.n_layer), step, {"model": tensors}, state)


def export(*argv) -> None:
    run_script(lambda: export_hf.parse_args([str(a) for a in argv]), export_hf.main)


def take_in(*argv) -> None:
    run_script(lambda: import_hf.parse_args([str(a) for a in argv]), import_hf.main)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, VOCAB)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """A random d4 of grouped queries in shards, a random d4, and a base model that was trained, each exported."""
    folder, before = tmp_path_factory.mktemp("exported"), os.environ["NANOCHAT_BASE_DIR"]
    for name, config in (("grouped", replace(CONFIG, n_kv_head=1)), ("random", CONFIG)):
        os.environ["NANOCHAT_BASE_DIR"] = str(folder / f"{name}-base")
        save_stage("sft", config, random_tensors(config), tokenizer)
        export("sft", folder / name, "--shard-gb", "0.004" if name == "grouped" else "5")
    tiny.prepare_base_dir(folder / "trained-base")
    tiny.train("base", folder / "trained-base", "--sequence-len", "128")  # room for 64 tokens after a prompt
    export("base", folder / "trained")
    tiny.forget_task()
    bases = {"grouped": folder / "grouped-base", "random": folder / "random-base",
             "trained": folder / "trained-base" / "artifacts"}
    os.environ["NANOCHAT_BASE_DIR"] = before
    return {name: (base, folder / name, "base" if name == "trained" else "sft") for name, base in bases.items()}


def both(exported, name, monkeypatch):
    """Our model, with eager kernels, and transformers' own of one export."""
    base, folder, stage = exported[name]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    ours, tokenizer, _ = load_model(stage, device="cpu", kernels="eager", dtype="float32")
    return ours, tokenizer, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


# --- the same numbers -----------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("name", ["random", "grouped", "trained"])
def test_the_logits_of_transformers_are_ours_bit_for_bit(exported, monkeypatch, figure, name):
    ours, _, theirs = both(exported, name, monkeypatch)
    worst = 0.0
    for shape in ((1, 1), (1, 64), (3, 17)):
        idx = torch.randint(0, VOCAB, shape)
        want, got = ours(idx), theirs(idx).logits
        assert want.abs().max() > 1 and want.std() > 0.1, "flat logits would prove nothing"
        worst = max(worst, (want - got).abs().max().item())
        assert torch.equal(want, got)
    figure(f"largest difference between transformers' fp32 logits and ours, {name} model: {worst}")


@torch.inference_mode()
@pytest.mark.parametrize("name", ["random", "trained"])
def test_greedy_text_is_equal_with_and_without_cache_and_by_our_engine(exported, monkeypatch, name):
    ours, tokenizer, theirs = both(exported, name, monkeypatch)
    engine = Engine(ours, tokenizer, tools="off", max_batch=1)
    said = []
    for text in ("the cat", "12+30"):
        prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})
        ids = engine.generate([prompt], SamplingParams(max_tokens=64, temperature=0.0))[0][0].ids
        for use_cache in (True, False) if text == "12+30" else (True,):
            idx = torch.tensor([prompt])
            out = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=64,
                                  use_cache=use_cache)[0, len(prompt):].tolist()
            stop = theirs.generation_config.eos_token_id
            assert [id for id in out if id not in stop] == ids
            assert len(out) == 64 or out[-1] in stop
        said.append(tokenizer.decode(ids))
    assert min(map(len, said)) > 32


def test_the_generation_config_stops_where_the_engine_does(exported, tokenizer):
    config = GenerationConfig.from_pretrained(exported["random"][1])
    assert config.eos_token_id == [tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id]
    assert (config.bos_token_id, config.pad_token_id) == (tokenizer.bos_id, tokenizer.special_id("<|assistant_end|>"))


# --- the same tokens ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(exported):
    return AutoTokenizer.from_pretrained(exported["random"][1])


@settings(max_examples=100, deadline=None)
@given(conversations)
def test_apply_chat_template_gives_the_ids_of_our_rendering(tokenizer, theirs, conversation):
    messages = conversation["messages"]
    ids = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == tokenizer.render_conversation(disarmed(conversation))[0]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked == tokenizer.render_for_completion(disarmed(conversation))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from([*TEXTS[0].split(), " ", "\n", "한", "\u0301"])).map("".join))
def test_any_text_has_our_ids_and_comes_back(tokenizer, theirs, text):
    text = text.replace("<|", "<")  # there a special token's name becomes its id
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert theirs.decode(ids) == text == tokenizer.decode(ids)


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n_files", [("grouped", 4), ("random", 1), ("trained", 1)])
def test_an_export_comes_back_bit_equal(exported, own_base_dir, monkeypatch, name, n_files):
    base, folder, stage = exported[name]
    assert len(list(folder.glob("*.safetensors"))) == n_files
    take_in(folder, "--stage", stage)
    back, state, tokenizer = read_stage(stage)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    tensors, before, own = read_stage(stage)
    assert state["model_config"] == before["model_config"] and tokenizer.fingerprint == own.fingerprint
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], tensors[n]) and back[n].dtype == tensors[n].dtype for n in tensors)


def test_an_imported_base_model_is_evaluated_like_its_original(exported, own_base_dir, monkeypatch, capsys):
    base, folder, stage = exported["trained"]
    flags = ["--eval", "bpb", "--device", "cpu", "--device-batch-size", "1", "--eval-tokens", "128",
             "--unigram-tokens", "256"]

    def measured(*more):
        capsys.readouterr()
        run_script(lambda: base_eval.parse_args([*flags, *more]), base_eval.main)
        return [line for line in capsys.readouterr().out.splitlines() if "bpb: " in line]

    take_in(folder, "--stage", stage)
    with pytest.raises(SystemExit):
        measured()
    assert "--data must name the text to measure on" in capsys.readouterr().err
    texts = str(base.parent / "texts")
    prepare(texts)
    imported = measured("--data", texts)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    assert imported == measured() and len(imported) == 3


def test_bfloat16_is_rounded_once_and_stays(exported, own_base_dir, tmp_path, monkeypatch):
    base, _, _ = exported["random"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    export("sft", tmp_path / "half", "--dtype", "bfloat16")
    tensors = read_stage("sft")[0]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(own_base_dir))
    take_in(tmp_path / "half")
    back = read_stage("sft")[0]
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}, "half the disk, cast on loading"
    model, _, _ = load_model("sft", device="cpu", kernels="eager", dtype="float32")
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].bfloat16().float())


def test_the_card_has_the_scores_of_this_checkpoint_only(exported, monkeypatch, tmp_path, capsys):
    base, folder, _ = exported["random"]
    assert "## Scores" not in (folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    Report().scores("sft", {"arithmetic": 0.25, "unknown": None})
    Report().section("SFT evaluation", {"Step": 7})
    export("sft", tmp_path / "scored")
    card = (tmp_path / "scored" / "README.md").read_text(encoding="utf-8")
    assert "| arithmetic | 0.2500 |" in card and "unknown" not in card and "step 7" in card
    Report().section("SFT evaluation", {"Step": 8})
    export("sft", tmp_path / "other")
    assert "## Scores" not in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    assert "the report's scores are of step 8" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["random", "trained"])
def test_the_cards_example_runs_and_is_of_the_stage(exported, monkeypatch, capsys, name):
    _, folder, stage = exported[name]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("calculator" in card) == ("apply_chat_template" in card) == (stage != "base")
    monkeypatch.chdir(folder.parent)
    exec(card.split("```python\n")[1].split("```")[0], {})
    start = "<|bos|>The capital of France is" if stage == "base" else "<|bos|><|user_start|>What is 37 plus 85?"
    assert start in capsys.readouterr().out


def test_a_tokenizer_converted_from_tiktoken_is_ours(tmp_path):
    """How a published nanochat tokenizer, a pickled tiktoken.Encoding, gets here: with every cut of every token."""
    tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 600)
    (tmp_path / "ranks").write_bytes(tokenizer.to_tiktoken_file())
    arguments = tokenizer.to_tiktoken()
    TikTokenConverter(str(tmp_path / "ranks"), arguments["pat_str"], extra_special_tokens=arguments["special_tokens"]
                      ).converted().save(str(tmp_path / "tokenizer.json"))
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert len(merges) > 600 - 256 - len(SPECIAL_TOKENS)
    assert read_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
