"""Answers of both APIs: they are made of these models, and the OpenAPI document is generated from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema


class Figures(BaseModel):
    """How an answer came about. `selection` is the hash of the neurons, null if all were active; `_s` are seconds."""

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
    """Tokens, of all answers together; the details say how many of the prompt had been read before."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[dict[str, Any]] = []


class Choice(BaseModel):
    """One answer; it has figures of its own if there are several."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    ifprune: SkipJsonSchema[Figures | None] = None


class ChatChoice(Choice):
    message: AnswerMessage


class TextChoice(Choice):
    text: str


class Completion(BaseModel):
    """All answers; `ifprune` is the first one's."""

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
    """Text, or a call with its id, name and input."""

    type: Literal["text", "tool_use"]
    text: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}


class MessageUsage(BaseModel):
    """Tokens; those of the prompt that had been read before are counted apart."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class Message(BaseModel):
    """Anthropic's form of an answer."""

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
    """The served model, with the fields of both APIs; `ifprune` says how large it is, and how much of it answers."""

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
    """The neurons of a selection, for each FFN: how many there are, how many of them are kept, and which."""

    hash: str
    selector: str
    density: float
    active_parameters: int
    widths: list[int]
    kept: list[int]
    masks: Annotated[
        list[str],
        Field(description="Base64 of a bit for each neuron, the first in the highest bit of the first byte."),
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
