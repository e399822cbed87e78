"""The bodies of requests. What is not in them is refused by name; null is as good as left out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_ANSWERS = 16
MAX_NAME = 256

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=r"^[^\x00-\x1f\x7f]+$")]
SLASH = "\x1f"
"""What stands for a slash within a name while a route is found; no name has one."""
NameInPath = Annotated[str, AfterValidator(lambda name: name.replace(SLASH, "/"))]
Text = Annotated[str, Field(max_length=1 << 20)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=1 << 20)]
Weight = Annotated[float, Field(ge=-100, le=100)]


class Form(BaseModel):
    """A body of which every key is known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, found: Any) -> Any:
        return {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else found


class Steering(Form):
    """Beyond OpenAI: whose rows are mixed, by which weights, and how strongly they steer."""

    users: Annotated[dict[Name, Weight], Field(min_length=1, max_length=64)] | None = None
    strength: Weight = 1.0


class StreamOptions(Form):
    include_usage: bool = False


class JsonSchema(Form):
    """OpenAI's wrapping of a schema; `name`, `description` and `strict` change nothing: answers always meet it."""

    model_config = ConfigDict(populate_by_name=True)

    name: Annotated[str, Field(max_length=64)]
    description: Text | None = None
    given: dict[str, Any] = Field(alias="schema", default_factory=lambda: {"type": "object"})
    strict: bool = True


class ResponseFormat(Form):
    """The form of an answer. Beyond OpenAI: `regex`, whose `pattern`, in Rust's syntax, the whole answer matches."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    pattern: Annotated[str, Field(min_length=1, max_length=1 << 16)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseFormat:
        for kind, name in (("json_schema", "json_schema"), ("regex", "pattern")):
            if (self.type == kind) != (getattr(self, name) is not None):
                raise ValueError(f"{name}: expected with the type {kind}, and with no other")
        return self


class CompletionOptions(Form):
    """What both kinds of completion take. Beyond OpenAI, with vLLM's names: `top_k` to `repetition_penalty`, and
    `allowed_token_ids`."""

    model: Annotated[str, Field(max_length=1024)]
    user: Name | None = None
    steering: Steering | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    allowed_token_ids: Tokens | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Weight], Field(max_length=1024)] | None
    ) = None
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionOptions:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected with stream, got it without")
        if self.steering is not None and self.steering.users is not None and self.user is not None:
            raise ValueError("user, steering.users: expected one of them, got both")
        return self


class TextPart(Form):
    type: Literal["text"]
    text: Text


class Message(Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]

    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatForm(CompletionOptions):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _consistent_chat(self) -> ChatForm:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected with logprobs, got it without")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens, max_completion_tokens: expected one of them, got both")
        return self


class TextForm(CompletionOptions):
    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=64)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each a text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


Option = Annotated[str, Field(max_length=1 << 16)]


class ChoiceForm(Form):
    """One choice of a user: `chosen` was preferred to `rejected` as an answer to `prompt`."""

    prompt: Option = ""
    chosen: Option
    rejected: Option


class ChoicesForm(Form):
    choices: Annotated[list[ChoiceForm], Field(min_length=1, max_length=256)]


class UserForm(Form):
    name: Name
    choices: Annotated[list[ChoiceForm], Field(max_length=256)] = []


class FeedbackForm(Form):
    """Which of two completions was better. `user`: None takes the one whom both were made for."""

    better: Annotated[str, Field(max_length=256)]
    worse: Annotated[str, Field(max_length=256)]
    better_index: Annotated[int, Field(ge=0, lt=1024)] = 0
    worse_index: Annotated[int, Field(ge=0, lt=1024)] = 0
    user: Name | None = None


class QuestionForm(Form):
    """A prompt to which the user shall be shown two answers; `candidates` are sampled, and two of them chosen."""

    prompt: Annotated[str, Field(min_length=1, max_length=1 << 16)]
    candidates: Annotated[int, Field(ge=2, le=MAX_ANSWERS)] = 4
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
