"""What a request may say: OpenAI's field names, strict types, and the bounds of every number in one table.

Nothing is coerced and nothing is ignored. A field that is not supported is accepted only with the value that changes
nothing, because official clients send some of those; any other value is refused by name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.sampling import Sampling

# The bounds of every field.
MaxTokens = Annotated[int, Field(ge=1, le=1 << 20)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=1 << 20)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
User = Annotated[str, Field(max_length=512)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Repetition = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Texts = Annotated[int, Field(ge=1, le=16)]
Pattern = Annotated[str, Field(min_length=1, max_length=64 << 10)]
STOPS: Final = 4
MESSAGES: Final = 4096
BIASES: Final = 1024
CHOICES: Final = 1024

# Fields that are not supported, with the values that mean "leave it off".
NEUTRAL_COMPLETION: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None,),
}
NEUTRAL_CHAT: Final[dict[str, tuple[Any, ...]]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none"),
    "tools": (None, []),
}
NEUTRAL_MESSAGE: Final[dict[str, tuple[Any, ...]]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _one_prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return value
    if isinstance(value, list) and all(isinstance(item, str | list) for item in value):
        raise PydanticCustomError("value_prompts", "one prompt a request: send a string or a list of token ids")
    raise PydanticCustomError("prompt_type", "Input should be a string, a list of one string, or a list of token ids")


Stops = Annotated[list[StopText], Field(max_length=STOPS), BeforeValidator(_listed)]


class Strict(BaseModel):
    """Unknown fields are refused, and nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Strict):
    include_usage: bool | None = None


class _JsonSchema(Strict):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's: text, any JSON object, or an object of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise PydanticCustomError("response_format", "json_schema belongs to the type json_schema, and to no other")
        return self


class StructuredOutputs(Strict):
    """vLLM's: exactly one of these."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Pattern | None = None
    grammar: Pattern | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=CHOICES)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if len(self.wanted()) != 1:
            raise PydanticCustomError("structured_outputs", "give exactly one of json, regex, grammar and choice")
        return self

    def wanted(self) -> dict[str, Any]:
        found = {"json": self.json_, "regex": self.regex, "grammar": self.grammar, "choice": self.choice}
        return {name: value for name, value in found.items() if value is not None}


class _Request(Strict):
    model: ModelName
    n: Texts | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=BIASES)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is only for stream: true")
        return self

    @model_validator(mode="after")
    def _one_shape(self) -> "_Request":
        if self.structured_outputs is not None and self.response_format is not None:
            raise PydanticCustomError("structured_outputs", "give response_format or structured_outputs, not both")
        return self

    @property
    def texts(self) -> int:
        return self.n or 1

    @property
    def shape(self) -> tuple[str, dict[str, Any]] | None:
        """The field that says what answers must look like, and what it says as `Grammars.compile` takes it."""
        if self.structured_outputs is not None:
            return "structured_outputs", self.structured_outputs.wanted()
        if self.response_format is None or self.response_format.type == "text":
            return None
        schema = self.response_format.json_schema
        return "response_format", {"json": {"type": "object"} if schema is None else schema.schema_}

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            logprobs=logprobs,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=tuple(self.stop or ()),
        )


class CompletionRequest(_Request):
    """`max_tokens` is 16 unless given, as OpenAI has it."""

    prompt: Annotated[Any, PlainValidator(_one_prompt)]
    max_tokens: MaxTokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def sampling(self) -> Sampling:
        return self._sampling(16 if self.max_tokens is None else self.max_tokens, self.logprobs)


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """`max_tokens` is what the context leaves unless given; `max_completion_tokens` is its newer name."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs is only for logprobs: true")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens disagree")
        return self

    def sampling(self) -> Sampling:
        length = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self._sampling(length, (self.top_logprobs or 0) if self.logprobs else None)


_Model = TypeVar("_Model", bound=Strict)


def read_completion(body: Any) -> CompletionRequest:
    """Check the body of a completion request; raises Refused, naming the field."""
    return _validated(CompletionRequest, _without_neutral(_table(body), NEUTRAL_COMPLETION))


def read_chat(body: Any) -> ChatRequest:
    """Check the body of a chat request; raises Refused, naming the field."""
    table = _without_neutral(_table(body), NEUTRAL_CHAT)
    messages = table.get("messages")
    if isinstance(messages, list):
        table["messages"] = [
            _without_neutral(message, NEUTRAL_MESSAGE, f"messages[{index}].") if isinstance(message, dict) else message
            for index, message in enumerate(messages)
        ]
    return _validated(ChatRequest, table)


def read_body(model: type[_Model], body: Any) -> _Model:
    """Check the body of a request of another kind; raises Refused, naming the field."""
    return _validated(model, _table(body))


def _table(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise Refused("the request body is not a JSON object", field="body", reason="invalid_type")
    return body


def _without_neutral(
    body: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], prefix: str = ""
) -> dict[str, Any]:
    kept = {}
    for name, value in body.items():
        if name not in neutral:
            kept[name] = value
        elif not any(_same(value, allowed) for allowed in neutral[name]):
            raise Refused(f"{prefix}{name} is not supported by this server", field=prefix + name, reason="unsupported")
    return kept


def _same(value: Any, allowed: Any) -> bool:
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)


def _validated(model: type[_Model], body: dict[str, Any]) -> _Model:
    try:
        return model.model_validate(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    kind = first["type"]
    # errors of a whole request have no place; ours are named for the field to change
    field = _field(first["loc"]) or (kind if kind in model.model_fields else "body")
    if kind == "missing":
        raise Refused(f"{field} is missing", field=field, reason="missing_required_parameter")
    if kind == "extra_forbidden":
        raise Refused(f"unknown field {field!r}", field=field, reason="unknown_parameter")
    reason = "invalid_type" if kind.endswith("_type") else "invalid_value"
    raise Refused(f"{field}: {first['msg']}", field=field, reason=reason)


def _field(path: tuple[int | str, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:100]}" if text else part[:100]
    return text
