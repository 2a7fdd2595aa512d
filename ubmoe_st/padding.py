"""Which rows of a batch to compute together, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_by_length(lengths: Sequence[int], pass_tokens: int) -> list[list[int]]:
    """The groups of rows in which a padded batch costs least, by dynamic programming.

    Args:
        lengths: Tokens of each of B rows.
        pass_tokens: What a further group costs, in tokens.

    Returns:
        Positions of the rows, longest first. The cost of a group is its rows times its longest one.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    longest = np.asarray(lengths, np.int64)[order]
    best = np.zeros(len(order) + 1)
    begins = np.zeros(len(order) + 1, np.int64)
    for end in range(1, len(order) + 1):
        costs = best[:end] + longest[:end] * (end - np.arange(end)) + pass_tokens
        begins[end] = costs.argmin()
        best[end] = costs[begins[end]]
    groups = []
    end = len(order)
    while end:
        groups.append(order[begins[end] : end].tolist())
        end = int(begins[end])
    return groups[::-1]
