"""Which rows of a batch to compute together, so that little is padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def group_by_length(lengths: Sequence[int], pass_tokens: int) -> list[list[int]]:
    """The groups of rows in which a padded batch costs least, by dynamic programming.

    Args:
        lengths: Tokens of each of B rows.
        pass_tokens: What a further group costs, in tokens.

    Returns:
        Positions of the rows, longest first. The cost of a group is its rows times its longest one.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    longest, counts = np.unique(-sizes, return_counts=True)
    longest = -longest
    # Rows of one length are never worth telling apart, so a group begins where the length changes.
    starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    best = np.zeros(len(longest) + 1)
    begins = np.zeros(len(longest) + 1, np.int64)
    for end in range(1, len(longest) + 1):
        costs = best[:end] + longest[:end] * (starts[end] - starts[:end]) + pass_tokens
        begins[end] = costs.argmin()
        best[end] = costs[begins[end]]
    groups = []
    end = len(longest)
    while end:
        groups.append(order[starts[begins[end]] : starts[end]].tolist())
        end = int(begins[end])
    return groups[::-1]


def rows_alike(features: Mapping[str, Any], pass_tokens: int) -> list[list[int]]:
    """The rows of a batch to compute together; none where the batch has to be computed as it is.

    Args:
        features: Of a batch, with `attention_mask`, (B, T).
        pass_tokens: As for `group_by_length`.
    """
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.device.type != "cpu" or torch.is_grad_enabled():
        return []
    if any(isinstance(value, Tensor) and value.shape != mask.shape for value in features.values()):
        return []
    if not bool(mask.any(1).all()):
        return []
    filled = mask.bool().int()
    # From the first to the last token of a row, on whichever side it is padded.
    spans = mask.shape[1] - filled.argmax(1) - filled.flip(1).argmax(1)
    return group_by_length(spans.tolist(), pass_tokens)


def in_groups(
    features: Mapping[str, Any],
    groups: Sequence[Sequence[int]],
    compute: Callable[[dict[str, Any]], Mapping[str, Any]],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """What is computed of groups of rows, each without its padding, put together for the batch.

    Args:
        features: Of the batch, with `attention_mask`, (B, T).
        groups: Positions of rows, each row once.
        compute: Gives the features of a part of the batch.
        names: Those to put together where there are any: of tokens, (b, t, D), or of texts, (b, K).

    Returns:
        The same for the batch; 0 where there is padding.
    """
    mask = features["attention_mask"]
    whole: dict[str, Tensor] = {}
    for rows in groups:
        used = mask[rows].any(0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        part = {k: v[rows, first:last] if isinstance(v, Tensor) else v for k, v in features.items()}
        computed = compute(part)
        for name in (name for name in names if name in computed):
            found: Tensor = computed[name]
            if name not in whole:
                whole[name] = found.new_zeros(*mask.shape[: found.ndim - 1], found.shape[-1])
            whole[name][(rows, slice(first, last)) if found.ndim == 3 else rows] = found
    return whole
