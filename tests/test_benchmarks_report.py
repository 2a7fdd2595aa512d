"""The report: every number from a result file, the same bytes twice, differences found."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from benchmarks import report
from benchmarks.embedding import AVG7, SICK_TEST, averages
from benchmarks.figures import curves
from benchmarks.results import read_all

RUN = {
    "command": "python -m benchmarks.x",
    "date": "2026-01-02T03:04:05Z",
    "commit": "abc",
    "cpu": "CPU",
    "threads": 2,
    "dtype": "float32",
}
CARD = "---\nlibrary_name: sentence-transformers\n# results:model-index\n# /results:model-index\n---\n# Card\n"


def score(task: str, value: float, metric: str = "cosine_spearman", **facts) -> dict:
    spread = {"low": value - 2, "high": value + 2, "sd": 1.0, "n": 10}
    return {"task": task, "split": "test", "metric": metric, "value": value, **spread, **facts}


def write(folder: Path, name: str, **content) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"schema": 1, "run": RUN, **content}))


@pytest.fixture
def root(tmp_path) -> Path:
    results = tmp_path / "results"
    results.mkdir()
    for row, label, shift in (("ubmoe-135m", "ubmoe-135m", 0.0), ("near", "near", 1.0), ("far", "far", -30.0)):
        scores = [score(task, 70.0 + i + shift) for i, task in enumerate((*AVG7, SICK_TEST, "BIOSSES", "STS17"))]
        scores.append(score("trec", 61.25 + shift, "accuracy"))
        facts = {"row": row, "label": label, "supervision": "none"}
        write(results, f"embedding-{row}", benchmark="embedding", **facts, averages=averages(scores), scores=scores)
        scores = [score("toy", 33.5 + shift, metric) for metric in ("nDCG@10", "R@100")]
        write(results, f"retrieval-{row}", benchmark="retrieval", **facts, scores=scores)
    for row, digest, value in (("base", "x", 41.5), ("ubmoe-135m", "x", 41.5), ("ubmoe-135m-router", "y", 42.0)):
        scores = [score("winogrande", value, "acc", answers_sha256=digest)]
        write(results, f"generation-{row}", benchmark="generation", row=row, label=row, scores=scores)
    facts = {
        "split": "s",
        "label": "UBMoE",
        "value": 123.0,
        "low": 120.0,
        "high": 130.0,
        "ratio": 1.25,
        "ratio_to": "peer",
    }
    write(
        results,
        "speed-m",
        benchmark="speed",
        row="m",
        label="m",
        scores=[{"task": "encode short", "metric": "tokens/s", **facts}],
    )
    write(
        results,
        "ablation",
        benchmark="ablation",
        row="a",
        tables={"ablation": {"columns": ["what", "x"], "rows": [["FFN", 1.5]]}},
    )
    regions = "\n\n".join(f"<!-- results:{n} -->\n<!-- /results:{n} -->" for n in [*report.TABLES, "ablation"])
    (tmp_path / "README.md").write_text(f"# T\n\n{regions}\n\nend\n")
    (tmp_path / "MODEL_CARD.md").write_text(CARD)
    return tmp_path


def call(root: Path, *arguments: str):
    options = ["--results-dir", str(root / "results"), "--root", str(root), *arguments]
    return CliRunner().invoke(report.app, options)


def numbers_of(value) -> set[str]:
    """Every number of a JSON value as the report may print it, and every number inside its strings."""
    found: set[str] = set()
    if isinstance(value, dict):
        for part in value.values():
            found |= numbers_of(part)
    elif isinstance(value, list):
        for part in value:
            found |= numbers_of(part)
    elif isinstance(value, str):
        found |= set(re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = abs(value)
        found |= {f"{number:.{digits}f}" for digits in range(4)} | {f"{number:.2f}".rstrip("0").rstrip(".")}
    return found


def printed_numbers(text: str) -> list[str]:
    """Numbers in the cells of the tables of all regions; headers are words, and so is the 12-digit commit."""
    found = []
    for region in report.REGION.finditer(text):
        rows = [line for line in region.group(0).splitlines() if line.startswith("|")]
        for row in rows[2:]:
            row = re.sub(r"\| [0-9a-f]{12}(?:\+changes)? (?=\|)", "", row)  # may be digits only
            found += re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)", row)
    return found


def test_a_second_report_changes_nothing_and_check_finds_an_edit(root):
    assert call(root).exit_code == 0
    text = (root / "README.md").read_text()
    assert "*Not measured yet.*" in text  # nothing was measured on development splits or memory
    assert "| FFN | 1.50 |" in text
    assert text.endswith("end\n")
    assert call(root, "--check").exit_code == 0
    (root / "README.md").write_text(text.replace("41.5", "51.5", 1))
    outcome = call(root, "--check")
    assert outcome.exit_code == 1
    assert "README.md" in outcome.output
    assert call(root).exit_code == 0
    assert (root / "README.md").read_text() == text


def test_every_printed_number_is_from_a_result_file(root):
    call(root)
    text = (root / "README.md").read_text()
    known = numbers_of(read_all(root / "results"))
    printed = printed_numbers(text)
    assert len(printed) > 100
    assert set(printed) <= known
    assert not set(printed_numbers(text.replace("41.5", "51.7"))) <= known


def test_noise_is_marked_by_the_spread_of_both(root):
    """70 against 71 with deviations of 1 each is noise (limit 2.77), 70 against 40 is not."""
    assert report.inside_noise({"value": 70, "sd": 1}, {"value": 72.7, "sd": 1})
    assert not report.inside_noise({"value": 70, "sd": 1}, {"value": 72.8, "sd": 1})
    rows = report.sts(read_all(root / "results")).splitlines()
    assert report.INSIDE in next(row for row in rows if row.startswith("| near"))
    assert report.INSIDE not in next(row for row in rows if row.startswith("| far"))


def test_noise_of_the_same_samples_is_tested_in_pairs():
    """A difference of 1 in each of 20 samples that spread by 30 is none by the spread, but is by the pairs."""
    rng = np.random.default_rng(0)
    values = rng.normal(50, 30, 20)
    facts = {"sd": 6.7, "n": 20, "samples": {"t": list(range(20))}}
    first = {**facts, "value": values.mean(), "outcomes": values.tolist()}
    shifted = values + 1 + rng.normal(0, 0.5, 20)
    second = {**facts, "value": shifted.mean(), "outcomes": shifted.tolist()}
    assert scipy.stats.ttest_rel(values, shifted).pvalue < 0.01
    assert not report.inside_noise(first, second)
    assert report.inside_noise(first, {**second, "samples": {"t": list(range(1, 21))}})
    noisy = values + rng.normal(0, 30, 20)
    assert scipy.stats.ttest_rel(values, noisy).pvalue > 0.1
    assert report.inside_noise(first, {**second, "value": noisy.mean(), "outcomes": noisy.tolist()})
    assert report.inside_noise({**first, "outcomes": "0110"}, {**first, "outcomes": "0110"})
    assert not report.inside_noise(
        {**first, "outcomes": [[-9.0, 3]] * 2}, {**first, "outcomes": [[-7.0, 3], [-8.0, 3]]}
    )


def test_equal_answers_are_marked_equal(root):
    text = report.generation(read_all(root / "results"))
    lines = {row: next(line for line in text.splitlines() if row in line) for row in ("**ubmoe-135m**", "router")}
    assert "| = 41.5 |" in lines["**ubmoe-135m**"]
    assert "=" not in lines["router"]


def test_of_several_samples_of_a_task_the_largest_is_shown(root):
    file = root / "results" / "generation-ubmoe-135m-router.json"
    content = json.loads(file.read_text())
    content["scores"].append(score("winogrande", 47.5, "acc", answers_sha256="z") | {"n": 40})
    content["scores"].append(score("winogrande", 12.5, "acc", answers_sha256="z") | {"n": 20})
    file.write_text(json.dumps(content))
    text = report.generation(read_all(root / "results"))
    assert "47.5" in text
    assert "42.0" not in text
    assert "12.5" not in text
    assert "Winogrande (10/40)" in text


def test_figures_are_the_same_bytes_twice(root):
    results = read_all(root / "results")
    first = report.figures(results)
    assert set(first) == {"sts.svg", "generation.svg", "retrieval.svg"}
    assert first == report.figures(results)
    assert all("dc:date" not in text for text in first.values())
    next(r for r in results if r["row"] == "near")["averages"]["avg7"]["value"] += 0.5
    assert report.figures(results)["sts.svg"] != first["sts.svg"]


def test_the_model_index_is_read_back_by_the_hub_library(root):
    from huggingface_hub import ModelCard

    call(root)
    card = ModelCard((root / "MODEL_CARD.md").read_text())
    assert card.data.library_name == "sentence-transformers"
    values = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert values["MTEB STS12"] == 70.0
    assert values["toy (local collection)"] == 33.5
    assert values["Winogrande (10 samples)"] == 41.5
    assert call(root, "--check").exit_code == 0


def test_the_first_table_has_every_released_model_by_its_own_files(root):
    """What is said of training is what the file says; scores come from the other benchmarks of the same row."""
    facts = {"base": "Base-0.5B", "base_origin": "gguf", "base_millions": 134.515, "added_millions": 3.041}
    facts |= {"added_percent": 2.26, "dimension": 576, "training": "distilled from all-MiniLM-L6-v2"}
    for row in ("far", "ubmoe-135m"):
        write(root / "results", f"models-{row}", benchmark="models", row=row, label=row, scores=[], facts=facts)
    results = read_all(root / "results")
    first, second = (line.split(" | ") for line in report.models(results).splitlines()[2:])
    assert first[0] == "| **ubmoe-135m**"
    assert first[1:5] == [
        "Base-0.5B, dequantised",
        "134.5 M / 3.04 M (2.26 %)",
        "576",
        "distilled from all-MiniLM-L6-v2",
    ]
    assert first[6].startswith("73.00")
    assert first[8] == "every answer is the base's"
    assert second[0] == "| **far**"
    assert second[6].startswith("43.00")
    assert second[8] == ""
    assert "| **far** |" in report.sts(results)
    next(r for r in results if r["file"] == "generation-base.json")["scores"][0]["answers_sha256"] = "z"
    assert "differs from the base" in report.models(results)
    next(r for r in results if r["file"] == "generation-ubmoe-135m.json")["base_row"] = "another"
    assert "the base" not in report.models(results), "compared with a base that is not its own"


def test_rows_of_the_development_set_are_in_no_table_of_tests(root):
    dev = score("Dolly-dev", 91.25, "nDCG@10") | {"split": "dev"}
    facts = {"row": "near-weighted", "label": "near + BM25", "supervision": "none", "fusion": "weighted", "weight": 0.7}
    write(root / "results", "retrieval-near-weighted", benchmark="retrieval", **facts, scores=[dev])
    results = read_all(root / "results")
    assert "near + BM25 (0.7 vectors) | 91.2 [89.2, 93.2] |" in report.retrieval_dev(results)
    assert "BM25" not in report.retrieval(results)
    assert "91.25" not in report.model_index(results, "near-weighted")
    assert "near + BM25" not in report.figures(results)["retrieval.svg"]


def curve(folder: Path, name: str, **changes) -> None:
    entries = [{"step": 10 * n, "eval_A-dev_spearman_cosine": n / 10, "eval_B_cosine_ndcg@10": 0.5} for n in (1, 2)]
    summary = {"curve": entries, "steps": 20, "processes": 2, "seconds": 100.0, "tokens_per_second_and_process": 5.0}
    (folder / name).mkdir(parents=True)
    (folder / name / "training.json").write_text(json.dumps(summary | changes))


def test_curves_have_the_tokens_of_their_steps_or_a_share_of_all(tmp_path):
    curve(tmp_path, "by-time")
    curve(tmp_path, "by-total", tokens=700)
    curve(tmp_path, "exact", curve=[{"step": 1, "tokens": 42, "x_spearman_cosine": 0.25, "y_spearman_cosine": 0.75}])
    found = curves(tmp_path)
    assert found["by-time"]["tokens"] == [500, 1000]
    assert found["by-total"]["tokens"] == [700, 1400]
    assert found["exact"]["tokens"] == [42]
    assert [one["exact"] for one in found.values()] == [False, False, True]
    assert found["by-time"]["scores"]["A-dev", "spearman_cosine"] == pytest.approx([10, 20])
    assert found["by-time"]["scores"]["B", "cosine_ndcg@10"] == [50, 50]
    drawn = report.figures([], tmp_path)
    assert set(drawn) == {"training.svg"}
    assert "by-time (tokens by steps)" in drawn["training.svg"]
    assert "log axis" in drawn["training.svg"]
    (tmp_path / "exact" / "training.json").write_text("{}")
    with pytest.raises(ValueError, match=r"exact.training\.json, got one without 'curve'"):
        curves(tmp_path)


def test_dependence_is_drawn_for_the_longest_documents():
    parts = {"main": 1.0, "before": 39.0, "after": 60.0, "documents": 3, "layers": [[1, 39, 60], [2, 40, 58]]}
    rows = {name: {"buckets": {"0-256": parts, "1024-2048": parts}} for name in ("base", "FFN")}
    (text,) = report.figures([{"benchmark": "dependence", "row": "dependence", "rows": rows, "scores": []}]).values()
    assert "1024-2048 tokens" in text
    assert all(f">{word}<" in text for word in ("base", "FFN", "layer"))


def test_an_unknown_table_is_refused_with_the_nearest(root):
    (root / "README.md").write_text("<!-- results:generatoin -->\n<!-- /results:generatoin -->\n")
    outcome = call(root)
    assert outcome.exit_code == 1
    assert "nearest: generation" in outcome.output


def test_the_documents_of_this_repository_are_up_to_date():
    results = read_all()
    for path, text in report.outputs(results).items():
        assert path.exists(), f"{path.name} is missing; run python -m benchmarks.report"
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs; run python -m benchmarks.report"
        if path.suffix == ".md":
            assert set(printed_numbers(text)) <= numbers_of(results), path.name


def test_the_card_names_the_datasets_that_mteb_reads():
    mteb = pytest.importorskip("mteb")
    for name, path in report.MTEB_DATASETS.items():
        assert mteb.get_task(name).metadata.dataset["path"] == path


def test_a_folder_without_results_wipes_nothing(root):
    outcome = call(root, "--results-dir", str(root / "result"))
    assert outcome.exit_code == 1
    assert "expected result files" in outcome.output
    assert not (root / "README.md").exists() or "results:" in (root / "README.md").read_text()


def test_what_was_measured_in_turns_has_a_table_for_each_checkpoint():
    label = {"label": "UBMoE", "split": "ubmoe"}
    scores = [
        {"task": "decode", "metric": "tokens/s", "value": 9.26, "low": 8.0, "high": 12.4, "share": 0.5, **label},
        {"task": "one line", "metric": "ms", "value": 0.25, "p95": 20.2, "ratio": 1.5, "ratio_to": "stock", **label},
        {"task": "encode short", "metric": "tokens/s", "value": 1.0, "ratio": 1.0, "ratio_to": "stock", **label},
    ]
    run = {"processor": {"avx2": True, "amx": False}}
    text = report.in_turns([{"benchmark": "speed", "row": "m", "label": "m", "run": run, "scores": scores}])
    assert text.splitlines()[0] == "m, instructions: avx2"
    assert text.splitlines()[4:] == [
        "| decode | UBMoE | 9.3 [8.0, 12] tokens/s |  | 0.50 |  |",
        "| one line | UBMoE | 0.25 (p95 20) ms | 1.50 |  | stock |",
    ]
    assert (
        report.in_turns([{"benchmark": "speed", "row": "m", "label": "m", "scores": scores[2:]}])
        == "*Not measured yet.*"
    )
