"""The requests of both APIs. pydantic checks them, and the OpenAPI document is generated from them.

Types are strict: true and "1" are not numbers. null means that a field is left out, and unknown fields are ignored.
Lists stop at their first error, so that a body full of errors costs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from fastapi import Depends, Header
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema, WithJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_STOPS, MAX_STOP_LENGTH, MAX_TOKENS, MAX_LOGPROBS = 16, 1000, 2**31, 20


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, or above `low`; the error names both bounds."""

    low: float
    high: float
    above: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        make: Any = core_schema.int_schema if source is int else core_schema.float_schema
        numbers = make(le=self.high, **{"gt" if self.above else "ge": self.low})
        message = "must be above {low} and at most {high}" if self.above else "must be from {low} to {high}"
        bounded = core_schema.custom_error_schema(
            numbers,
            custom_error_type="out_of_range",
            custom_error_message=message,
            custom_error_context={"low": self.low, "high": self.high},
        )
        return core_schema.chain_schema([handler(source), bounded])

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        typed = handler(schema["steps"][0])
        return {**typed, "exclusiveMinimum" if self.above else "minimum": self.low, "maximum": self.high}


def _only(*allowed: Any, reason: str) -> AfterValidator:
    """Refuse all values but these; `reason` says what to do instead."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise PydanticCustomError("unsupported_parameter", "{reason}", {"reason": reason})
        return value

    return AfterValidator(check)


def _unsupported(advice: str) -> AfterValidator:
    """Refuse a field that cannot be ignored, unless it is empty or false."""
    return _only(None, False, "", [], {}, reason=f"is not supported; {advice}")


class Schema(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
Density = Annotated[float, Range(0, 1, above=True)]
Policy = Literal["first", "turn", "auto", "system"]
Name = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[Items[StopString], Field(max_length=MAX_STOPS)]
TokenCount = Annotated[int, Range(1, MAX_TOKENS)]
# `Service.requests` checks the keys, as they depend on the vocabulary.
_BIAS = {"type": "number", "minimum": -100, "maximum": 100}
LogitBias = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}, "additionalProperties": _BIAS}),
]


class SelectionOptions(Schema):
    """The neurons that compute a request; null takes the default. `task` names a saved selection.

    What it does not know is refused, unlike in a client's body: a misspelt name would be an experiment gone wrong.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    task: str | None = None
    selector: Literal["learned", "activation", "static", "random"] | None = None
    dense: bool | None = None
    density: Density | None = None
    active_parameters: Annotated[int, Range(1, 2**53)] | None = None
    policy: Policy | None = None  # see `SelectionParams`


async def selection_headers(
    task: Annotated[str | None, Header(alias="x-ifprune-task")] = None,
    density: Annotated[Density | None, Header(alias="x-ifprune-density")] = None,
    policy: Annotated[Policy | None, Header(alias="x-ifprune-policy")] = None,
) -> SelectionOptions:
    """Read the headers; the body's `ifprune` object overrides them."""
    return SelectionOptions(task=task, density=density, policy=policy)


HeaderOptions = Annotated[SelectionOptions, Depends(selection_headers)]


class GenerationRequest(Schema):
    """The fields that all requests for an answer share."""

    model: str | None = None
    ifprune: SelectionOptions | None = None
    stream: bool | None = None
    temperature: Annotated[float, Range(0, 2)] | None = None
    top_p: Annotated[float, Range(0, 1, above=True)] | None = None
    top_k: Annotated[int, Range(0, 2**31)] | None = None
    min_p: Annotated[float, Range(0, 1)] | None = None
    repetition_penalty: Annotated[float, Range(0, 10, above=True)] | None = None
    presence_penalty: Annotated[float, Range(-2, 2)] | None = None
    frequency_penalty: Annotated[float, Range(-2, 2)] | None = None
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] | None = None
    logit_bias: LogitBias | None = None
    draft_model: SkipJsonSchema[Annotated[Any, _unsupported("leave it out")]] = None


class StreamOptions(Schema):
    include_usage: bool | None = None


class JsonFormat(Schema):
    """A JSON schema that answers satisfy; `strict` makes no difference."""

    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonFormat | None = None
    own_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None  # where llama.cpp's clients put it


class CompletionRequest(GenerationRequest):
    """The fields that both of OpenAI's completion APIs share."""

    n: TokenCount | None = None
    stop: StopString | StopStrings | None = None
    max_tokens: TokenCount | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ThinkingSwitch(Schema):
    """Whether the model thinks before it answers; `adaptive` leaves it to the model."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: TokenCount | None = None  # the most tokens of thoughts

    @property
    def enabled(self) -> bool | None:
        """Whether it thinks; None leaves it to the model."""
        return {"enabled": True, "disabled": False}.get(self.type)


class TextPart(Schema):
    type: Literal["text"]
    text: str


class OtherBlock(Schema):
    """A part of a message that this model cannot read; a line of text stands for it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    type: Name


class RefusalPart(Schema):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The refusal."""
        return self.refusal


def _by_type(*known: str) -> Discriminator:
    """Tells blocks apart by their type; those of other types, and what has none, are `OtherBlock`."""

    def tag(block: Any) -> str:
        kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
        return kind if kind in known else "other"

    return Discriminator(tag)


_Text: TypeAlias = Annotated[TextPart, Tag("text")]
_Other: TypeAlias = Annotated[OtherBlock, Tag("other")]
ChatContent = str | Items[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]
# What was said before may hold what only other models read: refusing it would end the conversation.
PastContent = (
    str | Items[Annotated[_Text | Annotated[RefusalPart, Tag("refusal")] | _Other, _by_type("text", "refusal")]]
)


class CalledFunction(Schema):
    name: str
    arguments: Any = None  # the JSON text of an object; models and clients also write other text, or the object


class MadeCall(Schema):
    id: str | None = None
    type: str | None = None
    function: CalledFunction


class InputMessage(Schema):
    role: Literal["system", "developer", "user"]
    content: ChatContent


class AssistantMessage(Schema):
    """An earlier answer: text, calls or both, and what was thought before."""

    role: Literal["assistant"]
    content: PastContent | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: Items[MadeCall] | None = None
    function_call: CalledFunction | None = None  # a call in OpenAI's first form


class ToolMessage(Schema):
    role: Literal["tool"]
    content: PastContent | None = None
    tool_call_id: str


class FunctionMessage(Schema):
    """The result of a `function_call`."""

    role: Literal["function"]
    content: PastContent | None = None
    name: str


ChatMessage = Annotated[InputMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")]


class Function(Schema):
    """A function that the model may call. The chat template gets all fields, also unknown ones."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # the arguments of every call satisfy `parameters`


class Tool(Schema):
    type: Literal["function"]
    function: Function


class NamedFunction(Schema):
    name: str


class ToolChoice(Schema):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(CompletionRequest):
    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Annotated[str, Field(min_length=1, max_length=20)] | None = None
    thinking: ThinkingSwitch | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # more variables of the chat template
    functions: SkipJsonSchema[Annotated[Any, _unsupported("use tools")]] = None
    function_call: SkipJsonSchema[Annotated[Any, _unsupported("use tool_choice")]] = None


_TOKEN_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPTS = [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}, _TOKEN_IDS]


class TextRequest(CompletionRequest):
    """Texts to continue: one, several, or their token ids."""

    # `openai` checks the ids, as they depend on the vocabulary.
    prompt: Annotated[
        Any, WithJsonSchema({"anyOf": [*_PROMPTS, {"type": "array", "minItems": 1, "items": _TOKEN_IDS}]})
    ]
    logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None
    best_of: TokenCount | None = None
    suffix: SkipJsonSchema[Annotated[Any, _unsupported("ask for it in the prompt")]] = None
    echo: SkipJsonSchema[Annotated[Any, _unsupported("put the prompt before the text")]] = None


# Anthropic's.

TextContent = str | Items[Annotated[_Text | _Other, _by_type("text")]]


class ToolUse(Schema):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Any = None  # an object


class ToolResult(Schema):
    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent | None = None
    is_error: bool | None = None


class ThinkingBlock(Schema):
    type: Literal["thinking"]
    thinking: str | None = None


_UserBlock = Annotated[_Text | Annotated[ToolResult, Tag("tool_result")] | _Other, _by_type("text", "tool_result")]
_AssistantBlock = Annotated[
    _Text | Annotated[ToolUse, Tag("tool_use")] | Annotated[ThinkingBlock, Tag("thinking")] | _Other,
    _by_type("text", "tool_use", "thinking"),
]


class SystemMessage(Schema):
    role: Literal["system"]
    content: TextContent


class UserMessage(Schema):
    role: Literal["user"]
    content: str | Items[_UserBlock]


class AssistantTurn(Schema):
    """An earlier answer. As the last message, it is the beginning of the new answer."""

    role: Literal["assistant"]
    content: str | Items[_AssistantBlock]


class ClientTool(Schema):
    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None  # the input of every call satisfies it


def _tool_tag(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "custom" if kind in (None, "custom") else "other"


# Tools of other types run on Anthropic's servers, or are known to Anthropic's models alone.
OfferedTool = Annotated[Annotated[ClientTool, Tag("custom")] | _Other, Discriminator(_tool_tag)]


class ToolSelection(Schema):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Schema):
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Schema):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountRequest(Schema):
    model: str | None = None
    messages: Annotated[
        Items[Annotated[SystemMessage | UserMessage | AssistantTurn, Field(discriminator="role")]], Field(min_length=1)
    ]
    system: TextContent | None = None
    tools: Items[OfferedTool] | None = None
    tool_choice: ToolSelection | None = None
    thinking: ThinkingSwitch | None = None
    output_config: OutputConfig | None = None
    mcp_servers: list[Any] | None = None


class MessagesRequest(CountRequest, GenerationRequest):
    max_tokens: TokenCount
    stop_sequences: StopStrings | None = None
    output_format: OutputFormat | None = None  # its name before
