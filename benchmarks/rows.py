"""Which rows and scores of the result files the tables and figures show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL = "ubmoe-135m"
"""Row that the others are compared with, and that the model card is about."""
TASK_LABELS = {
    "truthfulqa_mc1": "TruthfulQA MC1",
    "truthfulqa_mc2": "TruthfulQA MC2",
    "winogrande": "Winogrande",
    "mmlu": "MMLU subset",
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "wikitext": "WikiText-2 ppl",
}

Results = list[dict[str, Any]]


def of(results: Results, benchmark: str) -> Results:
    """The result files of one benchmark, without quick looks (`--limit`)."""
    return [content for content in results if content.get("benchmark") == benchmark and not content.get("limit")]


def of_generation(results: Results) -> Results:
    """The generation files; of a task measured on several samples only the largest."""
    files = []
    for content in of(results, "generation"):
        largest: dict[tuple[str, str], dict[str, Any]] = {}
        for score in content["scores"]:
            key = (score["task"], score["metric"])
            if key not in largest or score["n"] > largest[key]["n"]:
                largest[key] = score
        files.append({**content, "scores": list(largest.values())})
    return files


def pick(content: Mapping[str, Any] | None, **wanted: Any) -> dict[str, Any] | None:
    """The first score of a file whose entries equal all of `wanted`, or None."""
    if content is None:
        return None
    return next((s for s in content["scores"] if all(s.get(k) == v for k, v in wanted.items())), None)


def row_of(results: Results, row: str = MODEL) -> dict[str, Any] | None:
    """The file of one row, or None."""
    return next((content for content in results if content["row"] == row), None)


def released(results: Results) -> list[str]:
    """Rows of the released models: those that `benchmarks.models` described."""
    return [content["row"] for content in of(results, "models")] or [MODEL]
