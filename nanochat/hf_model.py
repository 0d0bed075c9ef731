"""A model as a folder that transformers, vLLM and SGLang read, and what of such a folder this program can read.

    config.json  generation_config.json  README.md (the model card)
    model.safetensors, or shards and model.safetensors.index.json
    tokenizer.json  tokenizer_config.json  special_tokens_map.json     by hf_export.py

transformers calls the architecture NanoChat. The weights are the same numbers under other names, and with the same
epsilon, fp32 rotary tables and eager attention its logits are ours, bit for bit (tests/test_hf_model.py).
"""

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from kernels.registry import RMS_NORM_EPS
from nanochat.common import UserError, fsync_folder
from nanochat.gpt import GPTConfig
from nanochat.hf_export import BOS, EOS, huggingface_files, new_folder, write_files
from nanochat.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9

SIZES = {"vocab_size": "vocab_size", "hidden_size": "n_embd", "num_hidden_layers": "n_layer",
         "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
         "max_position_embeddings": "sequence_len"}  # their name -> ours
FIXED = {"hidden_act": "relu2", "final_logit_softcapping": 15.0, "attention_bias": False, "attention_dropout": 0.0,
         "tie_word_embeddings": False}
ROPE_THETA = 10_000.0


def tensor_table(config: GPTConfig) -> dict[str, tuple[str, tuple[int, int]]]:
    """Return our name -> (their name, shape) of every tensor of the model."""
    C, V = config.n_embd, config.vocab_size
    kv = config.n_kv_head * config.head_dim
    layer = {"attn.c_q": ("self_attn.q_proj", (C, C)), "attn.c_k": ("self_attn.k_proj", (kv, C)),
             "attn.c_v": ("self_attn.v_proj", (kv, C)), "attn.c_proj": ("self_attn.o_proj", (C, C)),
             "mlp.c_fc": ("mlp.fc1", (4 * C, C)), "mlp.c_proj": ("mlp.fc2", (C, 4 * C))}
    table = {"transformer.wte.weight": ("model.embed_tokens.weight", (V, C)),
             "lm_head.weight": ("lm_head.weight", (V, C))}
    for i in range(config.n_layer):
        table |= {f"transformer.h.{i}.{ours}.weight": (f"model.layers.{i}.{theirs}.weight", shape)
                  for ours, (theirs, shape) in layer.items()}
    return table


def check_tensors(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]], origin: str) -> None:
    """Raise UserError naming the first tensor that is missing, unknown or of another shape or kind than a weight."""
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in shapes:
            raise UserError(f"{origin}: tensor {name} has no place in NanoChat's architecture")
        if name not in tensors:
            raise UserError(f"{origin}: tensor {name} is missing")
        if tuple(tensors[name].shape) != shapes[name]:
            raise UserError(f"{origin}: tensor {name} must have shape {shapes[name]}, got {tuple(tensors[name].shape)}")
        if tensors[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{origin}: tensor {name} must be of 16 or 32 bit floats, got {tensors[name].dtype}")


# --- config.json ----------------------------------------------------------------------------------


def to_config(config: GPTConfig, tokenizer: Tokenizer, dtype: str) -> dict:
    """Return the config.json of a model; UserError for what NanoChat lacks."""
    if any(config.window(layer) >= 0 for layer in range(config.n_layer)):
        raise UserError("transformers' NanoChat has no sliding windows, this model has window_pattern "
                        f"{config.window_pattern}: it cannot be exported")
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(f"the model's vocabulary must be the tokenizer's of {tokenizer.vocab_size}, "
                        f"got {config.vocab_size}")
    return {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "dtype": dtype,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "intermediate_size": 4 * config.n_embd, **FIXED, "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "bos_token_id": tokenizer.special_id(BOS), "eos_token_id": tokenizer.special_id(EOS),
        "pad_token_id": None,  # as nn.Embedding's padding_idx it would stop the row of EOS from learning
    }


def from_config(config: dict, origin: str) -> GPTConfig:
    """Return the shape of the model that a config.json describes; UserError for another architecture."""
    if config.get("model_type") != "nanochat":
        raise UserError(f"{origin}: model_type must be nanochat, got {config.get('model_type')!r}")
    legacy = {"final_logit_softcapping": "logits_soft_cap", "attention_bias": "qkv_bias"}  # before transformers 5
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{origin}: rope_parameters must be an object, got {rope!r}")
    found = {key: config.get(key, config.get(legacy.get(key), want)) for key, want in FIXED.items()}
    found |= {"rope_type": rope.get("rope_type", "default"),
              "rope_theta": rope.get("rope_theta", config.get("rope_theta", ROPE_THETA)),
              "intermediate_size": config.get("intermediate_size")}
    sizes = {ours: config.get(theirs) for theirs, ours in SIZES.items()}
    if sizes["n_kv_head"] is None:
        sizes["n_kv_head"] = sizes["n_head"]
    for theirs, ours in SIZES.items():
        if type(sizes[ours]) is not int:
            raise UserError(f"{origin}: {theirs} must be an integer, got {sizes[ours]!r}")
    wanted = FIXED | {"rope_type": "default", "rope_theta": ROPE_THETA, "intermediate_size": 4 * sizes["n_embd"]}
    for key, want in wanted.items():
        if found[key] != want:
            raise UserError(f"{origin}: {key} must be {want!r}, got {found[key]!r}")
    try:
        return GPTConfig(**sizes)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from error


# --- writing --------------------------------------------------------------------------------------


def export_model(tensors: dict[str, torch.Tensor], config: GPTConfig, tokenizer: Tokenizer, folder: Path, card: str, *,
                 dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write a checkpoint's model tensors and its tokenizer as `folder`, whole or not at all; return the files' paths.

    UserError, and nothing written, for an existing folder that is not empty, a tensor that does not map, or a model
    that transformers' NanoChat cannot hold.
    """
    table = tensor_table(config)
    check_tensors(tensors, {name: shape for name, (_, shape) in table.items()}, "the checkpoint")
    stop = [tokenizer.special_id(EOS), tokenizer.special_id(BOS)]  # what the engine ends an answer at
    generation = {"bos_token_id": stop[1], "eos_token_id": stop, "pad_token_id": stop[0]}
    texts = {"config.json": _json(to_config(config, tokenizer, dtype)), "generation_config.json": _json(generation),
             "README.md": card, **huggingface_files(tokenizer)}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"the export needs a folder that is new or empty, {folder} is not")
    try:
        with new_folder(folder) as temporary:
            write_files(temporary, texts)
            theirs = {table[name][0]: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
            save_torch_state_dict(theirs, temporary, max_shard_size=shard_bytes)
            for path in temporary.iterdir():
                path.chmod(0o644)
                fsync_folder(path)  # and files
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model cannot be written to {folder} ({error})") from error
    return sorted(folder.iterdir())


def _json(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"


CHAT_INPUTS = """\
messages = [{"role": "user", "content": "What is 37 plus 85?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""
BASE_INPUTS = f"""\
inputs = tokenizer("{BOS}The capital of France is", return_tensors="pt")
"""
CHAT_NOTE = """
Between `<|python_start|>` and `<|python_end|>` the model asks for a calculator; whoever serves it must write the result
between `<|output_start|>` and `<|output_end|>`, which `generate` does not.
"""
BASE_NOTE = f"""
The model continues text, which must begin with `{BOS}`; it has learned no conversations.
"""


def model_card(name: str, config: GPTConfig, origin: str, scores: dict[str, float], *, chats: bool = True) -> str:
    """Return README.md: YAML front matter that the hub reads, how to use the model, scores.

    chats: whether it has seen conversations and the calculator, which a base model has not.
    """
    n_params = sum(rows * columns for _, (rows, columns) in tensor_table(config).values())
    rows = "".join(f"| {task} | {value:.4f} |\n" for task, value in scores.items())
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [nanochat]
---

# {name}

{n_params:,} parameters: {config.n_layer} layers, width {config.n_embd}, vocabulary {config.vocab_size:,}, context \
{config.sequence_len:,} tokens; the architecture of nanochat (Nov 2025).
{origin}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{CHAT_INPUTS if chats else BASE_INPUTS}\
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
{CHAT_NOTE if chats else BASE_NOTE}""" + (f"\n## Scores\n\n| task | score |\n|---|---|\n{rows}" if rows else "")
