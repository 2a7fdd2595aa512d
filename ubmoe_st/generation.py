"""Text in, text out: chats, padding and streaming around the `generate` of transformers."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from queue import Empty
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ubmoe_st.configuration import Routing
from ubmoe_st.transformer import UBMoETransformer

Chat = list[dict[str, str]]


def generate(
    views: UBMoETransformer,
    prompts: str | Chat | Sequence[str | Chat],
    /,
    *,
    routing: Routing | None,
    max_new_tokens: int,
    stream: bool,
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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not batch:
        return []
    config = views.ubmoe_config
    tokenizer: Any = views.tokenizer
    lm: Any = views.generator(routing or (config.routing if config else "uni"))
    inputs = _padded(views, batch, lm.device)
    arguments = {**inputs, "max_new_tokens": max_new_tokens, **generation_kwargs}
    if tokenizer.pad_token_id is not None:
        arguments.setdefault("pad_token_id", tokenizer.pad_token_id)
    if stream:
        return _stream(lm, tokenizer, arguments)
    with torch.inference_mode():
        sequences = lm.generate(**arguments)
    if not isinstance(sequences, Tensor):
        sequences = sequences.sequences
    texts = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts[0] if single and len(texts) == 1 else texts


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, dict) and "role" in message and "content" in message for message in prompt)
    )


def _padded(views: UBMoETransformer, batch: list[str | Chat], device: torch.device) -> dict[str, Tensor]:
    """Token ids and mask, (B, T), padded on the left whatever side the encoder pads on: new tokens follow."""
    tokenizer: Any = views.tokenizer
    rows = []
    for position, prompt in enumerate(batch):
        if isinstance(prompt, str):
            ids = views.token_ids(prompt)
        elif _is_chat(prompt):
            if tokenizer.chat_template is None:
                raise ValueError("this checkpoint has no chat template; give the prompt as a text")
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = views.token_ids(text, add_special_tokens=False)
        else:
            raise TypeError(
                f"the prompt at position {position} must be a text or a list of messages with 'role' and "
                f"'content', got {type(prompt).__name__}"
            )
        if not ids:
            raise ValueError(f"the prompt at position {position} is empty: there is nothing to continue")
        rows.append(ids)
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in rows], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    return {"input_ids": input_ids, "attention_mask": mask}


def _stream(lm: Any, tokenizer: Any, arguments: dict[str, Any]) -> Iterator[str]:
    stopped = threading.Event()

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=0.1, skip_special_tokens=True)
    given = arguments.pop("stopping_criteria", None) or []
    criteria = StoppingCriteriaList([*given, Abandoned()])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode():
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

    return pieces()
