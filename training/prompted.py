"""A causal decoder asked with a prompt around each text: the teacher of training, and a peer of the benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def special_start(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts in front of every text (`<bos>` of Gemma); none for many."""
    found = tokenizer("a", return_special_tokens_mask=True)
    end = next((n for n, special in enumerate(found["special_tokens_mask"]) if not special), 0)
    return list(found["input_ids"][:end])


class PromptedReader:
    """Hidden states of `prefix + text + suffix` at the last token of each.

    The prefix is the same for every text, so its keys and values are computed once. It begins with what the tokenizer
    puts before every text.

    Args:
        model: Decoder without its head, causal.
        tokenizer: Its tokenizer.
        prefix: Text before each text.
        suffix: Text after it.
        max_tokens: Longest text with suffix, tokens; longer texts lose their end, never the suffix. None: no limit.
    """

    def __init__(self, model: Any, tokenizer: Any, prefix: str, suffix: str, max_tokens: int | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.suffix = suffix
        self.max_tokens = max_tokens
        self._cache: Any = None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with the suffix."""
        rows = [self._ids(text + self.suffix) for text in texts]
        if self.max_tokens is None:
            return rows
        tail = self._ids(self.suffix)
        return [r if len(r) <= self.max_tokens else r[: self.max_tokens - len(tail)] + tail for r in rows]

    def states(self, rows: Sequence[Sequence[int]], layers: Sequence[int] | None = None) -> Tensor:
        """Hidden states at the last token of each row.

        Args:
            rows: B rows from `tokens`.
            layers: Numbers of the hidden states (0 is the embedding). None: the model's output alone.

        Returns:
            (B, layers, D), in the type of the model.
        """
        device = self.model.device
        if self._cache is None and (ids := special_start(self.tokenizer) + self._ids(self.prefix)):
            self._cache = self.model(torch.tensor([ids], device=device), use_cache=True).past_key_values
        # Padding on the right of a causal model reaches no real token: no mask is needed.
        input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for position, row in enumerate(rows):
            input_ids[position, : len(row)] = torch.tensor(row)
        cache = copy.deepcopy(self._cache)
        if cache is not None:
            cache.batch_repeat_interleave(len(rows))
        found = self.model(
            input_ids.to(device), past_key_values=cache, use_cache=True, output_hidden_states=layers is not None
        )
        picked = [found.last_hidden_state] if layers is None else [found.hidden_states[n] for n in layers]
        each = torch.arange(len(rows), device=device)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        return torch.stack([states[each, last] for states in picked], 1)
