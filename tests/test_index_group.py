"""Several indexes searched together, against one index over all rows and against numpy brute force."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.encoders import HashEncoder

from ubmoe_st.index import EmbeddingIndex, IndexGroup

ROWS = [{"id": f"d{n}", "text": f"text {n % 170}", "half": n % 2} for n in range(500)]
"""170 texts, so that many scores tie."""
QUERIES = [f"query {n}" for n in range(12)] + ["text 3"]


@pytest.fixture(scope="module")
def encoder():
    return HashEncoder(20)


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    return EmbeddingIndex.build(encoder, ROWS, tmp_path_factory.mktemp("whole") / "i")


@pytest.fixture(scope="module")
def paths(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for name, rows in {"a": ROWS[:200], "b": ROWS[200:203], "c": ROWS[203:]}.items():
        EmbeddingIndex.build(encoder, rows, folder / name, window_tokens=90, segment_rows=70)
    return [folder / name for name in "abc"]


@pytest.mark.parametrize("k", [1, 10, 60, 500, 900])
@pytest.mark.parametrize("spec", [None, {"half": 1}])
def test_a_group_finds_what_one_index_over_all_rows_finds(whole, paths, encoder, k, spec):
    group = IndexGroup.open(paths, model=encoder)
    assert (len(group), group.dimension) == (500, 20)
    scores, ids = group.search(QUERIES, k, filter=spec)
    expected, names = whole.search(QUERIES, k, filter=spec)
    np.testing.assert_array_equal(scores, expected)
    assert ids == names
    matrix = np.stack([encoder.vector(row["text"]) for row in ROWS])
    cosines = np.stack([encoder.vector(query) for query in QUERIES]) @ matrix.T
    if spec:
        cosines = cosines[:, 1::2]
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :k], atol=2e-6)
    hits = group.search_entries(QUERIES, k, filter=spec)
    assert [[hit.id for hit in line] for line in hits] == names
    assert [hit.score for hit in hits[0]] == scores[0].tolist()
    if k == 500 and spec is None:
        assert {Path(hit.index).name for hit in hits[0]} == {"a", "b", "c"}


def test_a_group_loads_nothing_for_vectors_and_takes_empty_questions(paths, whole):
    group = IndexGroup.open(paths)
    assert group.search(np.ones(20), 3)[1] == whole.search(np.ones(20), 3)[1]
    assert group.search([], 3)[1] == []
    assert group.search_entries([], 3) == []


def test_indexes_of_other_models_are_not_searched_together(paths, tmp_path):
    other = EmbeddingIndex.build(HashEncoder(20, salt="x"), ROWS[:5], tmp_path / "other")
    with pytest.raises(ValueError, match=r"other cannot be searched together with .*not the model"):
        IndexGroup.open([paths[0], other.path])
    wider = EmbeddingIndex.build(HashEncoder(21), ROWS[:5], tmp_path / "wider")
    with pytest.raises(ValueError, match="21 dimensions"):
        IndexGroup.open([wider.path, paths[0]])
    with pytest.raises(ValueError, match="at least one index"):
        IndexGroup.open([])
    with pytest.raises(ValueError, match="not the model"):
        IndexGroup.open(paths, model=HashEncoder(20, salt="x"))


def test_a_group_sees_what_is_committed_when_it_is_refreshed(encoder, tmp_path):
    parts = [EmbeddingIndex.build(encoder, [{"id": name, "text": name}], tmp_path / name) for name in "xy"]
    group = IndexGroup.open([part.path for part in parts], model=encoder)
    parts[1].add([{"id": "z", "text": "z"}])
    assert group.search("z", 5)[1][0] != ["z", "x", "y"]
    assert group.refresh()
    assert not group.refresh()
    assert group.search("z", 1)[1] == [["z"]]
    assert len(group) == 3


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_open_files_do_not_grow_with_the_segments(encoder, tmp_path):
    EmbeddingIndex.build(encoder, ROWS, tmp_path / "i", window_tokens=30, segment_rows=10)
    before = len(os.listdir("/proc/self/fd"))
    index = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    assert len(index.info["segments"]) > 30
    assert index.texts(index.search("text 3", 5)[1][0])
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_one_path_is_no_group(tmp_path):
    for one in (str(tmp_path), tmp_path):
        with pytest.raises(TypeError, match=r"a group is of several folders, got one, .*give a list"):
            IndexGroup.open(one)
