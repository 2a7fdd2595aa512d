"""`python -m benchmarks.gpu` as far as a machine without a GPU can tell."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("peft")

import torch

from benchmarks import gpu
from benchmarks.report import own_tables


def test_no_gpu_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(gpu.app, ["--model", str(tmp_path), "--base", str(tmp_path), "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "expected a GPU that torch sees, got none" in done.output


def test_systems_take_turns_and_ratios_are_to_the_peer():
    turns = []
    slow = {"peer": lambda: turns.append("peer"), "other": lambda: turns.append("other")}
    scores = gpu._scores("task", slow, {"peer": 10, "other": 20}, "peer", 3, "cpu")
    assert turns == ["peer", "other"] * 4  # the first does not count
    assert [score["n"] for score in scores] == [3, 3]
    assert scores[0]["ratio"] == 1
    assert all(score["low"] <= score["value"] <= score["high"] for score in scores)


def test_its_table_is_printed_as_it_is():
    scores = [
        {"task": "encode", "split": "UBMoE", "metric": "tokens/s", "value": 12345.6, "ratio": 1.5, "ratio_to": "peer"},
        {"task": "encode", "split": "peer", "metric": "tokens/s", "value": 8230.4, "ratio": 1.0, "ratio_to": "peer"},
        {"task": "logits", "split": "UBMoE", "metric": "largest difference", "value": 0.0},
    ]
    table = gpu.table(scores)
    assert table["rows"][0] == ["encode", "UBMoE", "12,346 tokens/s", "1.50x peer"]
    assert [row[3] for row in table["rows"]] == ["1.50x peer", "", ""]
    printed = own_tables([json.loads(json.dumps({"scores": scores, "tables": {"gpu-x": table}}))])
    assert "| encode | UBMoE | 12,346 tokens/s | 1.50x peer |" in printed["gpu-x"]


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    done = []

    def part(name, *tasks, fails=False):
        def measured(*_):
            done.append(name)
            if fails:
                raise ValueError("no memory is left")
            return [{"task": task, "split": "x", "metric": "tokens/s", "value": 1.0, "n": 1} for task in tasks]

        return measured

    monkeypatch.setattr(gpu, "training_step", part("training", "training step"))
    monkeypatch.setattr(gpu, "encoding", part("encoding", "encode", gpu.OFF))
    monkeypatch.setattr("benchmarks.peers.base_folder", lambda base, path: str(path))
    options = ["--model", str(model), "--data-dir", str(tmp_path), "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(gpu, "generating", part("generating", fails=True))
    assert "no memory is left" in CliRunner().invoke(gpu.app, options).output
    monkeypatch.setattr(gpu, "generating", part("generating", "generate", "logits, bfloat16"))
    for _ in range(2):
        ended = CliRunner().invoke(gpu.app, options)
        assert ended.exit_code == 0, ended.output
    assert done == ["training", "generating", "generating", "encoding"]
