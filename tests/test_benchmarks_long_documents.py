"""Long documents: lengths, pieces and the table of a run on a tiny model, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.benchmark_data import make_base, make_data
from helpers.models import make_checkpoint

from benchmarks import long_documents
from benchmarks.report import own_tables
from benchmarks.results import read_json


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peaks in /proc")
def test_a_run_measures_every_way_and_keeps_it(tmp_path, monkeypatch):
    data = make_data(tmp_path / "data")
    (data / "retrieval" / "toy").rename(data / "retrieval" / "cranfield")
    model = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "tiny")
    monkeypatch.setattr(long_documents, "CHUNK_TOKENS", 40)
    options = {"lengths": (200, 700), "out": tmp_path, "measure": long_documents.worker}
    content = read_json(long_documents.run(str(model), data, **options))
    found = {(one["length"], one["method"]): one for one in content["scores"]}
    assert set(found) == {(length, way) for length in (200, 700) for way in long_documents.WAYS}
    assert {one["chunks"] for (length, _), one in found.items() if length == 200} == {5}
    assert [found[700, way]["pieces"] for way in ("late", "late-512", "alone")] == [1, 2, found[700, "alone"]["chunks"]]
    assert all(one["seconds"] > 0 for one in found.values())
    table = own_tables([content])["long-tiny"]
    assert "| 200 | late, in one piece | 5 | 1 |" in table
    monkeypatch.setitem(options, "measure", lambda task: pytest.fail("a finished measurement ran again"))
    long_documents.run(str(model), data, **options)
