"""A build on a local Ray cluster of two workers gives the rows and the bytes of a local build."""

from __future__ import annotations

import json

import helpers.encoders
import numpy as np
import pytest
from helpers.encoders import HashEncoder, Stops
from helpers.index_driver import CUT, small

from ubmoe_st.index import EmbeddingIndex

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.cloudpickle.register_pickle_by_value(helpers.encoders)
    # A cluster of its own: another test may have one on this machine.
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_two_workers_give_the_same_index_as_one_process(tmp_path, monkeypatch):
    """Also of a corpus and a folder that are named relative to the working directory, which workers do not share."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(2)
    rows = [
        {"id": f"d{n}", "text": " ".join(f"w{w}" for w in generator.integers(500, size=generator.integers(1, 60)))}
        for n in range(300)
    ]
    cut = {"window_tokens": 900, "batch_tokens": 200, "segment_rows": 60, "chunk_tokens": 20}
    encoder = HashEncoder(16, batch_noise=1e-3)
    local = EmbeddingIndex.build(encoder, rows, tmp_path / "local", **cut)
    far = HashEncoder(16, batch_noise=1e-3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    remote = EmbeddingIndex.build(far, "rows.jsonl", "ray", engine="ray", workers=2, **cut)
    names = list(local)
    assert len(names) > 400
    assert list(remote) == names
    assert remote.vectors(names).tobytes() == local.vectors(names).tobytes()
    assert len(far.batches) == 2, "the driver embedded more than the probes, so this test would be vacuous"
    assert remote.verify() == []
    again = EmbeddingIndex.build(encoder, "rows.jsonl", tmp_path / "ray", **cut)
    assert again.version == 1


def test_a_build_begun_locally_goes_on_with_ray(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(Stops(9), small(tmp_path), tmp_path / "i", **CUT)
    encoder = HashEncoder(16, batch_noise=1e-3)
    index = EmbeddingIndex.build(encoder, small(tmp_path), tmp_path / "i", engine="ray", workers=2, **CUT)
    whole = EmbeddingIndex.build(encoder, small(tmp_path), tmp_path / "whole", **CUT)
    assert index.vectors(list(index)).tobytes() == whole.vectors(list(whole)).tobytes()


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="engine is local or ray"):
        EmbeddingIndex.build(HashEncoder(16), [{"id": "a", "text": "b"}], tmp_path / "i", engine="spark")
