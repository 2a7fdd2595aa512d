"""A build on a Ray cluster of several nodes, one of which is lost in the middle of it.

The nodes are Ray's own, each with its raylet, object store and processes; they share a machine, as a common folder is
what several machines share.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import helpers.encoders
import pytest
from helpers.encoders import HashEncoder
from helpers.index_driver import small

from ubmoe_st.index import EmbeddingIndex

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

CUT = {"window_tokens": 60, "batch_tokens": 40, "segment_rows": 100, "chunk_tokens": 20}
SLOT = {"num_cpus": 0, "resources": {"slot": 1}}


class Noting(HashEncoder):
    """Writes a line for each batch: on which node it is, in a file of that node's name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(16, batch_noise=1e-3)
        self.folder, self.pause = folder, 0.2

    def encode(self, texts, **options):
        import ray

        if ray.is_initialized():
            with open(self.folder / ray.get_runtime_context().get_node_id(), "a") as file:
                file.write(f"{len(texts)}\n")
            time.sleep(self.pause)  # else one node may have done it all before the other has started
        return super().encode(texts, **options)


@pytest.fixture
def cluster():
    for module in (helpers.encoders, sys.modules[__name__]):  # workers have no tests
        ray.cloudpickle.register_pickle_by_value(module)
    found = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"slot": 1}})
    found.far = found.add_node(num_cpus=1, resources={"slot": 1})
    found.wait_for_nodes()
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def wait_until(found, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_lost_node_costs_its_windows_only(cluster, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    corpus = small(tmp_path, 400)
    built: list[EmbeddingIndex | BaseException] = []

    def build() -> None:
        try:
            built.append(
                EmbeddingIndex.build(
                    Noting(notes), corpus, tmp_path / "far", engine="ray", workers=2, worker_resources=SLOT, **CUT
                )
            )
        except BaseException as error:
            built.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    lost = cluster.far.node_id
    wait_until(lambda: (notes / lost).is_file())
    cluster.remove_node(cluster.far, allow_graceful=False)
    assert not built, "the build was over before the node was lost"
    cluster.add_node(num_cpus=1, resources={"slot": 1})
    thread.join(180)
    assert len(built) == 1
    if isinstance(built[0], BaseException):
        raise built[0]
    index = built[0]
    whole = EmbeddingIndex.build(HashEncoder(16, batch_noise=1e-3), corpus, tmp_path / "local", **CUT)
    names = list(whole)
    assert list(index) == names
    assert len(names) > 50
    assert index.vectors(names).tobytes() == whole.vectors(names).tobytes()
    assert index.verify() == []
    assert len(list(notes.iterdir())) >= 3, "the build did not go on where there was room again"
    kept = {path.name for path in (tmp_path / "far").rglob("*") if path.is_file()}
    assert {path.name for path in (tmp_path / "local").rglob("*") if path.is_file()} == kept, "parts were left behind"
