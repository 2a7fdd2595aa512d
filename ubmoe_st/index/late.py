"""Late chunking: a document goes through the model in one piece, and its chunks are pooled from that afterwards.

After Günther et al. (2024), "Late Chunking". Every chunk is pooled from its own tokens and from what is read before any
chunk: special tokens, prompt and title. So the vector of a chunk differs from that of the chunk embedded alone only in
what its tokens could attend to, and a document of one chunk has the same vector either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from .embedder import Embedder, TokenCounter

OVERLAP_SHARE = 4
"""Of a document that the model cannot read in one piece, neighbouring pieces share one token in so many."""
MEANS = ("mean", "mean_sqrt_len_tokens", "weightedmean")
"""Ways of pooling that have a meaning for a part of the tokens."""


@dataclass(frozen=True)
class Pass:
    """A piece of a document that the model reads at once, and the chunks whose vectors are taken from it."""

    text: str
    """Title, if it is read, and chunks, as they stand in the document."""
    head: int
    """Characters before the first chunk."""
    length: int
    """Tokens, without the prompt."""
    chunks: tuple[tuple[int, int, int], ...]
    """Number of the chunk, its first character in `text`, the character after its last one."""

    def moved(self, places: int) -> Pass:
        """The same with chunks numbered from `places` on."""
        return replace(self, chunks=tuple((number + places, start, end) for number, start, end in self.chunks))


def passes_of(text: str, spans: Sequence[tuple[int, int]], title: str | None, counter: TokenCounter) -> list[Pass]:
    """The pieces in which a document is read: one, or several that overlap, where it is longer than the model reads.

    A chunk that is in two pieces is taken from the one in which it is farther from the edge.

    Args:
        text: The document.
        spans: Its chunks, in order.
        title: Read at the head of every piece.
        counter: Counts tokens.
    """
    if not spans:
        return []
    head = f"{title}\n" if title else ""
    last = len(spans) - 1

    def piece(first: int, end: int) -> str:
        return head + text[spans[first][0] : spans[end][1]]

    whole = counter.sizes([piece(0, last)])[0]
    if counter.limit is None or whole <= counter.limit:
        ranges = [(0, last)]
    else:
        ranges = _ranges(text, spans, head, counter)
    taken: list[list[int]] = [[] for _ in ranges]
    for number, (start, end) in enumerate(spans):

        def distance(place: int, start: int = start, end: int = end) -> float:
            first, final = ranges[place]
            left = start - spans[first][0] if first else float("inf")
            return min(left, spans[final][1] - end if final < last else float("inf"))

        within = [place for place, (first, final) in enumerate(ranges) if first <= number <= final]
        taken[max(within, key=distance)].append(number)
    passes = []
    for (first, final), numbers in zip(ranges, taken):
        if numbers:
            content = piece(first, final)
            shift = len(head) - spans[first][0]
            chunks = tuple((number, spans[number][0] + shift, spans[number][1] + shift) for number in numbers)
            passes.append(Pass(content, len(head), counter.sizes([content])[0], chunks))
    return passes


def _ranges(text: str, spans: Sequence[tuple[int, int]], head: str, counter: TokenCounter) -> list[tuple[int, int]]:
    """First and last chunk of each piece of a long document; a piece has at least one chunk."""
    last, limit = len(spans) - 1, counter.limit or 0
    room = limit - counter.sizes([head])[0]
    starts = [start for start, _ in spans]
    stretches = [text[start:end] for start, end in zip(starts, [*starts[1:], spans[-1][1]])]
    own = np.array(counter.sizes(stretches)) - counter.special_tokens
    before = np.concatenate([[0], np.cumsum(own)])  # tokens before each chunk

    @cache
    def reach(first: int) -> int:
        """The last chunk of a piece that begins with `first`."""
        end = int(np.searchsorted(before, before[first] + room, side="right")) - 2
        end = min(max(end, first), last)
        while end > first and counter.sizes([head + text[spans[first][0] : spans[end][1]]])[0] > limit:
            end -= 1
        return end

    ranges = [(0, reach(0))]
    while (end := ranges[-1][1]) < last:
        first = ranges[-1][0]
        shared = int(np.searchsorted(before, before[end + 1] - room // OVERLAP_SHARE))
        again = min(max(shared, first + 1), end)
        begin = again if again > first and reach(again) > end else end + 1
        ranges.append((begin, reach(begin)))
    return ranges


def check_late(embedder: Embedder) -> None:
    """Refuse a model whose chunks cannot be pooled late.

    Raises:
        ValueError: If it is no `SentenceTransformer` with a fast tokenizer that pools by a mean.
    """
    _pooling(embedder)
    embedder.token_encoder()
    if not embedder.counter().fast:
        raise ValueError("late_chunking needs a model with a fast tokenizer, which knows where its tokens stand")


def _pooling(embedder: Embedder) -> Any:
    modules = list(embedder.model) if hasattr(embedder.model, "children") else []
    pooling = next((module for module in modules if type(module).__name__ == "Pooling"), None)
    mode = getattr(pooling, "pooling_mode", type(embedder.model).__name__)
    if pooling is None or mode not in MEANS:
        raise ValueError(
            f"late_chunking needs a model that pools tokens by their mean ({', '.join(MEANS)}), got {mode}"
        )
    return pooling


def late_vectors(embedder: Embedder, passes: Sequence[Pass]) -> list[np.ndarray]:
    """Vectors of the chunks of each pass, float32, (C, D), as the modules of the model give them.

    Raises:
        ValueError: If the model reads other tokens than its tokenizer gives.
    """
    import torch

    pooling = _pooling(embedder)
    prompt = embedder.document_prompt()
    encoder: Any = embedder.unpooled_encoder()
    texts = [one.text for one in passes]
    found = []
    with torch.inference_mode():
        read = encoder.encode_document(texts, batch_size=len(texts), show_progress_bar=False)
        for one, tokens in zip(passes, read):  # tokens: (T, D)
            places = embedder.counter().places(prompt + one.text)
            if len(places) != len(tokens):
                raise ValueError(
                    f"the model reads {len(tokens)} tokens where its tokenizer gives {len(places)}: late_chunking does "
                    "not know where they stand; build without it"
                )
            masks = _masks(one, places, len(prompt), pooling.include_prompt)  # (C, T)
            sizes = masks.sum(1)
            padded = tokens.new_zeros(len(masks), int(sizes.max()), tokens.shape[-1])
            mask = torch.zeros(padded.shape[:2], dtype=torch.int64, device=tokens.device)
            for row, size in enumerate(sizes.tolist()):
                padded[row, :size] = tokens[torch.from_numpy(np.flatnonzero(masks[row])).to(tokens.device)]
                mask[row, :size] = 1
            features = {"token_embeddings": padded, "attention_mask": mask}
            for module in list(embedder.model)[1:]:
                features = module(features)
            vectors = features["sentence_embedding"][:, : embedder.model.truncate_dim].float().cpu().numpy()
            vectors[sizes == 0] = np.nan
            found.append(vectors)
    return found


def _masks(one: Pass, places: np.ndarray, prompt: int, include_prompt: bool) -> np.ndarray:
    """Which tokens each chunk is pooled from, bool, (C, T).

    Args:
        one: The pass.
        places: First character of each token, the one after its last, and whether it is a special token, (T, 3).
        prompt: Characters of the prompt.
        include_prompt: Whether the prompt is pooled.
    """
    start, end, special = places[:, 0], places[:, 1], places[:, 2].astype(bool)
    always = special | (start < prompt + one.head)
    if prompt and not include_prompt:
        always &= np.arange(len(places)) >= int(np.argmax(~special & (start >= prompt)))
    masks = []
    for _, first, after in one.chunks:
        own = ~special & (start < prompt + after) & (end > prompt + first)
        masks.append(own | always if own.any() else own)
    return np.stack(masks)
