"""Answers of both APIs: they are made of these models, and the OpenAPI document is generated from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema


class Figures(BaseModel):
    """How an answer came about; seconds by `_s`.

    Attributes:
        selection: hash of the neurons; null if all were active.
    """

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


class CachedTokens(BaseModel):
    """Tokens of the prompt that had been read before."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens, of all answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AnswerMessage(BaseModel):
    """What the model says, and the tools that it calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[dict[str, Any]] = []


class ChatChoice(BaseModel):
    """One answer to a conversation; it has figures of its own if there are several."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    ifprune: SkipJsonSchema[Figures | None] = None


class TextChoice(BaseModel):
    """One continuation; it has figures of its own if there are several."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    ifprune: SkipJsonSchema[Figures | None] = None


class ChatCompletion(BaseModel):
    """The answers to a conversation; `ifprune` is the first one's."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    ifprune: Figures


class TextCompletion(BaseModel):
    """The continuations; `ifprune` is the first one's."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    ifprune: Figures


class ModelFigures(BaseModel):
    """How large the model is, and how much of it answers by default."""

    density: float
    active_parameters: int
    total_parameters: int
    context_length: int | None


class ModelCard(BaseModel):
    """The served model, in the fields of both APIs."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: str
    ifprune: ModelFigures


class ModelList(BaseModel):
    """The models that are served: one."""

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
    """All of them."""

    tasks: list[SavedTask]


class SelectionMasks(BaseModel):
    """The neurons of a selection, for each FFN."""

    hash: str
    selector: str
    density: float
    widths: Annotated[list[int], Field(description="Neurons of each FFN.")]
    kept: Annotated[list[int], Field(description="Those of them that are kept.")]
    masks: Annotated[
        list[str],
        Field(description="Base64 of a bit for each neuron, the first in the highest bit of the first byte."),
    ]


class Health(BaseModel):
    """The server is there."""

    status: Literal["ok"]
    model: str


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


# Anthropic's.


class TokenTotal(BaseModel):
    """How many tokens a conversation has."""

    input_tokens: int


class MessageUsage(BaseModel):
    """Tokens; those of the prompt that had been read before are counted apart."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class AnswerBlock(BaseModel):
    """Text, or a call with its id, name and input."""

    type: Literal["text", "tool_use"]
    text: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}


class Message(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    ifprune: Figures


class AnthropicErrorDetail(BaseModel):
    """What is wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: AnthropicErrorDetail
