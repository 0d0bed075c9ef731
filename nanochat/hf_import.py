"""A NanoChat model of transformers, in a folder or on the hub, as a checkpoint and a tokenizer of this program.

What comes in must be exactly what this program computes, or it is refused with the sentence that says where it is not:
the architecture, every tensor's name and shape, and a tokenizer that gives the same ids. Nothing is written before all
of it has been checked. safetensors and JSON only: weights or a tokenizer in a pickle are never read.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.registry import RMS_NORM_EPS
from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError, base_dir, print0
from nanochat.gpt import GPTConfig
from nanochat.hf_model import check_tensors, from_config, tensor_table
from nanochat.hub import fetch_all, read_manifest, repo_folder
from nanochat.load import stage_folder
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("tokenizer.pkl is a pickle, which can run any code, and is never read: where you trust it, make "
           "tokenizer.json of it with transformers.integrations.tiktoken.convert_tiktoken_to_fast(pickle.load(open("
           "'tokenizer.pkl', 'rb')), '.'), which needs tiktoken and blobfile, and import the folder")


def import_model(source: str, stage: str, revision: str = "main") -> Path:
    """Read a folder, or the model "owner/name" of the hub, into a checkpoint of `stage`; return its path.

    The base directory's tokenizer becomes the model's. UserError, and nothing written, when the base directory has
    another one or the stage has a checkpoint of this depth.
    """
    if Path(source).is_dir():
        folder = Path(source)
    else:
        folder = _fetch_description(source, revision)
        _find_place(folder, stage)  # the weights, gigabytes, only for a model that has one
        _fetch_weights(source, revision, folder)
    config, tensors = read_model(folder)
    tokenizer, target = _find_place(folder, stage)
    state = {"stage": stage, "step": 0, "model_config": asdict(config), "tokenizer_fingerprint": tokenizer.fingerprint,
             "kernels": {}, "args": {"imported_from": source, "revision": revision}}
    return _save(tokenizer, tensors, state, target)


def _find_place(folder: Path, stage: str) -> tuple[Tokenizer, Path]:
    """Return a model's tokenizer and the folder its checkpoint belongs into; UserError where they cannot go there."""
    config = read_config(folder)
    tokenizer = read_tokenizer(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: the tokenizer must have the model's vocabulary of {config.vocab_size}, "
                        f"got {tokenizer.vocab_size}")
    target = stage_folder(stage, config.n_layer)
    if target.is_dir() and any(target.glob("step_*")):
        raise UserError(f"{target} already holds a checkpoint; move it away, or choose another --stage or "
                        "NANOCHAT_BASE_DIR")
    place = base_dir() / "tokenizer"
    if any(place.glob("*")) and (own := Tokenizer.load(place)).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{place} holds tokenizer {own.fingerprint[:12]}, the model needs "
                        f"{tokenizer.fingerprint[:12]}; set NANOCHAT_BASE_DIR to another folder")
    return tokenizer, target


def _save(tokenizer: Tokenizer, tensors: dict[str, Tensor], state: dict, target: Path) -> Path:
    """Save tokenizer and checkpoint; after a failure what was not there before is not there."""
    place = base_dir() / "tokenizer"
    made = [folder for folder in (place, target) if not (folder.exists() and any(folder.glob("*")))]
    try:
        tokenizer.save(place)
        return save_checkpoint(target, 0, {"model": tensors}, state)
    except BaseException as error:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"the tokenizer cannot be saved in {place} ({error.strerror})") from error
        raise


# --- config and weights ---------------------------------------------------------------------------


def read_config(folder: Path) -> GPTConfig:
    """Return the shape of the model in a transformers NanoChat folder; UserError where we compute another."""
    raw = _read_json(folder / "config.json")
    config = from_config(raw, str(folder / "config.json"))
    eps = raw.get("rms_norm_eps", RMS_NORM_EPS)
    if eps not in (RMS_NORM_EPS, 1e-6):  # nanochat's models were trained with the first and published with the second
        raise UserError(f"{folder / 'config.json'}: rms_norm_eps must be {RMS_NORM_EPS} or 1e-06, got {eps!r}")
    return config


def read_model(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the shape and, under our names, the tensors of a transformers NanoChat folder, in the dtypes they have."""
    config, raw = read_config(folder), _read_json(folder / "config.json")
    if (eps := raw.get("rms_norm_eps", RMS_NORM_EPS)) != RMS_NORM_EPS:
        print0(f"note: config.json has rms_norm_eps {eps}, this program computes with {RMS_NORM_EPS}")
    theirs = _read_tensors(folder)
    table = tensor_table(config)
    check_tensors(theirs, dict(table.values()), str(folder))
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    for name, tensor in theirs.items():
        if dtype is not None and str(tensor.dtype) != f"torch.{dtype}":
            raise UserError(f"{folder}: tensor {name} must be of config.json's dtype {dtype}, got {tensor.dtype}")
    return config, {ours: theirs[name] for ours, (name, _) in table.items()}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for name in weight_files(folder):
        path = folder / name
        try:
            with safe_open(path, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no iterator
        except FileNotFoundError:
            raise UserError(f"{folder}: {name} is missing") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} must be a safetensors file ({error})") from error
    return tensors


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold the weights: model.safetensors, or what the index lists."""
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    shards = _read_json(folder / INDEX).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{folder / INDEX} must map tensors to files beside it")
    return sorted(names)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} must be a JSON file ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold an object, it holds a {type(value).__name__}")
    return value


# --- the tokenizer --------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return our tokenizer that gives the ids of a folder's tokenizer.json; UserError when there is none such."""
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "tokenizer.pkl").exists():
        raise UserError(f"{folder}: {PICKLED}")
    file = _read_json(path)
    try:
        pattern, vocabulary, merges = _parts(file)
        tokenizer = Tokenizer.from_merges(_pairs(vocabulary, merges), pattern)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"{path} must be a byte-level BPE tokenizer of tokenizers ({error!r})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    ours = json.loads(tokenizer.to_huggingface())
    if ours["model"]["vocab"] != vocabulary:
        raise UserError(f"{path}: the ids must be the 256 bytes, then the merges in their order")
    return tokenizer


def _parts(file: dict) -> tuple[str, dict[str, int], list]:
    """Return (split pattern, vocabulary, merges) after checking that all else is as in a nanochat tokenizer."""
    model, added = file["model"], file["added_tokens"]
    split, byte_level = file["pre_tokenizer"]["pretokenizers"]
    rules = {
        "model.type": (model["type"], "BPE"),
        "model.dropout": (model.get("dropout"), None),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix") or None, None),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix") or None, None),
        "normalizer": (file.get("normalizer"), None),
        "pre_tokenizer's split": ((split["type"], split["behavior"], split["invert"]), ("Split", "Isolated", False)),
        "pre_tokenizer's bytes": ((byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]),
                                  ("ByteLevel", False, False)),
        "added_tokens": ([(token["id"], token["content"]) for token in added],
                         list(enumerate(SPECIAL_TOKENS, start=len(model["vocab"])))),
    }
    for name, (got, want) in rules.items():
        if got != want:
            raise UserError(f"{name} must be {want!r}, got {got!r}")
    return split["pattern"]["Regex"], model["vocab"], model["merges"]


def _pairs(vocabulary: dict[str, int], merges: list) -> list[tuple[int, int]]:
    """Return the pair that makes each token after the bytes, by id.

    tokenizer.json made from tiktoken's ranks lists every way to cut a token in two. Only one of them can occur while
    encoding: the two tokens that its text has come down to when it is merged.
    """
    pairs: dict[tuple[str, str], int] = {}
    last = 0
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        new = vocabulary[left + right]
        if new < last:
            raise UserError(f"merges must be in the order of their tokens, {left + right!r} comes too late")
        pairs[left, right] = last = new
    made = []
    for token, id in sorted(vocabulary.items(), key=lambda item: item[1])[256:]:
        parts = list(token)
        while len(parts) > 2:
            ranked = [(pairs.get(pair, id), at) for at, pair in enumerate(zip(parts, parts[1:], strict=False))]
            rank, at = min(ranked)
            if rank >= id:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) != 2 or pairs.get(tuple(parts)) != id:
            raise UserError(f"every token must be made by a merge, {token!r} is made by none")
        made.append((vocabulary[parts[0]], vocabulary[parts[1]]))
    return made


# --- the hub --------------------------------------------------------------------------------------


def _fetch_description(repo: str, revision: str) -> Path:
    """Fetch all that an import reads but the weights, by exact file names, and return the folder that holds it."""
    def has(name: str) -> bool:
        return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).file_exists(repo, name, revision=revision)

    names = ["config.json", "tokenizer.json"]
    try:
        if has(INDEX):
            names.append(INDEX)
        if not has("tokenizer.json") and has("tokenizer.pkl"):
            raise UserError(f"{repo}: {PICKLED}")
    except HFValidationError:
        raise UserError(f"the source must be a folder or a model of the hub as owner/name, {repo} is neither") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"{repo} is no folder, and the hub cannot be asked for it ({error})") from error
    fetch_all([(repo, name) for name in names], revision=revision, repo_type="model")
    return repo_folder(repo, "model")


def _fetch_weights(repo: str, revision: str, folder: Path) -> None:
    fetch_all([(repo, name) for name in weight_files(folder)], revision=revision, repo_type="model")
    manifest = read_manifest(folder)
    if len({manifest[name]["commit"] for name in ("config.json", "tokenizer.json", *weight_files(folder))}) > 1:
        raise UserError(f"{folder} holds files of different commits of {repo}: delete it and import again")
