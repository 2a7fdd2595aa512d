"""The index benchmark: data, resuming, ratios and goals, and that every system makes the same index."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer.testing

from benchmarks import index as benchmark
from benchmarks.index_systems import Table
from benchmarks.report import render
from benchmarks.results import ResultFile, read_json

QUICK = {"queries/s, all at once": [2000.0, 2100.0], "queries/s, one by one": [900.0], "resident bytes/row": 80.0}
SLOW = {"queries/s, all at once": [100.0], "queries/s, one by one": [5.0], "resident bytes/row": 2304.0}


@pytest.fixture
def seeds(tmp_path):
    vectors = np.random.default_rng(3).normal(size=(400, 16)).astype(np.float32)
    np.save(tmp_path / "seeds.npy", vectors)
    return tmp_path / "seeds.npy"


@pytest.fixture
def same_process(monkeypatch):
    monkeypatch.setattr(benchmark, "in_process", lambda function, *arguments: function(*arguments))


def test_extended_rows_are_unit_vectors_in_the_space_of_the_seeds(tmp_path):
    seeds = np.random.default_rng(0).normal(size=(50, 3)) @ np.random.default_rng(1).normal(size=(3, 12))
    for name in ("a", "b"):
        benchmark.extended(seeds, 25_000, 0.25, tmp_path / f"{name}.npy", seed=7)
    rows = np.load(tmp_path / "a.npy")
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    assert np.linalg.matrix_rank(rows, tol=1e-3) == 3, "the perturbation left the space of the seeds"
    assert len(np.unique(rows.round(6), axis=0)) > 24_900
    np.testing.assert_array_equal(rows, np.load(tmp_path / "b.npy"))


def test_a_free_encoder_gives_the_rows_of_its_file(seeds):
    table, vectors = Table(seeds), np.load(seeds)
    np.testing.assert_array_equal(table.encode(["3 and more", "0", "399"]), vectors[[3, 0, 399]])
    assert table.encode_document(["no number"]).shape == (1, 16)


def test_a_stopped_run_goes_on_and_the_report_prints_the_ratios(seeds, same_process, tmp_path, monkeypatch):
    def run(kinds: str) -> str:
        arguments = ["--vectors", str(seeds), "--rows", "1500", "--queries", "40", "--kinds", kinds, "--parts", "kinds"]
        arguments += ["--least-seconds", "0", "--least-rounds", "1"]
        places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "results")]
        done = typer.testing.CliRunner().invoke(benchmark.app, [*arguments, *places])
        assert done.exit_code == 0, done.output
        return done.output

    assert "flat: recall@10 1.000" in run("flat")
    output = run("flat,faiss IndexFlatIP,ivf-flat")
    assert "flat: kept" in output
    content = read_json(tmp_path / "results" / "index-kinds.json")
    scores = {(score["task"], score["metric"]): score["value"] for score in content["scores"]}
    assert scores["faiss IndexFlatIP", "recall@10"] == scores["flat", "recall@10"] == 1.0
    assert scores["ivf-flat", "recall@10"] >= 0.9
    assert scores["flat", "resident bytes/row"] == 64
    text = render("index-kinds", [content])
    ratio = scores["ivf-flat", "queries/s, all at once"] / scores["flat", "queries/s, all at once"]
    assert f"| {ratio:.2f} |" in text.splitlines()[-1]
    monkeypatch.setattr(benchmark, "in_process", lambda *_: pytest.fail("a finished kind ran again"))
    run("flat,ivf-flat")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "met"),
        ({"recall@10": [0.9] * 50}, "missed"),
        ({"resident bytes/row": 600.0}, "missed"),
        ({"queries/s, all at once": [1900.0]}, "missed"),
        ({"queries/s, one by one": [99.0]}, "missed"),
    ],
)
def test_the_goal_is_recall_speed_and_memory_together(tmp_path, change, verdict):
    file = ResultFile(tmp_path / "r.json", benchmark="index", row="r", run={"fingerprint": "x"})
    good = {**QUICK, "recall@10": [0.96] * 50, "parameters": {"nprobe": 8}, "factory": "x"}
    file.add(*benchmark.scores_of("flat", {**SLOW, "recall@10": [1.0] * 50}, 0))
    file.add(*benchmark.scores_of("ivf-pq", {**good, **change}, 0))
    rows = benchmark.kinds_table(file)["rows"]
    assert rows[1][-1] == verdict
    assert rows[1][-2] == "nprobe 8"
    assert rows[0][3] == 1.0


def test_the_streaming_build_makes_the_index_of_the_plain_loop(seeds, tmp_path):
    """Vectors, ids and order, by stock faiss; both in processes of their own, and kept when run again."""
    import faiss

    corpus = tmp_path / "c.jsonl"
    benchmark.write_corpus(corpus, (f"{399 - n} {benchmark.FILLER}" for n in range(400)))
    found = {}
    for name in ("plain loop", "streaming"):
        arguments = {"model": f"table:{seeds}", "corpus": str(corpus), "out": str(tmp_path / name), "budget": "64MB"}
        facts = benchmark.run_system(name, benchmark.sys.executable, arguments)
        assert facts["rows"] == 400
        assert facts["seconds"] > 0
        found[name] = facts
    loop = faiss.read_index(str(tmp_path / "plain loop.faiss")).reconstruct_n(0, 400)
    stream = faiss.read_index(str(tmp_path / "streaming" / "index.faiss")).reconstruct_n(0, 400)
    np.testing.assert_allclose(stream, loop / np.linalg.norm(loop, axis=1, keepdims=True), atol=1e-6)
    assert json.loads((tmp_path / "plain loop.json").read_text())[5] == "5"
    with pytest.raises(RuntimeError, match="plain loop failed"):
        benchmark.run_system("plain loop", benchmark.sys.executable, {**arguments, "corpus": "absent"})


def test_build_ratios_are_to_the_plain_loop_of_the_same_encoder(tmp_path):
    file = ResultFile(tmp_path / "r.json", benchmark="index", row="r", run={"fingerprint": "x"})
    for what, speed in (("free encoder", 100.0), ("model", 7.0)):
        facts = {"rows": 9, "rows/s": speed, "peak_mb": 500.0, "index": "Flat"}
        file.add(*benchmark.scores_of(f"plain loop ({what})", facts, 0))
        file.add(*benchmark.scores_of(f"streaming ({what})", {**facts, "rows/s": 2 * speed, "peak_mb": 50.0}, 0))
    rows = benchmark.build_table(file)["rows"]
    assert [row[4] for row in rows] == [1.0, 2.0, 1.0, 2.0]
    assert [row[6] for row in rows] == [1.0, 0.1, 1.0, 0.1]


def test_without_vectors_or_a_model_the_command_says_what_it_needs(tmp_path):
    done = typer.testing.CliRunner().invoke(benchmark.app, ["--work", str(tmp_path)])
    assert done.exit_code == 1
    assert "Expected --model with --texts" in done.output
