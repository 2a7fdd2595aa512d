"""Text in, text out: chats, padding and streaming around the `generate` of transformers."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from ubmoe_st.chat_templates import names_read
from ubmoe_st.configuration import Routing, check_count
from ubmoe_st.detokenization import IncrementalText
from ubmoe_st.generator import explained
from ubmoe_st.transformer import UBMoETransformer

Chat = list[dict[str, Any]]
Tool = dict[str, Any] | Callable[..., Any]

DEFAULT_NEW_TOKENS = 256
"""Limit where neither the call nor the generation config of the model sets one, as in the stock pipeline."""

_OF_PROMPTS = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"}

_OF_RESULTS = {"return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class ChatOptions:
    """How chats become text; see `UBMoE.generate`."""

    continue_final_message: bool | None = None
    tools: Sequence[Tool] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    @property
    def given(self) -> list[str]:
        """Names of the options that are set."""
        return [name for name, value in vars(self).items() if value is not None]


def generate(
    views: UBMoETransformer,
    prompts: str | Chat | Sequence[str | Chat],
    /,
    *,
    routing: Routing,
    max_new_tokens: int | None,
    stream: bool,
    chat: ChatOptions,
    **generation_kwargs: Any,
) -> str | list[str] | Iterator[str]:
    """Continue texts, or answer chats; see `UBMoE.generate`."""
    single = isinstance(prompts, str) or _is_chat(prompts)
    if not single and (isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable)):
        raise TypeError(
            "prompts must be a text, a list of messages with 'role' and 'content', or a list of either, got "
            f"{type(prompts).__name__}"
        )
    batch: list[str | Chat] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
    if stream and len(batch) != 1:
        raise ValueError(f"stream=True takes one prompt, got {len(batch)}")
    _check_arguments(max_new_tokens, stream, generation_kwargs)
    if not batch:
        return []
    tokenizer: Any = views.tokenizer
    lm: Any = views.generator(routing)
    inputs = _padded(views, batch, chat, lm.device)
    arguments = {**inputs, **_settled(lm, tokenizer, max_new_tokens, generation_kwargs)}
    if stream:
        several = _number_of_texts(lm, arguments)
        if several != 1:
            raise ValueError(f"stream=True gives one text, got num_return_sequences={several}")
        return _stream(lm, tokenizer, arguments)
    with torch.inference_mode(), explained(lm):
        sequences = lm.generate(**arguments)
    if not isinstance(sequences, Tensor):
        sequences = sequences.sequences
    texts = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts[0] if single and len(texts) == 1 else texts


def _check_arguments(max_new_tokens: object, stream: bool, generation_kwargs: Mapping[str, Any]) -> None:
    if max_new_tokens is not None:
        check_count("max_new_tokens", max_new_tokens, wanted="a whole number or None")
    taken = sorted(_OF_PROMPTS & generation_kwargs.keys())
    if taken:
        raise ValueError(
            f"{taken[0]} is made of the prompts here; where you have it already, call `model.generator.generate(...)`, "
            "the stock method"
        )
    asked = sorted(name for name in _OF_RESULTS & generation_kwargs.keys() if generation_kwargs[name])
    if asked:
        raise ValueError(f"{asked[0]}: texts come back here; call `model.generator.generate(...)`, the stock method")
    if stream and generation_kwargs.get("streamer") is not None:
        raise ValueError("stream=True has a streamer of its own; give one of the two")


def _settled(
    lm: Any, tokenizer: Any, max_new_tokens: int | None, generation_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `generate` with a limit, a pad token and a tokenizer where the caller leaves them open.

    A limit of the call goes before one of its `generation_config`, this before one of the model's, and our own comes
    last: a default `max_new_tokens` would also beat a `max_length` that somebody did set.
    """
    arguments = dict(generation_kwargs)
    config: GenerationConfig | None = arguments.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a transformers GenerationConfig, got {type(config).__name__}")
    of_call = {} if config is None else config.to_diff_dict()
    of_model = lm.generation_config.to_diff_dict()
    added: dict[str, Any] = {}
    if max_new_tokens is not None:
        added["max_new_tokens"] = max_new_tokens
    elif arguments.get("max_length") is not None:
        added["max_new_tokens"] = None
    elif all(name not in known for known in (of_call, of_model) for name in ("max_new_tokens", "max_length")):
        added["max_new_tokens"] = DEFAULT_NEW_TOKENS
    if tokenizer.pad_token_id is not None and "pad_token_id" not in {**of_call, **arguments}:
        added["pad_token_id"] = tokenizer.pad_token_id
    if any("stop_strings" in known for known in (of_call, of_model, arguments)):
        # A copy: transformers tokenises with it outside our lock, which would change the padding of other threads.
        arguments.setdefault("tokenizer", copy.deepcopy(tokenizer))
    if config is None or arguments.get("max_length") is not None:
        return {**arguments, **added}
    # Into a copy: transformers deprecates keyword arguments beside a `generation_config`.
    config = copy.deepcopy(config)
    config.update(**added)
    return {**arguments, "generation_config": config}


def _number_of_texts(lm: Any, arguments: Mapping[str, Any]) -> int:
    """Texts of one prompt that `generate` gives for such arguments."""
    configs = (arguments.get("generation_config"), lm.generation_config)
    given = [
        arguments.get("num_return_sequences"),
        *(getattr(config, "num_return_sequences", None) for config in configs),
    ]
    return next((number for number in given if number is not None), 1)


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(
            # A call of a tool says nothing beside it.
            isinstance(message, dict) and "role" in message and ("content" in message or "tool_calls" in message)
            for message in prompt
        )
    )


def _padded(
    views: UBMoETransformer, batch: list[str | Chat], chat: ChatOptions, device: torch.device
) -> dict[str, Tensor]:
    """Token ids and mask, (B, T), padded on the left whatever side the encoder pads on: new tokens follow."""
    tokenizer: Any = views.tokenizer
    if chat.given and all(isinstance(prompt, str) for prompt in batch):
        raise ValueError(f"{', '.join(chat.given)}: of use for chats alone, and every prompt is a text")
    rows = []
    for position, prompt in enumerate(batch):
        if isinstance(prompt, str):
            ids = views.token_ids(prompt)
        elif _is_chat(prompt):
            ids = views.token_ids(chat_text(tokenizer, prompt, chat), add_special_tokens=False)
        else:
            raise TypeError(
                f"the prompt at position {position} must be a text or a list of messages with 'role' and "
                f"'content', got {type(prompt).__name__}"
            )
        if not ids:
            raise ValueError(f"the prompt at position {position} is empty: there is nothing to continue")
        rows.append(ids)
    length = max(map(len, rows))
    longest = getattr(views.model.config, "max_position_embeddings", None)
    if longest and length > longest:
        warnings.warn(
            f"the prompt at position {max(range(len(rows)), key=lambda row: len(rows[row]))} has {length} tokens, and "
            f"the base was made for {longest}: what it generates may have no sense, as that of the base",
            stacklevel=4,
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in rows], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    return {"input_ids": input_ids, "attention_mask": mask}


def chat_text(tokenizer: Any, chat: Chat, options: ChatOptions) -> str:
    """A chat as the text to continue: a last turn of the assistant is left open, after any other turn a new one begins.

    Args:
        tokenizer: With a chat template.
        chat: Messages with `role` and `content`: a text, or a list of parts `{"type": "text", "text": ...}`.
        options: See `UBMoE.generate`.

    Raises:
        ValueError: If there is no template, a part is no text, or the template does not take the chat.
    """
    if tokenizer.chat_template is None:
        raise ValueError("this checkpoint has no chat template; give the prompt as a text")
    further = dict(options.chat_template_kwargs or {})
    taken = sorted(further.keys() & {"tools", "continue_final_message", "add_generation_prompt", "tokenize"})
    if taken:
        raise ValueError(f"chat_template_kwargs holds {taken[0]!r}, which is no variable of the template; see generate")
    continued = options.continue_final_message
    if continued is None:
        continued = chat[-1]["role"] == "assistant"
    try:
        if options.tools or further:
            _tell_unread(tokenizer, options.tools, further)
        return tokenizer.apply_chat_template(
            _with_readable_parts(tokenizer, chat),
            tokenize=False,
            tools=None if options.tools is None else list(options.tools),
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **further,
        )
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"tools: {error}") from error
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template of this checkpoint does not take the chat: {error}") from error


def _tell_unread(tokenizer: Any, tools: Any, further: Mapping[str, Any]) -> None:
    """Say what a chat template does not read: the model would not be told of it.

    Raises:
        ValueError: If it does not read tools, and there are some.
    """
    read = names_read(tokenizer.get_chat_template(further.get("chat_template"), tools))
    if tools and "tools" not in read:
        raise ValueError(
            "the chat template of this checkpoint does not read tools, so the model would not be told of them: say in "
            "a system message what they are, or take a base that was trained to call some"
        )
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters
    unread = sorted(further.keys() - read - arguments.keys())
    if unread:
        warnings.warn(
            f"chat_template_kwargs: the chat template of this checkpoint does not read {', '.join(unread)}",
            stacklevel=6,
        )


def _with_readable_parts(tokenizer: Any, chat: Chat) -> Chat:
    """The chat as the template reads it: parts stay parts where it knows them, else their texts are joined."""
    if all(isinstance(message.get("content"), str | None) for message in chat):
        return chat
    for position, message in enumerate(chat):
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else []:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(
                    f"message {position} has a part of type {kind!r}: this model reads text alone; give parts as "
                    "{'type': 'text', 'text': ...}"
                )
    if _reads_parts(tokenizer):
        return chat
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), (list, tuple))
        else message
        for message in chat
    ]


def _reads_parts(tokenizer: Any) -> bool:
    word = "probe"
    probe = [{"role": "user", "content": [{"type": "text", "text": word}]}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except (TemplateError, TypeError):
        return False
    # A template that knows texts alone may also print the list as it stands, with its keys.
    return word in text and not any(f"{quote}type{quote}" in text for quote in "'\"")


class _Pieces(TextIteratorStreamer):
    """The stock iterator, whose pieces joined are the text that is not streamed.

    The stock one forgets what stands before a line: tokenizers that strip a space of a text's beginning, as that of
    Llama 2, then strip one of every line.
    """

    def __init__(self, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self._text = IncrementalText(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))

    def put(self, value: Tensor) -> None:
        """Take the prompt, once, then tokens of one sequence."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.on_finalized_text("".join(self._text.push(token) for token in value.reshape(-1).tolist()))

    def end(self) -> None:
        """Give what was held back."""
        self.next_tokens_are_prompt = True
        self.on_finalized_text(self._text.rest(), stream_end=True)


def _stream(lm: Any, tokenizer: Any, arguments: dict[str, Any]) -> Iterator[str]:
    stopped = threading.Event()

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

    kind = lm.device.type
    autocast: dict[str, Any] = {
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
    }  # of this thread
    streamer = _Pieces(tokenizer, timeout=0.1)
    given = arguments.pop("stopping_criteria", None) or []
    criteria = StoppingCriteriaList([*given, Abandoned()])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode(), torch.autocast(kind, **autocast), explained(lm):
                lm.generate(**arguments, streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)

    def pieces() -> Iterator[str]:
        thread.start()
        try:
            while True:
                try:
                    piece = next(streamer)
                except Empty:
                    continue
                except StopIteration:
                    break
                if piece:
                    yield piece
            thread.join()
            if failure:
                raise failure[0]
        finally:
            stopped.set()
            # Joined, so that nothing computes or draws random numbers after the stream is closed. Not by the thread
            # itself, whose garbage collection may close it, nor at exit, where a daemon never ends.
            if thread is not threading.current_thread() and not sys.is_finalizing():
                thread.join()

    return pieces()
