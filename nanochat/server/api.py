"""The routes that need the engine: what happens between a request's body and the engine's queue."""

import asyncio
import logging
import secrets
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from nanochat.engine import Engine, SamplingParams
from nanochat.engine.request import MIN_TEMPERATURE
from nanochat.server.answers import Answer, ChatAnswer, TextAnswer
from nanochat.server.errors import ApiError
from nanochat.server.job import Job
from nanochat.server.metrics import Metrics
from nanochat.server.schemas import (
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    Health,
    Model,
    ModelList,
    Sampling,
    TextCompletion,
)
from nanochat.server.security import plain
from nanochat.server.settings import MAX_SAMPLES, Settings
from nanochat.server.transport import JobStream, or_disconnect
from nanochat.server.worker import Pool

ERRORS = {"4XX": {"model": ErrorBody}, 503: {"model": ErrorBody}}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {
    "type": "string", "description": "a chunk or an error as JSON; [DONE] at the end"}}}
STREAM = {"text/event-stream": {"itemSchema": EVENT}}

log = logging.getLogger("nanochat.server")


class Api:
    """The routes that need the engine."""

    def __init__(self, pool: Pool, settings: Settings):
        self.pool, self.settings = pool, settings
        self.metrics = Metrics(pool)
        self.started = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        app.get("/health", responses=ERRORS)(self.health)
        app.head("/health", include_in_schema=False)(self.health)
        app.get("/metrics", responses=ERRORS, response_class=PlainTextResponse)(self.show_metrics)
        app.get("/v1/models", responses=ERRORS)(self.models)
        app.get("/v1/models/{model}", responses=ERRORS)(self.model)
        for path, kind, answer in (("/v1/chat/completions", ChatCompletion, self.chat),
                                   ("/v1/completions", TextCompletion, self.complete)):
            app.post(path, response_model=None, responses={200: {"model": kind, "content": STREAM}, **ERRORS})(answer)

    @property
    def engine(self) -> Engine:
        self.pool.check_ready()
        return self.pool.engines[0]

    async def health(self) -> Health:
        """Say whether requests are served; asks for no token."""
        self.pool.check_ready()
        return Health(status="ok")

    async def show_metrics(self) -> Response:
        """Return counters and histograms as text for Prometheus."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> ModelList:
        """List the one model."""
        engine = self.engine
        return ModelList(object="list", data=[Model(
            id=self.settings.model, object="model", created=self.started, owned_by="nanochat",
            max_model_len=engine.context, tools=engine.tools, defaults=vars(self.settings.defaults))])

    async def model(self, model: str) -> Model:
        """Return the one model, when it is asked for by its name."""
        self._check_model(model)
        return (await self.models()).data[0]

    async def chat(self, body: ChatRequest, request: Request) -> Any:
        """Continue a conversation."""
        messages = [{"role": "system" if message.role == "developer" else message.role, "content": message.text}
                    for message in body.messages]
        if messages[-1]["role"] != "user":
            raise ApiError(400, f"the last message must be from the user, got {messages[-1]['role']}", "invalid_value",
                           "messages")
        tokenizer = self.engine.tokenizer
        prompt = await asyncio.to_thread(tokenizer.render_for_completion, {"messages": messages})
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await self._answer(body, request, ChatAnswer, [prompt], body.max_completion_tokens or body.max_tokens,
                                  logprobs)

    async def complete(self, body: CompletionRequest, request: Request) -> Any:
        """Continue texts, each as a document of its own, or token ids as they are."""
        tokenizer = self.engine.tokenizer
        prompts = [[tokenizer.bos_id, *await asyncio.to_thread(tokenizer.encode, prompt)]
                   if isinstance(prompt, str) else prompt for prompt in body.prompts]
        return await self._answer(body, request, TextAnswer, prompts, body.max_tokens, body.logprobs)

    async def _answer(self, body: Sampling, request: Request, kind: type[Answer], prompts: list[list[int]],
                      max_tokens: int | None, logprobs: int | None) -> Any:
        if body.model is not None:
            self._check_model(body.model)
        if len(prompts) * (body.n or 1) > MAX_SAMPLES:
            raise ApiError(400, f"prompts times n must be at most {MAX_SAMPLES}, got {len(prompts) * body.n}",
                           "invalid_value", "n")
        params = self._params(body, max(map(len, prompts)), max_tokens, logprobs)
        job = Job(prompts, params, self.settings.buffer_bytes)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        answer = kind(job, self.engine.tokenizer, self.settings.model, usage)
        stream = None
        try:
            self.pool.submit(job)
            await or_disconnect(request, self._admitted(job))
            if body.stream:
                stream = JobStream(answer.chunks(), lambda: self._close(job), self.settings)
                return stream
            return JSONResponse(await or_disconnect(request, answer.whole()))
        except ApiError as error:
            job.fail(error)
            raise
        finally:
            if stream is None:
                self._close(job)

    def _check_model(self, name: str) -> None:
        if name != self.settings.model:
            raise ApiError(404, f"model must be {self.settings.model}, got {plain(name[:60])}", "model_not_found",
                           "model")

    async def _admitted(self, job: Job) -> None:
        """Wait in the queue; raises ApiError when that takes too long."""
        try:
            await asyncio.wait_for(job.wait_admitted(), self.settings.queue_timeout)
        except TimeoutError:
            raise ApiError(503, f"the request waited {self.settings.queue_timeout:g} s for the engine: try again later",
                           "queue_timeout") from None

    def _close(self, job: Job) -> None:
        """Let go of a job that is done, failed or abandoned; count it and log it, what was said only if asked to."""
        if not job.done:
            job.fail(ApiError(499, "the client has left", "disconnected"))
        self.pool.cancel(job)
        self.metrics.observe(job)
        said = [(c.finish_reason, c.completion_tokens, *([c.text] if self.settings.log_text else []))
                for c in job.completions]
        tokenizer = self.pool.engines[0].tokenizer
        asked = [tokenizer.decode(p) if self.settings.log_text else len(p) for p in job.prompts]
        log.info("%s", plain(f"{asked} -> {said or job.error}"))

    def _params(self, body: Sampling, prompt: int, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Return how to sample, after checking that the longest prompt and its answer fit the context."""
        defaults, context = self.settings.defaults, self.engine.context
        wanted = max_tokens or max(min(defaults.max_tokens, context - prompt), 1)
        if prompt + wanted > context:
            raise ApiError(400, f"prompt and answer must fit the context of {context} tokens, got {prompt} for the "
                                f"prompt and {wanted} for the answer", "context_length_exceeded",
                           "messages" if isinstance(body, ChatRequest) else "prompt")

        def given(name: str) -> float:
            value = getattr(body, name)
            return getattr(defaults, name) if value is None else value

        temperature = given("temperature")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return SamplingParams(wanted, temperature if temperature >= MIN_TEMPERATURE else 0.0, given("top_k") or None,
                              secrets.randbelow(2**32) if body.seed is None else body.seed, body.n or 1,
                              given("top_p"), given("min_p"), tuple(stop), (), logprobs, bool(body.ignore_eos))
