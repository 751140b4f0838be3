"""The responses of both APIs. The OpenAPI document is generated from these models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema


class Figures(BaseModel):
    """How an answer was computed. `selection` is the selection's hash, null if dense. `_s` means seconds."""

    selection: str | None
    selector: str
    density: float
    overlap: float | None
    active_parameters: int | None
    total_parameters: int
    queue_s: float
    select_s: float
    switch_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    cached_tokens: int
    batch: int


class Usage(BaseModel):
    """Tokens, summed over all answers. The details count the prompt tokens that came from the cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    refusal: None
    tool_calls: list[dict[str, Any]] = []


class Choice(BaseModel):
    """One answer. It has its own `ifprune` object if there are several."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    ifprune: SkipJsonSchema[Figures | None] = None


class ChatChoice(Choice):
    message: AnswerMessage


class TextChoice(Choice):
    text: str


class Completion(BaseModel):
    """All answers; `ifprune` belongs to the first."""

    id: str
    object: str
    created: int
    model: str
    usage: Usage
    ifprune: Figures


class ChatCompletion(Completion):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextCompletion(Completion):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class AnswerBlock(BaseModel):
    """Text, thoughts with a signature, or a tool call with its id, name and input."""

    type: Literal["text", "thinking", "tool_use"]
    text: str = ""
    thinking: str = ""
    signature: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}


class MessageUsage(BaseModel):
    """Tokens. `input_tokens` leaves out the prompt tokens that came from the cache."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class Message(BaseModel):
    """An answer in Anthropic's form."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    ifprune: Figures


class TokenTotal(BaseModel):
    input_tokens: int


class ModelCard(BaseModel):
    """The served model, with the fields of both APIs. `ifprune` holds its size, its context length, and what
    selects for a request that does not say."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: str
    ifprune: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]
    has_more: bool
    first_id: str
    last_id: str


class SavedTask(BaseModel):
    """A saved selection that requests may name."""

    name: str
    shipped: bool
    selection: str
    selector: str
    density: float


class SavedTasks(BaseModel):
    tasks: list[SavedTask]


class SelectionMasks(BaseModel):
    """A selection's neurons, one list entry per FFN: width, number kept, and mask."""

    hash: str
    selector: str
    density: float
    active_parameters: int
    widths: list[int]
    kept: list[int]
    masks: Annotated[
        list[str],
        Field(description="Base64 of one bit per neuron. The first neuron is the highest bit of the first byte."),
    ]


class Health(BaseModel):
    status: Literal["ok"]
    model: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: AnthropicErrorDetail
