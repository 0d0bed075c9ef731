"""What clients may send and what they get, checked strictly: an int is no bool and no 1.0, a number is finite.

Fields that nobody here knows are ignored. Known ones that would change the answer in a way this server cannot are
declared with the one value that asks for nothing, so that anything else is refused: an ignored `tools` or
`response_format` would be a wrong answer.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat.engine.request import MAX_LOGPROBS, MAX_SEED, MAX_STOP_CHARS, MAX_STOPS
from nanochat.server.settings import MAX_MESSAGES, MAX_SAMPLES

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
MaxTokens = Annotated[int, Field(ge=1, le=2**31)]
Nothing = Annotated[list[Any], Field(max_length=0)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A turn: an optional system message (developer is the same), then user and assistant in turns, the user last."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    include_usage: bool = False


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
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = Field(None, description="an extra, for benchmarks: go on to max_tokens")
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
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
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_SAMPLES)] | TokenIds | Annotated[
        list[TokenIds], Field(min_length=1, max_length=MAX_SAMPLES)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, one or many, as texts or as ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail
