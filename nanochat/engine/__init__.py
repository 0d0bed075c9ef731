"""Batched generation over a paged KV cache; the same engine serves the command line, the evaluations and RL."""

from nanochat.engine.engine import Engine
from nanochat.engine.request import Completion, Request, SamplingParams, Times

__all__ = ["Completion", "Engine", "Request", "SamplingParams", "Times"]
