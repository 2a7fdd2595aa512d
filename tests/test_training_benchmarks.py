"""The ablation and dependence benchmarks on a tiny model: files, resuming, tables."""

from __future__ import annotations

import math

import pytest
from helpers.benchmark_data import WORDS, make_base, make_data
from typer.testing import CliRunner

pytest.importorskip("lm_eval")
pytest.importorskip("mteb")
pytest.importorskip("peft")

from benchmarks import ablation, dependence
from benchmarks.report import own_tables
from benchmarks.results import read_json
from training.mixtures import Mixture
from training.recipe import ContrastiveRecipe

BUCKETS = ((0, 32), (32, 64), (64, 128), (128, 256))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def budget(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    lines = [f"{a} {b} {c}" for a, b, c in zip(WORDS * 3, WORDS[::-1] * 3, sorted(WORDS) * 3)]
    (folder / "lines.txt").write_text("\n".join(lines))
    trainer = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 0.1, "use_cpu": True, "seed": 0}
    return ContrastiveRecipe(
        base=str(make_base(folder / "base")),
        out=str(folder / "out"),
        sentences=Mixture({str(folder / "lines.txt"): 1.0}, words=(1, 9)),
        rank=2,
        attention_dropout=0.2,
        evaluate={},
        trainer={**trainer, "save_strategy": "no"},
    )


def test_ablation_keeps_rows_and_measures_both_views(budget, data, tmp_path):
    said = []
    names = ["STSBenchmark:validation"]
    facts = {"out": tmp_path, "pages": 1, "say": said.append}
    rows = ["base-causal", "base-bidirectional", "ffn", "attention"]
    path = ablation.run(budget, rows[:3], names, data, **facts)
    content = read_json(ablation.run(budget, rows, names, data, **facts))
    assert sum("kept" in line for line in said) == 3
    found = content["rows"]
    assert list(found) == rows
    perplexity = {row: found[row]["wikitext_word_perplexity"] for row in rows}
    assert perplexity["base-causal"] == perplexity["base-bidirectional"] > 1
    # Trained weights change the causal model too: that is why the experts are separate.
    assert len({round(value, 6) for value in perplexity.values()}) == 3
    scores = {row: found[row]["scores"][names[0]] for row in rows}
    # Not vacuous: attention direction and training change the ranks.
    assert len({round(value, 6) for value in scores.values()}) >= 3
    (table,) = own_tables([{"file": path.name, **content}]).values()
    assert "FFN" in table
    assert f"{perplexity['ffn']:.2f}" in table
    assert all(math.isfinite(value) for value in perplexity.values())
    with pytest.raises(ValueError, match=r"nearest: .*ffn"):
        ablation.run(budget, ["ffm"], names, data, out=tmp_path)


def test_dependence_of_base_and_trainings(budget, data, tmp_path):
    pytest.importorskip("matplotlib")
    ablation.open_row("attention", budget)
    texts = [("x" + " and the cat" * n)[:250] for n in (1, 4, 7, 15, 2, 20)]
    models = {"base": ("base", budget.base), "ATT": ("run", f"{budget.out}/attention")}
    said = []
    facts = {"out": tmp_path, "plot": tmp_path / "d.svg", "buckets": BUCKETS, "say": said.append}
    dependence.run(dict([*models.items()][:1]), texts, **facts)
    content = read_json(dependence.run(models, texts, **facts))
    assert "base: kept" in said
    for row in content["rows"].values():
        for bucket in row["buckets"].values():
            assert bucket["main"] + bucket["before"] + bucket["after"] == pytest.approx(100)
    base, trained = (content["rows"][label]["buckets"]["64-128"] for label in ("base", "ATT"))
    assert abs(base["after"] - trained["after"]) > 1e-4
    assert base["documents"] == trained["documents"] > 0
    assert " / " in own_tables([content])["dependence"]
    assert "<svg" in (tmp_path / "d.svg").read_text()
    with pytest.raises(ValueError, match="base, model or run"):
        dependence.open_row("x", "y")


@pytest.mark.parametrize(
    ("command", "arguments", "what"),
    [
        (dependence, [], "docs-enwiki2015-sample.jsonl.gz"),
        (ablation, ["--recipe", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(command, arguments, what, tmp_path):
    outcome = CliRunner().invoke(command.app, [*arguments, "--data-dir", str(tmp_path), "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("error: ")
    assert what in outcome.stderr
    assert outcome.stderr.count("\n") == 1
