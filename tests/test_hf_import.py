"""scripts.import_hf and scripts.export_hf on what they must refuse: one sentence, and nothing of it written."""

import hashlib
import json
import re
import shutil
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.checkpoint import find_checkpoint, save_checkpoint
from nanochat.common import UserError, run_script
from nanochat.gpt import GPTConfig
from nanochat.hf_export import export
from nanochat.hf_import import import_model, read_model, read_tokenizer
from nanochat.hf_model import export_model, tensor_table
from nanochat.load import read_stage, stage_folder
from nanochat.tokenizer import Tokenizer
from scripts import export_hf, import_hf

CONFIG = GPTConfig(sequence_len=16, vocab_size=280, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
TEXTS = ["the cat sat on the mat, and that's that, the 12th time"]


def random_tensors(config=CONFIG) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, (_, shape) in tensor_table(config).items()}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 280)


@pytest.fixture
def model(tokenizer, tmp_path):
    """A folder to damage."""
    export_model(random_tensors(), CONFIG, tokenizer, tmp_path / "model", "card", shard_bytes=8000)
    return tmp_path / "model"


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def edit(path: Path, change) -> None:
    """Apply `change` to a JSON file's content, which it may also replace."""
    value = json.loads(path.read_text(encoding="utf-8"))
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, sentence", [
    ({"model_type": "llama"}, "model_type must be nanochat, got 'llama'"),
    ({"hidden_act": "silu"}, "hidden_act must be 'relu2', got 'silu'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings must be False, got True"),
    ({"attention_bias": True}, "attention_bias must be False, got True"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping must be 15.0, got 30.0"),
    ({"intermediate_size": 8192}, "intermediate_size must be 64, got 8192"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope_theta must be 10000.0, got 100000.0"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type must be 'default', got 'yarn'"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1.1920929e-07 or 1e-06, got 1e-05"),
    ({"num_hidden_layers": "1"}, "num_hidden_layers must be an integer, got '1'"),
    ({"num_hidden_layers": 2}, "tensor model.layers.1.mlp.fc1.weight is missing"),
    ({"num_key_value_heads": 2}, "tensor model.layers.0.self_attn.k_proj.weight must have shape (16, 16), got (8, 16)"),
    ({"num_attention_heads": 3}, "n_embd must be n_head times an even head dim, got 16 and 3 heads"),
    ({"vocab_size": 281}, "tensor lm_head.weight must have shape (281, 16), got (280, 16)"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object, got [1]"),
    ({"rope_parameters": "x"}, "rope_parameters must be an object, got 'x'"),
    ({"dtype": "bfloat16"}, " must be of config.json's dtype bfloat16, got torch.float32"),
])
def test_a_config_that_we_do_not_compute_is_refused(model, own_base_dir, changes, sentence):
    edit(model / "config.json", lambda config: config.update(changes))
    assert refusal(import_model, str(model), "sft").endswith(sentence)
    assert not own_base_dir.exists()


def test_published_spellings_of_the_config_are_understood(model, capsys):
    """transformers before version 5 wrote other names, and published models another epsilon."""
    def older(config):
        theta = config.pop("rope_parameters")["rope_theta"]
        del config["final_logit_softcapping"], config["attention_bias"]
        config.update(rope_theta=theta, logits_soft_cap=15.0, qkv_bias=False, rms_norm_eps=1e-6,
                      torch_dtype=config.pop("dtype"))

    edit(model / "config.json", older)
    assert read_model(model)[0] == CONFIG
    assert capsys.readouterr().out == (
        "note: config.json has rms_norm_eps 1e-06, this program computes with 1.1920929e-07\n")
    edit(model / "config.json", lambda config: config.update(logits_soft_cap=20.0))
    assert refusal(read_model, model).endswith("final_logit_softcapping must be 15.0, got 20.0")


@pytest.mark.parametrize("text, sentence", [("[1]", "must hold an object, it holds a list"),
                                            ("{", "must be a JSON file (")])
def test_a_config_that_is_no_object_is_refused(model, text, sentence):
    (model / "config.json").write_text(text, encoding="utf-8")
    assert sentence in refusal(read_model, model)


# --- weights --------------------------------------------------------------------------------------


def shard_of(model: Path, tensor: str) -> Path:
    return model / json.loads((model / "model.safetensors.index.json").read_text("utf-8"))["weight_map"][tensor]


def damage_missing(model):
    shard_of(model, "lm_head.weight").unlink()


def damage_cut(model):
    path = shard_of(model, "lm_head.weight")
    path.write_bytes(path.read_bytes()[:-1])


def damage_extra(model):
    path = shard_of(model, "lm_head.weight")
    save_file(load_file(path) | {"model.value_embeds.weight": torch.zeros(2)}, path)


def damage_integer(model):
    path = shard_of(model, "lm_head.weight")
    save_file({name: tensor.int() for name, tensor in load_file(path).items()}, path)


def damage_outside(model):
    edit(model / "model.safetensors.index.json", lambda index: index["weight_map"].update(x="../other.safetensors"))


def damage_no_weights(model):
    for path in model.glob("model*"):
        path.unlink()


@pytest.mark.parametrize("damage, sentence", [
    (damage_missing, r"model-0000\d-of-0000\d\.safetensors is missing"),
    (damage_cut, r"must be a safetensors file \("),
    (damage_extra, r"tensor model\.value_embeds\.weight has no place in NanoChat's architecture"),
    (damage_integer, r"must be of 16 or 32 bit floats, got torch\.int32"),
    (damage_outside, r"index\.json must map tensors to files beside it"),
    (damage_no_weights, r"model\.safetensors is missing"),
])
def test_damaged_weights_are_refused_and_nothing_is_written(model, own_base_dir, damage, sentence):
    damage(model)
    assert re.search(sentence, refusal(import_model, str(model), "sft"))
    assert not own_base_dir.exists()


# --- tokenizer.json -------------------------------------------------------------------------------


def swap_two(file):
    vocabulary = file["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize("change, sentence", [
    (lambda file: file["model"].update(type="WordPiece"), "model.type must be 'BPE', got 'WordPiece'"),
    (lambda file: file.update(normalizer={"type": "NFC"}), "normalizer must be None, got {'type': 'NFC'}"),
    (lambda file: file["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), r"split pattern must be"),
    (lambda file: file["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "bytes must be"),
    (lambda file: file["added_tokens"].remove(file["added_tokens"][3]), "added_tokens must be"),
    (lambda file: file["added_tokens"].append({"id": 280, "content": "<|pad|>"}), "added_tokens must be"),
    (swap_two, "the ids must be the 256 bytes, then the merges in their order"),
    (lambda file: file["model"]["merges"].reverse(), "merges must be in the order of their tokens"),
    (lambda file: file["model"]["merges"].remove(file["model"]["merges"][-1]), "every token must be made by a merge"),
    (lambda file: file["model"]["merges"].append(["a", "Ω"]), "must be a byte-level BPE tokenizer"),
    (lambda file: file["model"].update(merges=["a b c"]), "must be a byte-level BPE tokenizer"),
    (lambda file: file["pre_tokenizer"]["pretokenizers"].append({}), "must be a byte-level BPE tokenizer"),
    (lambda file: file.update(pre_tokenizer=None), "must be a byte-level BPE tokenizer"),
    (lambda file: [], "must hold an object"),
])
def test_a_tokenizer_that_would_give_other_ids_is_refused(model, own_base_dir, change, sentence):
    edit(model / "tokenizer.json", change)
    assert sentence in refusal(import_model, str(model), "sft")
    assert not own_base_dir.exists()


def test_merges_may_be_spelled_as_texts(model, tokenizer):
    edit(model / "tokenizer.json",
         lambda file: file["model"].update(merges=[" ".join(pair) for pair in file["model"]["merges"]]))
    assert read_tokenizer(model).fingerprint == tokenizer.fingerprint


def test_a_pickled_tokenizer_is_refused_with_the_way_out(model, own_base_dir):
    (model / "tokenizer.json").rename(model / "tokenizer.pkl")
    assert "tokenizer.pkl is a pickle, which can run any code, and is never read: where you trust it, make " in refusal(
        import_model, str(model), "sft")
    (model / "tokenizer.pkl").unlink()
    assert refusal(import_model, str(model), "sft").endswith("tokenizer.json is missing")
    assert not own_base_dir.exists()


def test_a_vocabulary_of_another_size_is_refused(model, own_base_dir):
    (model / "tokenizer.json").write_text(Tokenizer.train(TEXTS, 279).to_huggingface(), encoding="utf-8")
    assert refusal(import_model, str(model), "sft") == (
        f"{model}: the tokenizer must have the model's vocabulary of 280, got 279")
    assert not own_base_dir.exists()


# --- where it goes --------------------------------------------------------------------------------


def test_a_base_directory_of_another_tokenizer_is_left_alone(model, own_base_dir, tokenizer):
    other = Tokenizer.train(["something else"], 265)
    path = other.save()
    before = path.read_bytes()
    assert refusal(import_model, str(model), "sft") == (
        f"{own_base_dir}/tokenizer holds tokenizer {other.fingerprint[:12]}, the model needs "
        f"{tokenizer.fingerprint[:12]}; set NANOCHAT_BASE_DIR to another folder")
    assert path.read_bytes() == before and not (own_base_dir / "checkpoints").exists()


def test_a_checkpoint_is_never_replaced(model, own_base_dir):
    import_model(str(model), "sft")
    before = read_stage("sft")[1]["weights"]
    assert refusal(import_model, str(model), "sft") == (
        f"{own_base_dir}/checkpoints/sft/d1 already holds a checkpoint; move it away, or choose another --stage or "
        "NANOCHAT_BASE_DIR")
    assert read_stage("sft")[1]["weights"] == before
    assert import_model(str(model), "rl") == find_checkpoint(stage_folder("rl"))  # the same tokenizer


def test_a_failed_save_leaves_nothing_and_can_be_repeated(model, own_base_dir, tokenizer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.checkpoint.write_tensors", full)
        assert "No space left on device" in refusal(import_model, str(model), "sft")
        assert not (own_base_dir / "tokenizer").exists() and not (own_base_dir / "checkpoints/sft/d1").exists()
        path = tokenizer.save()
        refusal(import_model, str(model), "sft")
        assert path.exists(), "a tokenizer that was there before stays"
    import_model(str(model), "sft")


@pytest.mark.parametrize("name, sentence", [
    ("tokenizer", "the tokenizer cannot be saved in {}/tokenizer (File exists)"),
    ("checkpoints", "{}/checkpoints"),
])
def test_a_file_where_a_folder_belongs_is_a_sentence(model, own_base_dir, name, sentence):
    own_base_dir.mkdir()
    (own_base_dir / name).write_text("mine", encoding="utf-8")
    assert sentence.format(own_base_dir) in refusal(import_model, str(model), "sft")
    assert [path.name for path in own_base_dir.iterdir()] == [name]
    assert (own_base_dir / name).read_text(encoding="utf-8") == "mine"


def test_training_goes_on_from_an_import_but_does_not_resume_it(model, own_base_dir):
    from test_train_resume import bare_trainer
    trainer = bare_trainer(import_model(str(model), "base").parent)
    assert "has no optim_rank0of1.safetensors" in refusal(trainer.restore, "auto")
    assert "already holds checkpoint step_000000" in refusal(trainer.restore, "none")


def program(module, *argv):
    run_script(lambda: module.parse_args([str(a) for a in argv]), module.main)


def test_the_programs_end_with_a_sentence(own_base_dir, tokenizer, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        program(import_hf, tmp_path / "absent")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: the source must be a folder or a model of the hub as owner/name, {tmp_path}/absent is neither\n")
    with pytest.raises(SystemExit) as ended:
        program(export_hf, "pretrained", tmp_path / "out")
    assert ended.value.code == 2 and "invalid choice: 'pretrained'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program(export_hf, "sft", tmp_path / "out")
    assert "stage sft has no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- exports that are refused ---------------------------------------------------------------------


def save_stage(tensors, config, tokenizer):
    tokenizer.save()
    state = {"stage": "sft", "step": 1, "model_config": asdict(config), "kernels": {}, "args": {},
             "tokenizer_fingerprint": tokenizer.fingerprint}
    save_checkpoint(stage_folder("sft", config.n_layer), 1, {"model": tensors}, state)


WINDOWED = replace(CONFIG, n_layer=2, window_pattern="SL")


@pytest.mark.parametrize("config, change, sentence", [
    (WINDOWED, {}, "transformers' NanoChat has no sliding windows, this model has window_pattern SL: it cannot be"),
    (CONFIG, {"value_embeds.weight": torch.zeros(2, 2)}, "tensor value_embeds.weight has no place in NanoChat's"),
    (CONFIG, {"lm_head.weight": torch.zeros(2, 2)}, "tensor lm_head.weight must have shape (280, 16), got (2, 2)"),
    (replace(CONFIG, vocab_size=288), {}, "the model's vocabulary must be the tokenizer's of 280, got 288"),
])
def test_a_model_that_cannot_be_expressed_is_refused(tokenizer, tmp_path, config, change, sentence):
    save_stage(random_tensors(config) | change, config, tokenizer)
    tensors, state, own = read_stage("sft")
    assert sentence in refusal(export_model, tensors, GPTConfig(**state["model_config"]), own, tmp_path / "out", "card")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_missing_tensor_is_named(tokenizer, tmp_path):
    tensors = random_tensors()
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    assert refusal(export_model, tensors, CONFIG, tokenizer, tmp_path / "out", "card") == (
        "the checkpoint: tensor transformer.h.0.mlp.c_fc.weight is missing")


def test_an_existing_folder_is_refused_unless_it_is_empty(model, tokenizer, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert refusal(export_model, random_tensors(), CONFIG, tokenizer, model, "card") == (
        f"the export needs a folder that is new or empty, {model} is not")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    (tmp_path / "empty").mkdir()
    export_model(random_tensors(), CONFIG, tokenizer, tmp_path / "empty", "card")
    assert (tmp_path / "empty" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_current_folder_is_refused(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for write in (lambda folder: export_model(random_tensors(), CONFIG, tokenizer, folder, "card"),
                  lambda folder: export(tokenizer, folder)):
        for folder in (Path("."), tmp_path / "here"):
            assert refusal(write, folder) == (
                f"the export puts a folder of its own in place, which cannot be the current one, got {folder}")
    assert [path.name for path in tmp_path.iterdir()] == ["here"] and not list(Path(".").iterdir())


def test_a_failed_write_leaves_no_folder(tokenizer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.hf_model.save_torch_state_dict", full)
    sentence = refusal(export_model, random_tensors(), CONFIG, tokenizer, tmp_path / "out", "card")
    assert sentence == f"the model cannot be written to {tmp_path}/out ([Errno 28] No space left on device)"
    assert not list(tmp_path.iterdir())


# --- the hub --------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Serves `folder` as the model me/tiny, and remembers what was asked for."""

    folder: Path
    asked: list

    def answer(self, with_body: bool) -> None:
        match = re.fullmatch(r"/me/tiny/resolve/main/([\w.-]+)", self.path)
        path = self.folder / match[1] if match else None
        self.asked.append(self.path)
        found = path is not None and path.is_file()
        body = path.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", self.server.commits.get(path.name, "a" * 40))
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if match else "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(model, monkeypatch):
    Hub.folder, Hub.asked = model, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commits = {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("sharded", [True, False])
def test_a_model_of_the_hub_is_fetched_by_exact_names(hub, model, tokenizer, sharded):
    if not sharded:
        shutil.rmtree(model)
        export_model(random_tensors(), CONFIG, tokenizer, model, "card")
    import_model("me/tiny", "mid")
    tensors = read_stage("mid")[0]
    want = read_model(model)[1]
    assert all(torch.equal(tensors[name], want[name]) for name in want) and tensors.keys() == want.keys()
    assert {Path(path).name for path in Hub.asked} == {
        "config.json", "tokenizer.json", "model.safetensors.index.json", *(p.name for p in model.glob("*.safetensors"))}


def test_a_model_of_the_hub_with_a_pickled_tokenizer_is_refused_before_its_weights_are_fetched(hub, model):
    (model / "tokenizer.json").rename(model / "tokenizer.pkl")
    assert refusal(import_model, "me/tiny", "sft").startswith("me/tiny: tokenizer.pkl is a pickle")
    assert not [path for path in Hub.asked if path.endswith(".safetensors")]


def test_a_model_of_the_hub_without_a_place_here_is_refused_before_its_weights_are_fetched(hub, own_base_dir):
    Tokenizer.train(["something else"], 265).save()
    assert "tokenizer holds tokenizer " in refusal(import_model, "me/tiny", "sft")
    assert not [path for path in Hub.asked if path.endswith(".safetensors")]


def test_files_of_different_commits_are_not_mixed(hub, model):
    hub.commits["tokenizer.json"] = "b" * 40
    assert "holds files of different commits of me/tiny" in refusal(import_model, "me/tiny", "sft")


def test_an_unknown_model_of_the_hub_is_a_sentence(hub, own_base_dir):
    assert "could not be downloaded" in refusal(import_model, "me/other", "sft")
    assert not (own_base_dir / "checkpoints").exists()
