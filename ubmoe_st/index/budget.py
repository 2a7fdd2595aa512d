"""The memory budget of a build: one number, and what follows from it for windows, batches, samples and faiss files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
SMALLEST = 64 * 10**6
"""Smallest budget, bytes: below, the fixed costs (an id table, a row, a block of vectors) would not fit."""

WINDOW_TOKENS = 65_536
"""Tokens of a window where the budget allows it."""
WINDOW_ROWS = 8192
WINDOW_BYTES = 16 << 20
BATCH_TOKENS = 4096
"""Tokens of a batch where the budget allows it."""
TRAINING_BYTES = 256 << 20
"""Largest training sample, in bytes of float32."""
ROW_BYTES = 2000
"""Python's own cost of a row in a window."""
ROW_SHARE = 12
"""A row on its way through the reader is held about this many times over."""


def parse_size(size: int | str) -> int:
    """Bytes of `512MB`, `1.5 GiB` or a plain number.

    Raises:
        ValueError: If it is none of these, or not positive.
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", size.upper())
        if not found or found[2] not in UNITS:
            raise ValueError(f"a size is a number of bytes or a text like '512MB' or '2GiB', got {size!r}")
        size = int(float(found[1]) * UNITS[found[2]])
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"a size is a positive number of bytes, got {size!r}")
    return size


def search_mebibytes(size: int | str | None) -> int | None:
    """A memory budget of a search in MiB, as `choose` and the manifest have it; None stays None.

    Raises:
        ValueError: If it is no size, or less than 1 MiB.
    """
    if size is None:
        return None
    if (mebibytes := parse_size(size) >> 20) < 1:
        raise ValueError(f"search_memory_budget is at least 1 MiB, got {size!r}")
    return mebibytes


def physical_memory() -> int:
    """Memory of the machine, bytes; 4 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


@dataclass(frozen=True)
class MemoryBudget:
    """What a build may take in memory, beside the model and the libraries, whatever the size of the corpus.

    The shares: a quarter for the texts in flight, an eighth for their vectors, a quarter for what the model computes
    with, and, later, when the rest is free again, half for a faiss index in the making and a quarter for its training.
    """

    size: int
    """Bytes."""

    @classmethod
    def of(cls, size: int | str | None) -> MemoryBudget:
        """A budget of `size`; None is half of the machine's memory.

        Raises:
            ValueError: If it is no size, or too small to work in.
        """
        budget = cls(max(SMALLEST, physical_memory() // 2) if size is None else parse_size(size))
        if budget.size < SMALLEST:
            raise ValueError(f"memory_budget is at least {shown(SMALLEST)}, got {shown(budget.size)}")
        return budget

    def window(self, dimension: int) -> dict[str, int]:
        """`window_tokens`, `window_rows` and `window_bytes`.

        Two windows are in memory at a time, as Python strings of up to two bytes a character on average, one of them a
        second time as it is written, and the rows between the reader and the next window.

        Args:
            dimension: D; a window's vectors are held twice.
        """
        return {
            "window_tokens": WINDOW_TOKENS,
            "window_rows": max(1, min(WINDOW_ROWS, self.size // 8 // (8 * dimension + ROW_BYTES))),
            "window_bytes": max(1, min(WINDOW_BYTES, self.size // 32)),
        }

    def batch_tokens(self, token_bytes: int) -> int:
        """Tokens of a batch, padding included.

        Args:
            token_bytes: What the model needs per token while it computes.
        """
        return max(64, min(BATCH_TOKENS, self.size // 4 // token_bytes))

    def sizes(self, model: Any, dimension: int) -> dict[str, Any]:
        """The sizes of windows and batches as fields of `PipelineOptions`."""
        return self.window(dimension) | {"batch_tokens": self.batch_tokens(token_bytes(model, dimension))}

    def check_row(self, max_row_bytes: int) -> None:
        """Refuse a row limit that does not fit.

        Raises:
            ValueError: Saying which limit would.
        """
        if max_row_bytes > self.size // ROW_SHARE:
            raise ValueError(
                f"rows of up to max_row_bytes={max_row_bytes:,} bytes do not fit in memory_budget={shown(self.size)}: "
                f"allow at least {shown(ROW_SHARE * max_row_bytes)}, or lower max_row_bytes"
            )

    def training_rows(self, dimension: int) -> int:
        """Rows of a training sample; faiss makes two more arrays of its size."""
        return max(1, min(TRAINING_BYTES, self.size // 8) // (4 * dimension))

    def shard_rows(self, row_bytes: float) -> int:
        """Rows of one faiss file. faiss grows its arrays by doubling, so making it takes twice what it holds."""
        return max(1, int(self.size // 2 / (2 * row_bytes)))


def token_bytes(model: Any, dimension: int) -> int:
    """About what a transformer needs per token while it computes without gradients: one layer's arrays in float32.

    Args:
        model: A `SentenceTransformer`; of other objects only `dimension` is known.
        dimension: D.
    """
    config = getattr(getattr(model, "transformers_model", None), "config", None)
    config = getattr(config, "text_config", config)
    hidden = getattr(config, "hidden_size", None) or dimension
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return 4 * (8 * int(hidden) + 3 * int(inner))


def shown(size: int) -> str:
    """Bytes for a person: `512 MB`."""
    return f"{size / 1e6:,.0f} MB" if size < 10**10 else f"{size / 1e9:,.0f} GB"
