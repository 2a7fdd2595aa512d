"""lm-eval's own tasks on local files: prompts, choices and metrics stay lm-eval's, only the rows are local."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import data as local
from benchmarks.results import nearest

TASKS = (
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "winogrande",
    "mmlu",
    "hellaswag",
    "piqa",
    "arc_easy",
    "arc_challenge",
    "wikitext",
)
METRICS: dict[str, tuple[str, ...]] = {
    "truthfulqa_mc1": ("acc",),
    "truthfulqa_mc2": ("acc",),
    "winogrande": ("acc",),
    "mmlu": ("acc",),
    "hellaswag": ("acc_norm", "acc"),
    "piqa": ("acc_norm", "acc"),
    "arc_easy": ("acc_norm", "acc"),
    "arc_challenge": ("acc_norm", "acc"),
    "wikitext": ("word_perplexity",),
}
"""Metrics per task, the one for the tables first."""
DEVIATIONS = {
    "truthfulqa_mc1": "built from the answer lists, a full stop closing each answer as in the official set",
    "truthfulqa_mc2": "built from the answer lists, a full stop closing each answer as in the official set",
    "hellaswag": "texts cleaned upstream; ctx_b keeps its case",
    "arc_easy": "a fifth choice of the few five-choice questions is lost upstream",
    "arc_challenge": "a fifth choice of the few five-choice questions is lost upstream",
    "wikitext": "word-level WikiText-2 with <unk>, not the raw form: perplexities compare only with each other",
}


def _truthfulqa(folder: Path) -> list[dict[str, Any]]:
    def closed(answer: str) -> str:
        answer = answer.strip()
        return answer if answer.endswith(".") else answer + "."

    rows = []
    for row in local.read_jsonl(folder / "lm" / "truthfulqa.jsonl.gz"):
        right = [closed(answer) for answer in row["correct_answers"]]
        wrong = [closed(answer) for answer in row["incorrect_answers"]]
        rows.append(
            {
                "question": row["question"],
                "mc1_targets": {
                    "choices": [closed(row["best_answer"]), *wrong],
                    "labels": [1] + [0] * len(wrong),
                },
                "mc2_targets": {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)},
            }
        )
    return rows


def _winogrande(folder: Path) -> list[dict[str, Any]]:
    rows = local.read_jsonl(folder / "lm" / "winogrande_validation.jsonl")
    return [{**{k: row[k] for k in ("sentence", "option1", "option2")}, "answer": str(row["answer"])} for row in rows]


def _hellaswag(folder: Path) -> list[dict[str, Any]]:
    rows = local.read_jsonl(folder / "lm" / "hellaswag_validation.jsonl.gz")
    columns = []
    for row in rows:  # lm-eval joins label, ctx_a and ctx_b to the query again
        activity, _, context = row["query"].partition(": ")
        columns.append(
            {
                "activity_label": activity,
                "ctx_a": context,
                "ctx_b": "",
                "endings": row["choices"],
                "label": str(row["gold"]),
            }
        )
    return columns


def _piqa(folder: Path) -> list[dict[str, Any]]:
    rows = local.read_jsonl(folder / "lm" / "piqa_validation.jsonl.gz")
    return [{"goal": r["query"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["gold"]} for r in rows]


def _arc(folder: Path, name: str) -> list[dict[str, Any]]:
    letters = "ABCDE"
    return [
        {
            "question": row["query"],
            "choices": {"text": row["choices"], "label": list(letters[: len(row["choices"])])},
            "answerKey": letters[row["gold"]],
        }
        for row in local.read_jsonl(folder / "lm" / f"{name}_test.jsonl.gz")
    ]


def wikitext_pages(text: str) -> list[str]:
    """Articles of a word-level WikiText file: each starts at a title line ` = Title = ` of the first level."""
    pages: list[list[str]] = []
    for line in text.splitlines(keepends=True):
        words = line.split()
        title = len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="
        if title or not pages:
            pages.append([])
        pages[-1].append(line)
    return ["".join(page) for page in pages if "".join(page).strip()]


def _wikitext(folder: Path) -> list[dict[str, Any]]:
    path = folder / "lm" / "wikitext2_tokens_test.txt.gz"
    if not path.exists():
        raise FileNotFoundError(f"Expected {path.name!r} in {str(path.parent)!r}, got nothing there. Use --online.")
    return [{"page": page} for page in wikitext_pages(gzip.decompress(path.read_bytes()).decode("utf-8"))]


def local_documents(task: str, folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Splits of one lm-eval task from local files, with the columns of the official set.

    Args:
        task: Name in lm-eval; MMLU by subject (`mmlu_anatomy`).
        folder: The data folder.

    Raises:
        ValueError: If there is no local form of the task.
        FileNotFoundError: If a file is missing.
    """
    folder = Path(folder)
    if task.startswith("truthfulqa_mc"):
        return {"validation": _truthfulqa(folder)}
    if task == "winogrande":
        return {"validation": _winogrande(folder)}
    if task == "hellaswag":
        return {"validation": _hellaswag(folder)}
    if task == "piqa":
        return {"validation": _piqa(folder)}
    if task in ("arc_easy", "arc_challenge"):
        return {"test": _arc(folder, task)}
    if task == "wikitext":
        return {"test": _wikitext(folder)}
    if task.startswith("mmlu_"):
        subjects = _mmlu(folder)
        if task in subjects:
            return subjects[task]
    raise ValueError(f"Expected a task with local data, got {task!r} ({nearest(task, TASKS)}). Check the name.")


@lru_cache(maxsize=1)
def _mmlu(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for split, file in (("test", "mmlu_test.jsonl.gz"), ("dev", "mmlu_dev.jsonl")):
        for row in local.read_jsonl(folder / "lm" / file):
            subjects.setdefault(f"mmlu_{row['subject']}", {}).setdefault(split, []).append(row)
    return subjects


def mmlu_subjects(folder: Path) -> list[str]:
    """lm-eval names of the subjects in the local MMLU file, sorted."""
    return sorted(_mmlu(folder))


@lru_cache(maxsize=1)
def task_manager() -> Any:
    """lm-eval's list of its tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads thousands of task files: once is enough


def build_tasks(name: str, folder: Path | None) -> dict[str, Any]:
    """lm-eval task objects of one entry of `TASKS`; `mmlu` gives one per subject.

    Args:
        name: Entry of `TASKS`, or any single lm-eval task.
        folder: Local data folder; None: lm-eval fetches the official sets.

    Raises:
        ValueError: If lm-eval does not know the task, with the nearest names.
    """
    manager = task_manager()
    if name != "mmlu" and name not in manager.all_tasks:
        raise ValueError(
            f"Expected a task, got {name!r} ({nearest(name, [*TASKS, *manager.all_tasks])}). Check the name."
        )
    if folder is None:
        return dict(manager.load([name])["tasks"])
    tasks: dict[str, Any] = {}
    for single in mmlu_subjects(folder) if name == "mmlu" else [name]:
        with _local_loading(local_documents(single, folder)):
            tasks |= manager.load([single])["tasks"]
    return tasks


@contextmanager
def _local_loading(splits: Mapping[str, list[dict[str, Any]]]) -> Iterator[None]:
    """Give lm-eval local rows where it asks `datasets` for the official set; its tasks load when they are made."""
    import datasets

    columns = next(rows[0] for rows in splits.values() if rows)
    empty: dict[str, list[Any]] = {key: [] for key in columns}
    content = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items() if rows})
    for split in ("train", "validation", "test"):  # named by the tasks for few-shot examples; never read at 0 shots
        if split not in content:
            content[split] = datasets.Dataset.from_dict(empty)
    official = datasets.load_dataset
    datasets.load_dataset = lambda *args, **kwargs: content
    try:
        yield
    finally:
        datasets.load_dataset = official
