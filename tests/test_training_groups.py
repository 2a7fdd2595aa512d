"""Neighbour groups: planted clusters are found, what belongs together stays, and the result is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")

from training import groups as stage
from training.groups import cluster_of, group_numbers, join, kept_groups, neighbour_groups
from training.mixtures import Groups
from training.texts import Corpus


def planted(clusters, size, seed=0, width=16):
    """Unit vectors around random centres, shuffled, and the number of each one's centre."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, width))
    owner = rng.permutation(np.repeat(np.arange(clusters), size))
    points = centres[owner] + 0.05 * rng.normal(size=(len(owner), width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), owner


def corpus_of(kinds):
    corpus = Corpus()
    for number, kind in enumerate(kinds):
        corpus.add([f"text {number}"], [kind])
    return corpus


def lloyd(points, clusters, seed=0):
    """Spherical k-means in numpy; the mean cosine of a point and its centre."""
    rng = np.random.default_rng(seed)
    centres = points[rng.choice(len(points), clusters, replace=False)]
    for _ in range(20):
        owner = (points @ centres.T).argmax(1)
        sums = np.stack([points[owner == c].sum(0) if (owner == c).any() else centres[c] for c in range(clusters)])
        centres = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return (points @ centres.T).max(1).mean()


def cohesion(points, found):
    sums = {c: points[found == c].sum(0) for c in np.unique(found)}
    return np.mean([points[n] @ sums[c] / np.linalg.norm(sums[c]) for n, c in enumerate(found)])


@pytest.mark.parametrize("most", [20_000, 40])  # in one go, and through coarse clusters
def test_clusters_are_as_close_as_those_of_numpy_and_find_what_was_planted(most):
    points, owner = planted(12, 8)
    seeds = range(5)
    several = [cluster_of(points, 4, Groups(iterations=20, seed=seed), most) for seed in seeds]
    reference = np.mean([lloyd(points, 24, seed) for seed in seeds])
    assert np.mean([cohesion(points, found) for found in several]) > reference - 0.03
    found = several[0]
    assert 12 <= len(np.unique(found)) <= 24
    assert cohesion(points, np.random.default_rng(0).permutation(found)) < reference - 0.3
    same = (found[:, None] == found[None]) & ~np.eye(96, dtype=bool)
    assert (owner[:, None] == owner[None])[same].mean() > 0.7
    assert np.array_equal(found, cluster_of(points, 4, Groups(iterations=20, seed=0), most))


def test_groups_are_closer_than_chance_and_hold_every_text_once():
    points, _ = planted(10, 9)
    corpus = corpus_of(["sentences"] * 90)
    found = neighbour_groups(torch.from_numpy(points), corpus, Groups(neighbours=6, largest=5, iterations=20))
    assert sorted(row for group in found for row in group) == list(range(90))
    assert max(map(len, found)) == 5
    # Against numpy: the mean cosine inside the groups is far above that of all pairs.
    cosines = points @ points.T
    inside = np.mean([cosines[a, b] for group in found for a in group for b in group if a != b])
    assert inside > cosines[~np.eye(90, dtype=bool)].mean() + 0.5
    numbers = group_numbers(found, 91)
    assert numbers[90] == -1
    assert all(len(set(numbers[group].tolist())) == 1 for group in found)


def test_passages_stay_with_their_titles_and_corruptions_with_their_sentence():
    points, _ = planted(4, 10)
    corpus = Corpus()
    for number in range(10):
        corpus.add([f"passage {number}", f"title {number}"], ["passages", "titles"])
    for number in range(5):
        corpus.add([f"sentence {number}", f"a {number}", f"b {number}"], ["sentences", "fragments", "fragments"])
    for number in range(5):
        corpus.add([f"single {number}"], ["queries"])
    found = neighbour_groups(torch.from_numpy(points), corpus, Groups(passages=3, neighbours=2))
    of = {row: n for n, group in enumerate(found) for row in group}
    assert sorted(of) == list(range(40))
    assert all(len({of[row] for row in bundle}) == 1 for bundle in corpus.bundles)
    for group in found:  # passages among passages, a sentence with its corruptions alone
        first = {corpus.kinds[row] for row in group if corpus.kinds[row] not in ("titles", "fragments")}
        assert len(first) == 1
        assert sum(corpus.kinds[row] == "passages" for row in group) <= 3
    assert [20, 21, 22] in found


def test_queries_join_the_passage_that_is_nearest():
    passages, _ = planted(6, 1, seed=1)
    texts, _ = planted(9, 1, seed=2)
    found = join(passages, texts, 0.1)
    cosines = passages @ texts.T
    best = np.unravel_index(cosines.argmax(), cosines.shape)
    assert found[best[0]] == best[1]
    assert len(set(found.values())) == len(found) > 1
    assert all(cosines[passage, text] > 0.1 for passage, text in found.items())
    for passage, text in found.items():  # no free text is nearer
        free = [t for t in range(9) if t not in found.values()]
        assert all(cosines[passage, t] <= cosines[passage, text] for t in free)
    assert join(passages, texts, 1.0) == {}

    corpus = Corpus()
    for number in range(6):
        corpus.add([f"passage {number}"], ["passages"])
    for number in range(9):
        corpus.add([f"query {number}"], ["queries"], joins=True)
    vectors = torch.from_numpy(np.concatenate([passages, texts]))
    groups = neighbour_groups(vectors, corpus, Groups(join_above=0.1, passages=2))
    rows = sorted(row for group in groups for row in group)
    assert rows == sorted([*range(6), *(6 + text for text in found.values())])
    assert all(any({p, 6 + t} <= set(group) for group in groups) for p, t in found.items())


def test_groups_are_computed_once(tmp_path, monkeypatch):
    points, _ = planted(5, 6)
    vectors, corpus = torch.from_numpy(points).half(), corpus_of(["sentences"] * 30)
    first = kept_groups(tmp_path, vectors, corpus, Groups())
    called = []
    monkeypatch.setattr(stage, "neighbour_groups", lambda *args: called.append(args) or [[0]])
    assert kept_groups(tmp_path, vectors, corpus, Groups()) == first
    assert not called
    kept_groups(tmp_path, vectors, corpus, Groups(seed=2))
    corpus.texts[0] = "another"
    kept_groups(tmp_path, vectors, corpus, Groups())
    kept_groups(tmp_path, vectors, corpus, Groups(), {"center": True})  # of the same stored vectors, other targets
    kept_groups(tmp_path, vectors, corpus, Groups(), {"center": True})
    assert len(called) == 3
    assert not list(tmp_path.glob("*.[0-9]*"))


def test_groups_that_are_not_written_leave_nothing(tmp_path, monkeypatch):
    def killed(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    vectors, owner = planted(4, 5)
    with pytest.raises(KeyboardInterrupt):
        kept_groups(tmp_path, torch.from_numpy(vectors), corpus_of(["sentences"] * len(owner)), Groups())
    assert list(tmp_path.iterdir()) == []
