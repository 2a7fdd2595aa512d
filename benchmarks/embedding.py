"""Embedding quality through mteb: `python -m benchmarks.embedding --tasks sts`.

The tasks are mteb's own objects with mteb's own metrics. With `--data-dir` (default `$UBMOE_DATA` or `../shared/data`)
only their loading is replaced by local files; with `--online` mteb fetches the official data. Finished tasks are kept:
the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks import data as local
from benchmarks.options import DataDir, ResultsFolder
from benchmarks.results import (
    RESULTS,
    ResultFile,
    bootstrap_mean,
    bootstrap_spearman,
    command_line,
    interval,
    nearest,
    one_line_errors,
    run_record,
    spearman,
)
from training.data import data_folder
from ubmoe_st.serving.command import ComputeOption

if TYPE_CHECKING:
    from mteb import AbsTask

    from benchmarks.peers import Encoder

logger = logging.getLogger(__name__)

AVG7 = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R")
AVG9 = (*AVG7, "BIOSSES", "STS17")
AVG10 = (*AVG9, "STS22")
SICK_TEST = "SICK-R (own test split)"
"""The 4,927 pairs that SentEval and SimCSE call SICK-R; mteb's SICK-R is all 9,927 pairs."""
SUBSETS = {"STS17": "en-en", "STS22": "en", "STS22.v2": "en"}


@dataclass(frozen=True)
class TaskSet:
    """A named set of tasks: what it is with a network, and what of it local folders can hold."""

    official: tuple[str, ...]
    local: tuple[str, ...]


SETS: dict[str, TaskSet] = {
    "sts": TaskSet(AVG10, AVG9),
    "sts-dev": TaskSet(("STSBenchmark:validation",), ("STSBenchmark:validation", "SICK-R:validation")),
    "retrieval-small": TaskSet(
        ("NanoSciFactRetrieval", "NanoNFCorpusRetrieval", "NanoArguAnaRetrieval", "NanoSCIDOCSRetrieval"),
        ("cranfield", "cisi", "adi"),
    ),
    "classification-small": TaskSet(
        ("Banking77Classification", "EmotionClassification", "TweetSentimentExtractionClassification"),
        ("Banking77Classification", "trec", "mr"),
    ),
}
BENCHMARK = "MTEB(eng, v2)"
LOCAL_CLASSIFICATION = {"Banking77Classification": "banking77", "trec": "trec", "mr": "mr"}
LOCAL_STS = tuple(dict.fromkeys(task for task, _ in local.STS_FILES))


def split_name(name: str, default: str = "test") -> tuple[str, str]:
    """`STSBenchmark:validation` as task and split; without a colon the split is `default`."""
    task, _, split = name.partition(":")
    return task, split or default


def expand(names: Sequence[str], *, online: bool, folder: Path | None = None) -> tuple[list[str], list[str]]:
    """Task names of sets and tasks, and those left out because there is no local data for them.

    Args:
        names: Names of sets (`SETS`, `MTEB(eng, v2)`) and tasks, tasks with an optional `:split`.
        online: Use the official data.
        folder: Local data folder, when not online.

    Raises:
        ValueError: If a name is unknown, with the nearest ones.
    """
    tasks: list[str] = []
    missing: list[str] = []
    available = set(LOCAL_STS) | set(LOCAL_CLASSIFICATION)
    if folder is not None:
        available |= set(local.collections(folder))
    for name in names:
        if name in SETS:
            tasks += SETS[name].official if online else SETS[name].local
            if not online:
                missing += [task for task in SETS[name].official if split_name(task)[0] not in available]
            continue
        if name == BENCHMARK:
            import mteb

            wanted = [task.metadata.name for task in mteb.get_benchmark(BENCHMARK).tasks]
            tasks += [task for task in wanted if online or task in available]
            missing += [task for task in wanted if not online and task not in available]
            continue
        task = split_name(name)[0]
        if not online and task not in available:
            known = [*SETS, BENCHMARK, *sorted(available)]
            if _official_exists(task):
                raise ValueError(
                    f"Expected a task with local data, got {task!r}, which mteb has only on the Hub. Use --online, "
                    f"or one of: {', '.join(known)}."
                )
            raise ValueError(f"Expected a task or set, got {task!r} ({nearest(task, known)}). Check the name.")
        if online and not _official_exists(task):
            raise ValueError(
                f"Expected a task or set, got {task!r} ({nearest(task, [*SETS, BENCHMARK, *_official_names()])}). "
                "Check the name."
            )
        tasks.append(name)
    return list(dict.fromkeys(tasks)), list(dict.fromkeys(missing))


def _official_names() -> list[str]:
    import mteb

    return [task.metadata.name for task in mteb.get_tasks()]


def _official_exists(name: str) -> bool:
    import mteb

    try:
        mteb.get_task(name)
    except KeyError:
        return False
    return True


def official_task(name: str, split: str = "test") -> AbsTask:
    """Mteb's task, restricted to English and to one split; its data is not loaded yet."""
    import mteb

    subset = SUBSETS.get(name)
    task = mteb.get_task(name, hf_subsets=[subset]) if subset else mteb.get_task(name)
    return task.filter_eval_splits([split]) if name in LOCAL_STS else task


def local_task(
    name: str, folder: str | Path, split: str = "test", *, limit: int | None = None, seed: int = 0
) -> AbsTask:
    """The task with its data taken from a local folder; class, columns and metric stay mteb's.

    Args:
        name: An STS or classification task, or a BEIR folder under `retrieval/`.
        folder: The data folder.
        split: Split to evaluate.
        limit: Keep a seeded sample of so many STS pairs; None: all.
        seed: Of the sample.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If a file is missing.
    """
    from datasets import Dataset, DatasetDict

    folder = Path(folder)
    if name in LOCAL_STS:
        columns = local.sts_pairs(folder, name, split)
        if limit is not None and limit < len(columns["score"]):
            rows = sorted(np.random.default_rng(seed).choice(len(columns["score"]), limit, replace=False))
            columns = {key: [values[row] for row in rows] for key, values in columns.items()}
        task = official_task(name, split)
        content: Any = DatasetDict({split: Dataset.from_dict(columns)})
        _give_data(task, {SUBSETS[name]: content} if name in SUBSETS else content)
        return task
    if name in LOCAL_CLASSIFICATION:
        splits = local.labelled_texts(folder, LOCAL_CLASSIFICATION[name])
        if set(splits) == {"all"}:  # no official split: even rows train, odd rows test
            splits = {
                part: {key: values[start::2] for key, values in splits["all"].items()}
                for part, start in (("train", 0), ("test", 1))
            }
        task = official_task(name) if name.endswith("Classification") else _own_task(name, "Classification", "accuracy")
        _give_data(task, DatasetDict({part: Dataset.from_dict(columns) for part, columns in splits.items()}))
        return task
    if name in local.collections(folder):
        collection = local.open_collection(folder, name)
        task = _own_task(name, "Retrieval", "ndcg_at_10")
        documents = collection.documents
        _give_data(
            task,
            {
                "default": {
                    "test": {
                        "corpus": Dataset.from_dict(
                            {"id": list(documents), "title": [""] * len(documents), "text": list(documents.values())}
                        ),
                        "queries": Dataset.from_dict(
                            {"id": list(collection.queries), "text": list(collection.queries.values())}
                        ),
                        "relevant_docs": {query: dict(grades) for query, grades in collection.relevance.items()},
                        "top_ranked": None,
                    }
                }
            },
        )
        return task
    known = [*LOCAL_STS, *LOCAL_CLASSIFICATION, *local.collections(folder)]
    raise ValueError(f"Expected a task with local data, got {name!r} ({nearest(name, known)}). Check the name.")


def _give_data(task: Any, dataset: Any) -> None:
    task.dataset = dataset
    task.data_loaded = True


def _own_task(name: str, kind: Any, metric: str) -> AbsTask:
    """A task of mteb's classes for a collection that mteb does not list."""
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata(
        name=name,
        description=f"The {name} collection, from a local folder.",
        reference=None,
        dataset={"path": f"local/{name}", "revision": "local"},
        type=kind,
        category="t2t" if kind == "Retrieval" else "t2c",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=metric,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )
    base: Any = AbsTaskRetrieval if kind == "Retrieval" else AbsTaskClassification
    return type(f"Local{name.title()}", (base,), {"metadata": metadata})()


def score_task(
    model: Any,
    task: AbsTask,
    split: str,
    *,
    seed: int,
    cache: Any = None,
    batch_size: int = 32,
    resamples: int = 1000,
    progress: bool = True,
    sick_test_rows: int = local.SICK_TEST_ROWS,
) -> list[dict[str, Any]]:
    """Run one task through `mteb.evaluate`: its main score x100 with a bootstrap interval.

    Args:
        model: What mteb takes, such as `mteb_model.wrap(...)`.
        task: Official or local form.
        split: Its split.
        seed: Of the bootstrap.
        cache: An `mteb.ResultCache` that keeps mteb's own result files; None: none kept.
        batch_size: Texts per batch.
        resamples: Draws of the bootstrap.
        progress: Show mteb's progress bars.
        sick_test_rows: Pairs of SICK-R's own test split, the last ones.

    Returns:
        Scores for a result file; SICK-R gives two, see `SICK_TEST`.

    Raises:
        RuntimeError: If mteb's saved predictions do not give mteb's own score.
    """
    import mteb

    name = task.metadata.name
    with tempfile.TemporaryDirectory() as folder:
        result = mteb.evaluate(
            model,
            task,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": progress},
            cache=cache,
            overwrite_strategy="always",
            prediction_folder=folder,
            co2_tracker=False,
            show_progress_bar=progress,
        )
        entry = result.task_results[0].scores[split][0]
        files = list(Path(folder).glob("*_predictions.json"))
        predictions = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
    value = 100 * float(entry["main_score"])
    score: dict[str, Any] = {"task": name, "split": split, "metric": task.metadata.main_score, "value": value}
    if task.metadata.type == "STS":
        subset = entry["hf_subset"]
        cosines = predictions[subset][split]["cosine_scores"]
        gold = _rows(task, subset, split)["score"]
        draws = bootstrap_spearman(gold, cosines, seed=seed, resamples=resamples)
        direct = spearman(gold, cosines)
        if abs(direct - value) > 1e-6:
            raise RuntimeError(
                f"Expected mteb's predictions of {name} to give {value:.4f}, got {direct:.4f}. Report it."
            )
        scores = [{**score, **_spread(draws), "n": len(gold)}]
        if name == "SICK-R" and split == "test" and len(gold) > sick_test_rows:
            gold, cosines = gold[-sick_test_rows:], cosines[-sick_test_rows:]
            draws = bootstrap_spearman(gold, cosines, seed=seed, resamples=resamples)
            part = {**score, "task": SICK_TEST, "value": spearman(gold, cosines)}
            scores.append({**part, **_spread(draws), "n": len(gold)})
        return scores
    if "scores_per_experiment" in entry:
        values = [100 * float(one[task.metadata.main_score]) for one in entry["scores_per_experiment"]]
        return [{**score, **_spread(bootstrap_mean(values, seed=seed, resamples=resamples)), "n": len(values)}]
    return [score]


def _rows(task: Any, subset: str, split: str) -> Any:
    dataset = task.dataset
    if dataset is None:  # mteb unloads what it loaded itself
        task.load_data()
        dataset = task.dataset
    return dataset[subset][split] if subset in dataset else dataset[split]


def _spread(draws: np.ndarray) -> dict[str, float]:
    low, high = interval(draws)
    return {"low": low, "high": high, "sd": float(draws.std())}


def averages(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """`avg7`, `avg9` (without STS22), `avg10` and `avg7_sick_test` of the STS test scores that are all there."""
    by_task = {score["task"]: score for score in scores if score["split"] == "test"}
    sets = {"avg7": AVG7, "avg7_sick_test": (*AVG7[:-1], SICK_TEST), "avg9": AVG9, "avg10": AVG10}
    found: dict[str, dict[str, float]] = {}
    for name, tasks in sets.items():
        if all(task in by_task for task in tasks):
            value = float(np.mean([by_task[task]["value"] for task in tasks]))
            deviation = float(np.sqrt(sum(by_task[task]["sd"] ** 2 for task in tasks))) / len(tasks)
            found[name] = {
                "value": value,
                "low": value - 1.96 * deviation,
                "high": value + 1.96 * deviation,
                "sd": deviation,
                "n": len(tasks),
            }
    return found


def run(
    encoder: Encoder,
    names: Sequence[str],
    *,
    folder: Path | None,
    out: str | Path = RESULTS,
    mteb_files: str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    command: str = "",
    progress: bool = True,
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Evaluate one encoder on tasks and write `embedding-<row>.json` after each of them.

    Args:
        encoder: From `peers.open_encoder`.
        names: Task names, already expanded.
        folder: Local data folder; None: official data.
        out: Folder of the result files.
        mteb_files: Folder for mteb's own result files, which mteb's leaderboard reads; None: none kept.
        seed: Of the bootstrap and of the sample of `limit`.
        limit: STS pairs per task, for a quick look; such results go to a file of their own.
        batch_size: Texts per batch.
        resamples: Draws of the bootstrap.
        command: Recorded as it is.
        progress: Show progress bars.
        say: Takes one line per task.

    Returns:
        The result file.
    """
    import mteb

    from benchmarks.mteb_model import wrap

    source = "local" if folder else "official"
    record = run_record(
        command,
        seed=seed,
        packages=("mteb", "scipy"),
        dtype=encoder.dtype,
        prompt=encoder.prompt,
        pooling=encoder.pooling,
        fingerprint=encoder.fingerprint,
    )
    suffix = f"-limit{limit}" if limit else ""
    file = ResultFile(
        Path(out) / f"embedding-{encoder.row}{suffix}.json",
        benchmark="embedding",
        row=encoder.row,
        run=record,
        label=encoder.label,
        supervision=encoder.supervision,
        limit=limit,
    )
    cache = None if limit or mteb_files is None else mteb.ResultCache(Path(mteb_files) / source)
    model = wrap(encoder)
    for position, name in enumerate(names, start=1):
        task_name, split = split_name(name)
        if found := file.find(task=task_name, split=split, data=source):
            say(f"{position}/{len(names)} {name}: {found['value']:.2f} (kept)")
            continue
        start = time.perf_counter()
        task = (
            local_task(task_name, folder, split, limit=limit, seed=seed) if folder else official_task(task_name, split)
        )
        keep = cache if split == "test" else None
        scores = score_task(
            model, task, split, seed=seed, cache=keep, batch_size=batch_size, resamples=resamples, progress=progress
        )
        seconds = round(time.perf_counter() - start, 1)
        file.add(*({**score, "data": source, "seconds": seconds} for score in scores))
        file.add(averages=averages(file.content["scores"]))
        say(f"{position}/{len(names)} {name}: {scores[0]['value']:.2f} in {seconds:.0f} s")
    return file.path


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint folder or peer; repeat for more rows.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks (NAME or NAME:split) or sets; repeat for more.")
    ] = None,
    data_dir: DataDir = None,
    online: Annotated[bool, typer.Option(help="Fetch the official data from the Hub instead.")] = False,
    base: Annotated[str | None, typer.Option(help="Base model of the base-* peers; default $UBMOE_BASE.")] = None,
    out: ResultsFolder = RESULTS,
    mteb_files: Annotated[Path, typer.Option(help="Folder for mteb's own result files.")] = Path("runs/mteb"),
    seed: int = 0,
    limit: Annotated[int | None, typer.Option(help="STS pairs per task (seeded sample), for a quick look.")] = None,
    batch_size: int = 32,
    threads: Annotated[int | None, typer.Option(help="torch threads; default: torch's choice.")] = None,
    device: str = "cpu",
    compute: ComputeOption = "stored",
    encode_task: Annotated[
        str | None, typer.Option(help="`classification`: the checkpoint's vectors for classifiers; a row of its own.")
    ] = None,
) -> None:
    """Measure embeddings with mteb; finished tasks are kept, so an interrupted command can be run again."""
    import torch

    from benchmarks.peers import open_encoder

    logging.getLogger("mteb").setLevel(logging.WARNING)
    if threads:
        torch.set_num_threads(threads)
    with one_line_errors():
        folder = None if online else data_folder(data_dir)
        names, missing = expand(tasks or ["sts"], online=online, folder=folder)
        if missing:
            typer.echo(f"no local data, left out: {', '.join(missing)}", err=True)
        for name in model or ["models/ubmoe-135m"]:
            encoder = open_encoder(name, base=base, device=device, compute=compute, task=encode_task)
            typer.echo(f"{encoder.row}: {len(names)} tasks, prompt {encoder.prompt}, pooling {encoder.pooling}")
            path = run(
                encoder,
                names,
                folder=folder,
                out=out,
                mteb_files=mteb_files,
                seed=seed,
                limit=limit,
                batch_size=batch_size,
                command=command_line("benchmarks.embedding"),
                say=typer.echo,
            )
            for key, average in json.loads(path.read_text(encoding="utf-8")).get("averages", {}).items():
                typer.echo(f"{key}: {average['value']:.2f} [{average['low']:.2f}, {average['high']:.2f}]")


if __name__ == "__main__":
    app()
