"""llama.cpp beside torch: what a run on a tiny model measures, writes and keeps."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from helpers.models import TEXTS

from benchmarks import native
from benchmarks.report import own_tables
from benchmarks.results import read_json
from ubmoe_st.export import export

missing = [name for name in ("xllamacpp", "llama_cpp_py_sync", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason="needs the extra llama-cpp")


def test_a_run_measures_both_engines_and_keeps_it(gguf_checkpoint_of, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path / "cache"))
    _, checkpoint = gguf_checkpoint_of("llama")
    base = tmp_path / "base.gguf"
    export(checkpoint, base, view="generator", format="gguf")
    first = [f"{start} {text}" for start in ("the red", "a cat and", "under") for text in TEXTS]
    second = first[1:] + first[:1]
    pairs = (first, second, list(np.linspace(0, 5, len(first))))
    options = {"gguf": base, "batch": 4, "out": tmp_path}
    content = read_json(native.run(checkpoint, pairs, **options))
    found = {(one["task"], one["split"], one["metric"]): one for one in content["scores"] if "method" not in one}
    peer, ours = (found["STSB-dev", name, "spearman x100"]["value"] for name in (native.PEER, native.NATIVE))
    assert ours == pytest.approx(peer, abs=1e-6)  # the same fp32 weights rank alike
    assert found["STSB-dev", native.NATIVE, "smallest cosine"]["value"] > 0.9999
    for task in ("generate", "embed"):
        assert found[task, native.PEER, "tokens/s"]["ratio"] == 1
        assert found[task, native.NATIVE, "tokens/s"]["ratio"] > 0
    steps = [one for one in content["scores"] if one["task"] == "memory"]
    assert [one["method"] for one in steps] == list(native.STEPS)
    assert all(one["ratio"] == pytest.approx(one["value"] * 2**20 / base.stat().st_size) for one in steps)
    table = own_tables([content])[f"native-{checkpoint.name}"]
    assert "memory above the interpreter, after short texts" in table
    assert "1.00x" not in table.splitlines()[2]
    never = {"measure": lambda *task: pytest.fail("memory was measured again")}
    monkeypatch.setattr(native, "compare", lambda *a: pytest.fail("the engines were compared again"))
    native.run(checkpoint, pairs, **options, **never)


def test_a_checkpoint_that_is_none_is_told(tmp_path):
    with pytest.raises((ValueError, OSError), match="none"):
        native.run(tmp_path / "none", ([], [], []), out=tmp_path)
