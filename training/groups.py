"""Groups of neighbours: the texts that a teacher finds close, so that a batch has something to tell apart.

Random texts have similarities near 0, which teach little. k-means of the teacher's vectors puts close ones together;
what belongs together by construction (a sentence and its corruptions; a passage, its title and query) stays so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.mixtures import Groups
from training.texts import Corpus
from ubmoe_st.files import replacing

logger = logging.getLogger(__name__)

_MOST_POINTS = 20_000
"""Of one k-means, whose time grows with their square."""

_CANDIDATES = 3
"""Nearest texts of a passage that may join it."""


def kept_groups(
    folder: Path, vectors: Tensor, corpus: Corpus, settings: Groups, made_by: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """The groups, from `folder` where they are there already.

    Args:
        folder: Of the teacher's vectors.
        vectors: Unit vectors of all texts, (N, K).
        corpus: The texts.
        settings: Sizes and seed.
        made_by: How `vectors` were made of what `folder` holds, see `target_settings` of a teacher. Groups of other
            vectors are others.
    """
    parts: list[Any] = [asdict(settings), corpus.texts, corpus.kinds, corpus.bundles, sorted(corpus.joining)]
    asked = json.dumps(parts + ([dict(made_by)] if made_by else []))
    file = folder / f"groups-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    groups = neighbour_groups(vectors, corpus, settings)
    with replacing(file, unique=True) as out:
        out.write(json.dumps(groups).encode())
    logger.info("%d texts in %d groups: %s", sum(map(len, groups)), len(groups), file)
    return groups


def neighbour_groups(vectors: Tensor, corpus: Corpus, settings: Groups) -> list[list[int]]:
    """Rows of each group; every row is in one group, but for texts that were to join a passage and are near none.

    Args:
        vectors: Unit vectors of all texts, (N, K).
        corpus: The texts.
        settings: Sizes and seed.
    """
    rng = random.Random(settings.seed)
    first = [bundle[0] for bundle in corpus.bundles]
    passages = [n for n, row in enumerate(first) if corpus.kinds[row] == "passages"]
    joining = sorted(corpus.joining)
    apart = set(passages) | corpus.joining
    short = [n for n, bundle in enumerate(corpus.bundles) if n not in apart and len(bundle) == 1]
    groups = [bundle for n, bundle in enumerate(corpus.bundles) if n not in apart and len(bundle) > 1]

    def points(bundles: list[int]) -> np.ndarray:
        return np.asarray(vectors[[first[n] for n in bundles]], np.float32)

    joined = join(points(passages), points(joining), settings.join_above) if passages and joining else {}
    for bundles, mean, most in (
        (short, settings.neighbours, settings.largest),
        (passages, settings.passages, settings.passages),
    ):
        if not bundles:
            continue
        members: dict[int, list[int]] = defaultdict(list)
        for position, cluster in enumerate(cluster_of(points(bundles), mean, settings).tolist()):
            members[cluster].append(position)
        for _, cluster_members in sorted(members.items()):
            rng.shuffle(cluster_members)
            for start in range(0, len(cluster_members), most):
                part = cluster_members[start : start + most]
                rows = [row for position in part for row in corpus.bundles[bundles[position]]]
                if bundles is passages:
                    own = [corpus.bundles[joining[joined[position]]] for position in part if position in joined]
                    rows += [row for bundle in own for row in bundle]
                groups.append(rows)
    return groups


def group_numbers(groups: Sequence[Sequence[int]], count: int) -> Tensor:
    """Number of each row's group, (count,); -1 for rows in none."""
    numbers = torch.full((count,), -1)
    for number, group in enumerate(groups):
        numbers[list(group)] = number
    return numbers


def cluster_of(points: np.ndarray, mean: int, settings: Groups, most: int = _MOST_POINTS) -> np.ndarray:
    """Number of each point's cluster, (n,), by spherical k-means.

    Args:
        points: Unit vectors, (n, K), fp32.
        mean: Points of a cluster.
        settings: Iterations and seed.
        most: Points of one k-means; more are first cut into coarse clusters of half as many.

    Raises:
        ImportError: If faiss is not installed.
    """
    if len(points) <= mean:
        return np.zeros(len(points), np.int64)
    if len(points) <= most:
        return _kmeans(points, len(points) // mean, settings)
    coarse = _kmeans(points, -(-2 * len(points) // most), settings)
    found = np.zeros(len(points), np.int64)
    for cluster in range(coarse.max() + 1):
        rows = np.flatnonzero(coarse == cluster)
        if len(rows):
            inner = _kmeans(points[rows], max(1, len(rows) // mean), settings)
            found[rows] = found.max() + 1 + inner
    return found


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("neighbour groups need faiss: pip install 'ubmoe-st[train]'") from error
    return faiss


def _kmeans(points: np.ndarray, clusters: int, settings: Groups) -> np.ndarray:
    kmeans = _faiss().Kmeans(
        points.shape[1],
        clusters,
        niter=settings.iterations,
        spherical=True,
        seed=settings.seed,
        min_points_per_centroid=1,
    )
    points = np.ascontiguousarray(points)
    kmeans.train(points)
    return kmeans.index.search(points, 1)[1][:, 0]


def join(passages: np.ndarray, texts: np.ndarray, least: float) -> dict[int, int]:
    """Which text joins which passage, by position: at most one each, the closest pairs first.

    Args:
        passages: Unit vectors, (P, K).
        texts: Unit vectors, (Q, K).
        least: Cosine of a pair.

    Raises:
        ImportError: If faiss is not installed.
    """
    index = _faiss().IndexFlatIP(texts.shape[1])
    index.add(np.ascontiguousarray(texts))
    cosines, nearest = index.search(np.ascontiguousarray(passages), min(_CANDIDATES, len(texts)))
    rows, columns = np.nonzero(cosines > least)
    pairs = zip((-cosines[rows, columns]).tolist(), rows.tolist(), nearest[rows, columns].tolist())
    joined: dict[int, int] = {}
    taken: set[int] = set()
    for _, passage, text in sorted(pairs):
        if passage not in joined and text not in taken:
            joined[passage] = text
            taken.add(text)
    return joined
