"""Any causal language model of the transformers library as a scorer: what checks our evaluator against other models."""

from collections.abc import Sequence

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.evals.scoring import DenseScorer

DEFAULT_CONTEXT = 2048  # where a model's configuration names none


class HuggingFaceTokenizer:
    """What the evaluation needs of a tokenizer, on one of transformers: bos_id and encode_batch."""

    def __init__(self, tokenizer, path: str):
        self._tokenizer = tokenizer
        self.bos_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if self.bos_id is None:
            raise UserError(f"--hf-path {path} must have a tokenizer with a beginning- or end-of-text token, "
                            "it has neither")

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int64 (total,) and offsets (len(texts) + 1,), no special tokens added."""
        ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return np.array([token for own in ids for token in own], np.int64), np.cumsum([0, *map(len, ids)])


def load_huggingface(path: str, device: torch.device, dtype: torch.dtype) -> tuple[DenseScorer, HuggingFaceTokenizer]:
    """Load a model and its tokenizer from a folder or a repository of the hub; weights from safetensors alone, no code
    that comes with them. UserError when that cannot be done."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(f"--hf-path {path} needs the package transformers, which is not installed "
                        "(bash scripts/setup.sh --tests installs it)") from None
    try:
        tokenizer = HuggingFaceTokenizer(AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--hf-path {path} must be a model of transformers with safetensors and a tokenizer: "
                        f"{reason}") from error
    model = model.to(device, dtype).eval()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
    return DenseScorer(lambda x: model(input_ids=x, use_cache=False).logits, device, context,
                       tokenizer.bos_id), tokenizer
