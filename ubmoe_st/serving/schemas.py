"""What requests hold, field by field. A field nobody here knows is refused, not passed over."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

T = TypeVar("T")
_UNKNOWN = 4
"""Fields that nobody knows of which a refusal speaks; a body may hold thousands."""


class NotHere(ValueError):
    """A field that asks for what this server does not do.

    Args:
        param: The field.
        value: What it asks for.
    """

    def __init__(self, param: str, value: Any) -> None:
        super().__init__(f"{param} is not supported here: leave it out, got {reprlib.repr(value)}")
        self.param = param


def _few_unknown(cls: type[BaseModel], values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    left = _UNKNOWN
    for name, value in values.items():
        left -= name not in cls.model_fields
        if name in cls.model_fields or left >= 0:
            yield name, value


def _whole_characters(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text holds half a character, a lone surrogate") from error
    return text


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, got a truth value")
    return value


Text = Annotated[str, Field(strict=True), AfterValidator(_whole_characters)]
Whole = Annotated[int, BeforeValidator(_no_truth_value)]
Number = Annotated[float, BeforeValidator(_no_truth_value)]
# A list is refused for the first thing in it that is wrong: else a body of a megabyte makes a million errors.
Many = Annotated[list[T], Field(fail_fast=True)]
TokenList = Annotated[Many[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
InputType = Literal["query", "document"]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),  # 0 asks a completion for those of its own tokens
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "rank_fields": (["text"],),
    "max_tokens_per_doc": (),
    "max_chunks_per_doc": (),
}
"""Fields of the protocol for what this server does not do, with the values that ask for nothing."""
_PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "priority"}
"""Fields that say something of the client and change no answer."""
_SAID_OF_ANSWERS = {"refusal", "annotations", "audio", "function_call", "tool_calls"}
"""Fields of a message that an answer may have had, and that come back with it, empty."""


class Request(BaseModel):
    """A request; unknown fields are errors, and null is as good as no field."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = Field(None, description="Not needed: there is one model. Another name than its own is refused.")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if value is None:  # as clients write what is not asked for
                continue
            if name in _PASSED_OVER and name not in cls.model_fields:
                continue
            if name in _NEUTRAL and name not in cls.model_fields:
                neutral = [one for one in _NEUTRAL[name] if isinstance(one, bool) is isinstance(value, bool)]
                if value not in neutral:
                    raise NotHere(name, value)
                continue
            kept[name] = value
        return dict(_few_unknown(cls, kept))


class _Part(BaseModel):
    """A part of a request; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_few_unknown(cls, values: Any) -> Any:
        return dict(_few_unknown(cls, values)) if isinstance(values, dict) else values


class EmbeddingRequest(Request):
    """`POST /v1/embeddings`."""

    input: Text | Many[Text] | TokenList | Many[TokenList] = Field(
        description="A text, texts, or token ids of this model's tokenizer (prompt and special tokens included)."
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = Field(
        None, ge=1, description="Keep the first dimensions; the vectors stay unit vectors."
    )
    input_type: InputType | None = Field(None, description="Puts the checkpoint's prompt for it before each text.")
    prompt_name: str | None = Field(None, description="Any prompt of the checkpoint by its name.")
    task: Literal["classification"] | None = Field(
        None, description="Vectors for classifiers, of a length of their own, where the checkpoint has a head for them."
    )
    truncate: bool = Field(False, description="Cut a text that is too long, instead of refusing it.")


class StreamOptions(_Part):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Request):
    """What chats and completions have in common."""

    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1, description="The newer name of max_tokens; goes before it.")
    temperature: Number | None = Field(
        None, ge=0, le=10, description="0: greedy. None: as the base model's config says."
    )
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=0, description="0: all tokens.")
    seed: Whole | None = None
    stop: Text | Annotated[Many[Text], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """Texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ContentPart(_Part):
    """A part of a message; only text."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Part):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Many[ContentPart]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value or name not in _SAID_OF_ANSWERS}

    def plain(self) -> dict[str, str]:
        """As chat templates take it; a name is there for those that read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Many[ChatMessage] = Field(min_length=1)


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Text | Many[Text] | TokenList | Many[TokenList] = Field(description="Text or token ids, or a list of them.")


class RerankDocument(BaseModel):
    """A document as an object; its text is read, what else it has comes back with it."""

    model_config = ConfigDict(extra="allow")
    text: Text

    @model_validator(mode="after")
    def _comes_back(self) -> RerankDocument:
        """Refuse what JSON cannot give back."""
        _whole_characters(json.dumps(self.model_extra, ensure_ascii=False, allow_nan=False))
        return self


class RerankRequest(Request):
    """`POST /v1/rerank`."""

    query: Text
    documents: Many[Text | RerankDocument] = Field(min_length=1)
    top_n: Whole | None = Field(None, ge=1, description="Best documents to return. None: all.")
    return_documents: bool = Field(False, description="Also return the text of each.")
    method: Literal["likelihood", "yes_no"] = Field(
        "likelihood",
        description="likelihood: how well the base model foresees the query after the document. yes_no: whether it "
        "says that the document answers the query; for bases that were tuned to chats.",
    )
    truncate: bool = Field(
        False,
        validation_alias=AliasChoices("truncate", "truncation"),
        description="Read the beginning of a document that is too long; else it is refused.",
    )

    @property
    def texts(self) -> list[str]:
        """The documents."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class SearchRequest(Request):
    """`POST /v1/search`."""

    query: Text = Field(min_length=1)
    k: Whole = Field(10, ge=1, le=1000)
    filter: dict[str, Any] | None = Field(None, description='Of the metadata, e.g. {"year": {">=": 1990}}.')
    mode: Literal["dense", "bm25", "hybrid"] = "dense"
    truncate: bool = Field(False, description="Search with the beginning of a query that is too long to embed.")


class AskRequest(GenerationRequest):
    """`POST /v1/ask`."""

    question: Text = Field(min_length=1)
    k: Whole = Field(3, ge=1, le=20, description="Entries to answer from.")
    filter: dict[str, Any] | None = None
    truncate: bool = Field(False, description="Search with the beginning of a question that is too long to embed.")
