"""What clients may send and what they get, checked strictly: an int is no bool and no 1.0, a number is finite.

Fields that nobody here knows are ignored. Known ones that would change the answer in a way this server cannot are
declared with the one value that asks for nothing, so that anything else is refused: an ignored `tools` or
`response_format` would be a wrong answer.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from nanochat.engine.request import MAX_LOGPROBS, MAX_SEED, MAX_STOP_CHARS, MAX_STOPS
from nanochat.server.settings import MAX_MESSAGES, MAX_SAMPLES

UNSUPPORTED = frozenset(("tools", "functions", "tool_choice", "function_call", "response_format", "logit_bias",
                         "frequency_penalty", "presence_penalty", "repetition_penalty", "modalities", "audio",
                         "web_search_options", "best_of", "echo", "suffix"))


def _refuse_true(value: bool) -> bool:
    if value:
        raise ValueError("must be false")
    return value


def _kind(value: Any) -> str | None:
    """Return the tag of the union's member that a value is meant to be: the rules of the others are not for it."""
    return {str: "str", list: "list"}.get(type(value))


def _prompt_kind(value: Any) -> str | None:
    if type(value) is list and value:
        return {str: "list[str]", int: "list[int]", list: "list[list]"}.get(type(value[0]))
    return "list[str]" if value == [] else _kind(value)


def _chosen_by(kind: Callable[[Any], str | None], rule: str) -> Discriminator:
    return Discriminator(kind, custom_error_type="union", custom_error_message=rule)


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
MaxTokens = Annotated[int, Field(ge=1, le=2**31)]
Zero = Annotated[float, Field(ge=0, le=0)]
Off = Annotated[bool, AfterValidator(_refuse_true), Field(json_schema_extra={"const": False})]
Nothing = Annotated[list[Any], Field(max_length=0)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Stop = Annotated[
    Annotated[StopString, Tag("str")] | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("list")],
    _chosen_by(_kind, "must be a string or a list of strings")]
Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_SAMPLES), Tag("list[str]")]
    | Annotated[TokenIds, Tag("list[int]")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_SAMPLES), Tag("list[list]")],
    _chosen_by(_prompt_kind, "must be a string, or a list of strings, of token ids or of lists of token ids")]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A turn: an optional system message (developer is the same), then user and assistant in turns, the user last."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[str, Tag("str")] | Annotated[list[TextPart], Tag("list")],
                       _chosen_by(_kind, "must be a string or a list of text parts")]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampling(Body):
    """What both kinds of request share; null is the same as absent, and then the server's defaults hold."""

    model: str | None = Field(None, description="the id from /v1/models")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = Field(None, description="an extra; 0 draws among all tokens")
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="an extra")
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = Field(None, description="an extra, for benchmarks: go on to max_tokens")
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = Field(None, description="wins over max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: "PlainText | None" = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None


class PlainText(Body):
    type: Literal["text"]


class CompletionRequest(Sampling):
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Off | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, one or many, as texts or as ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


# --- answers, for /openapi.json: nanochat/server/answers.py makes them ------------------------------


class TokenLogprob(BaseModel):
    """A token; bytes are its own, as its text alone may be no UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenToken]
    refusal: None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ToolCall(BaseModel):
    """An extra: what the model asked the server's tool, and the answer, null when the tool refused."""

    input: str
    output: str | None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    tool_trace: list[ToolCall]


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TextLogprobs | None
    tool_trace: list[ToolCall]


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Timings(BaseModel):
    """An extra, in llama.cpp's names: counts of tokens, milliseconds, tokens per second."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float
    queue_ms: float
    time_to_first_token_ms: float


class Complete(BaseModel):
    """What both kinds of answer share; seed, an extra, gives the same answer again."""

    id: str
    created: int
    model: str
    usage: Usage
    seed: int
    timings: Timings


class ChatCompletion(Complete):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(Complete):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Health(BaseModel):
    status: Literal["ok"]


class Model(BaseModel):
    """The model; its context in tokens, what answers its calls, and how it samples by default are extras."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    tools: str
    defaults: dict[str, float]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail
