"""What is written for the Hub is read back by the Hub's own client, with the numbers of the result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from benchmarks import hub_results
from benchmarks.embedding import AVG7

ROOT = Path(__file__).parents[1]


def test_entries_are_the_test_results_on_datasets_of_mteb(tmp_path):
    hub_results.main(["--out", str(tmp_path / ".eval_results")])
    found = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "mteb.yaml").read_text()))
    values = {entry.task_id.removesuffix("_default_test"): entry.value for entry in found}
    files = [json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("*.json")]
    measured = {
        score["task"]: score["value"]
        for content in files
        if content.get("benchmark") == "embedding" and content["row"] == "ubmoe-135m" and not content.get("limit")
        for score in content["scores"]
        if score["split"] == "test"
    }
    assert len(set(values) & set(AVG7)) >= 6
    assert all(abs(value - measured[task]) < 0.01 for task, value in values.items())
    assert {entry.dataset_id.split("/")[0] for entry in found} == {"mteb"}


def test_a_row_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nobody has no test result"):
        hub_results.main(["--out", str(tmp_path / "out"), "--row", "nobody"])
    assert not (tmp_path / "out").exists()
