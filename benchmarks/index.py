"""Indexes at corpus scale: `python -m benchmarks.index --model models/ubmoe-135m --texts sentences.txt.gz`.

Two parts. `kinds`: real embeddings, extended by perturbation to the wanted number of rows, in every kind of index:
recall@10 against brute force, queries per second, what must be in memory, each beside exact search. `build`: from texts
to an index on disk, `EmbeddingIndex.build` beside the plain loop `encode` + `IndexFlatIP` and autofaiss.

A run that was stopped goes on with the next kind or system: what is measured is read from the result files, what is
made from the work folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.index_systems import SYSTEMS, Table, status_mb
from benchmarks.options import ResultsFolder
from benchmarks.process import in_process
from benchmarks.results import (
    RESULTS,
    ResultFile,
    bootstrap_mean,
    command_line,
    fingerprint,
    interval,
    one_line_errors,
    run_record,
)
from training.data import read_lines

K = 10
BASELINE = "flat"
FAISS_FLAT = "faiss IndexFlatIP"
KINDS = f"{BASELINE},{FAISS_FLAT},int8,hnsw,hnsw-int8,ivf-flat,ivf-pq,binary"
GOAL_RECALL, GOAL_SPEED, GOAL_MEMORY = 0.95, 20.0, 0.25
"""recall@10 at least, queries/s of flat at least, memory of flat at most."""
SINGLE_QUERIES = 100
FILLER = "and some words that a sentence of the usual length would have, to weigh what a row of text weighs in memory"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """How long a speed is measured: it is the median of rounds over all queries."""

    seconds: float = 2.0
    """More rounds until so much time has passed."""
    rounds: int = 3
    """At least so many rounds."""


class Numbers:
    """A corpus of so many rows whose text is their number; can be read again, so that a stopped build goes on."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"id": str(n), "text": str(n)} for n in range(self._rows))


def read_texts(path: Path, count: int) -> list[str]:
    """Up to `count` texts: lines of .txt(.gz), or sentences of the `text` fields of .jsonl(.gz)."""
    found: list[str] = []
    for line in read_lines(path):
        pieces = json.loads(line)["text"].replace("\n", " ").split(". ") if ".jsonl" in path.name else [line]
        found.extend(piece for piece in pieces if 30 <= len(piece) <= 300)
        if len(found) >= count:
            break
    return found[:count]


def seed_vectors(model: str | None, texts: Path | None, vectors: Path | None, count: int, work: Path) -> Any:
    """Real embeddings to extend, (n, D), and how they were made.

    Embedding them is an index build, too, so it goes on where it was stopped.

    Raises:
        ValueError: If neither a model with texts nor vectors are given.
    """
    if vectors is not None:
        found = np.load(vectors)[:count].astype(np.float32)
        return found, f"{len(found):,} vectors of {vectors.name}"
    if model is None or texts is None:
        raise ValueError("Expected --model with --texts, or --vectors with a .npy file of real embeddings.")
    from ubmoe_st.index import EmbeddingIndex

    rows = read_texts(texts, count)
    name = fingerprint(model) if Path(model).is_dir() else hashlib.sha256(model.encode()).hexdigest()[:12]
    folder = work / f"seeds-{name}-{len(rows)}"
    index = EmbeddingIndex.build(model, [{"id": n, "text": text} for n, text in enumerate(rows)], folder, progress=True)
    return index.vectors(
        [str(n) for n in range(len(rows))]
    ), f"{len(rows):,} texts of {texts.name} by {Path(model).name}"


def extended(seeds: np.ndarray, rows: int, noise: float, path: Path, seed: int) -> None:
    """Write `rows` unit vectors, (N, D), as .npy: mixtures of two seeds, perturbed by a difference of two others.

    Both keep the covariance of real embeddings, which noise of the same strength in all directions would not.

    Args:
        seeds: Real embeddings, (n, D).
        rows: N.
        noise: Factor of the difference.
        path: The file.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    unit = (seeds / np.linalg.norm(seeds, axis=1, keepdims=True)).astype(np.float32)
    temporary = path.with_suffix(".tmp.npy")
    out = np.lib.format.open_memmap(temporary, "w+", np.float32, (rows, seeds.shape[1]))
    for start in range(0, rows, 20_000):
        count = min(20_000, rows - start)
        first, second, plus, minus = generator.integers(len(unit), size=(4, count))
        share = generator.uniform(0.5, 1.0, size=(count, 1)).astype(np.float32)
        block = share * unit[first] + (1 - share) * unit[second] + noise * (unit[plus] - unit[minus])
        out[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    out.flush()
    os.replace(temporary, path)


def prepare(seeds: np.ndarray, rows: int, noise: float, seed: int, dtype: str, queries: int, work: Path) -> Path:
    """A folder, named by its content, with vectors.npy, queries.npy, tuning.npy, the index and truth.npy.

    The queries are seeds that were left out of the extension, and so are as many others to tune with.
    """
    from ubmoe_st.index import EmbeddingIndex

    held = min(queries, len(seeds) // 8)
    recipe = json.dumps([rows, noise, seed, dtype, held]).encode()
    name = hashlib.sha256(np.ascontiguousarray(seeds).tobytes() + recipe).hexdigest()[:12]
    folder = work / f"rows-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "queries.npy", seeds[-held:])
    np.save(folder / "tuning.npy", seeds[-2 * held : -held])
    if not (folder / "vectors.npy").exists():
        extended(seeds[: -2 * held], rows, noise, folder / "vectors.npy", seed)
    index: Any
    if (folder / "index" / "index_info.json").exists():
        index = EmbeddingIndex.open(folder / "index")
    else:
        table = Table(folder / "vectors.npy")
        index = EmbeddingIndex.build(
            table, Numbers(rows), folder / "index", kind="flat", faiss_file=False, dtype=dtype, progress=True
        )
    if not (folder / "truth.npy").exists():
        found = index.search(np.load(folder / "queries.npy"), K, exact=True)[1]
        np.save(folder / "truth.npy", np.array(found, dtype=np.int64))
    return folder


def speeds(work: Callable[[], Any], queries: int, timing: Timing) -> list[float]:
    """Queries per second of each round."""
    rounds: list[float] = []
    total = 0.0
    while len(rounds) < timing.rounds or total < timing.seconds:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        rounds.append(queries / seconds)
        total += seconds
    return rounds


def measure_searches(search: Callable[[np.ndarray], list[list[int]]], folder: Path, timing: Timing) -> dict[str, Any]:
    """Recall and speed of a search function over the held-back queries."""
    queries, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    found = search(queries)
    hits = [len(set(line) & set(wanted)) / K for line, wanted in zip(found, truth.tolist())]
    single = queries[:SINGLE_QUERIES]
    return {
        "recall@10": hits,
        "queries/s, all at once": speeds(lambda: search(queries), len(queries), timing),
        "queries/s, one by one": speeds(lambda: [search(query[None]) for query in single], len(single), timing),
    }


def measure_kind(folder: Path, kind: str, recall: float, timing: Timing) -> dict[str, Any]:
    """Make one kind over the stored vectors, tune it with other queries, and measure it, in this (fresh) process."""
    if kind == FAISS_FLAT:
        return measure_faiss_flat(folder, timing)
    from ubmoe_st.index import EmbeddingIndex

    index = EmbeddingIndex.open(folder / "index")
    facts: dict[str, Any] = {}
    if kind != BASELINE:
        before, began = status_mb("VmRSS"), time.perf_counter()
        index.reindex(kind)
        facts |= {"seconds to make": time.perf_counter() - began, "MB to make": status_mb("VmHWM") - before}
        report = index.tune(recall, k=K, queries=np.load(folder / "tuning.npy"))
        facts |= {"parameters": dict(report.chosen.parameters), "tuned_recall": report.chosen.recall}
    elif index.kind != BASELINE:
        index.reindex(BASELINE, faiss_file=False)
    index = EmbeddingIndex.open(folder / "index")
    before = status_mb("VmRSS")
    facts |= measure_searches(
        lambda q: [[int(name) for name in line] for line in index.search(q, K)[1]], folder, timing
    )
    held = index.info["index"]["bytes"] or len(index) * index.dimension * np.dtype(index.info["dtype"]).itemsize
    facts |= {"resident bytes/row": held / len(index), "RSS MB": status_mb("VmRSS") - before}
    return facts | {"factory": index.info["index"]["factory"], "files": len(index.info["index"]["files"])}


def measure_faiss_flat(folder: Path, timing: Timing) -> dict[str, Any]:
    """The plain library, all vectors in memory: what the plain loop ends with."""
    import faiss

    before, began = status_mb("VmRSS"), time.perf_counter()
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    index = faiss.IndexFlatIP(vectors.shape[1])
    for start in range(0, len(vectors), 50_000):
        index.add(np.ascontiguousarray(vectors[start : start + 50_000]))
    made = time.perf_counter() - began
    del vectors

    def search(queries: np.ndarray) -> list[list[int]]:
        unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        return index.search(unit.astype(np.float32), K)[1].tolist()

    facts = measure_searches(search, folder, timing)
    facts |= {"seconds to make": made, "factory": "Flat", "resident bytes/row": 4.0 * index.d}
    return facts | {"RSS MB": status_mb("VmRSS") - before, "files": 1}


def scores_of(name: str, facts: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """What was measured of a kind or a system, as scores; lists become a mean or a median with its spread."""
    scores = []
    for metric, value in facts.items():
        if isinstance(value, (str, dict)):
            continue
        score: dict[str, Any] = {"task": name, "metric": metric}
        if metric == "recall@10":
            low, high = interval(bootstrap_mean(value, seed=seed))
            score |= {"value": float(np.mean(value)), "low": low, "high": high, "n": len(value)}
        elif isinstance(value, list):
            score |= {"value": float(np.median(value)), "low": min(value), "high": max(value), "n": len(value)}
        else:
            score["value"] = float(value)
        scores.append(score)
    facts_only = {key: value for key, value in facts.items() if isinstance(value, (str, dict))}
    return [{**score, **facts_only} for score in scores]


def value_of(file: ResultFile, task: str, metric: str) -> float | None:
    """One measured value, or None."""
    found = file.find(task=task, metric=metric)
    return None if found is None else float(found["value"])


def ratio(value: float | None, base: float | None) -> float | None:
    """The quotient, where there are both."""
    return None if value is None or not base else value / base


def kinds_table(file: ResultFile) -> dict[str, Any]:
    """Columns and rows for the report: every kind beside flat."""
    columns = ["kind", "made in s", "memory, bytes/row", "of flat", "recall@10 [95 %]", "queries/s, all at once"]
    columns += ["x flat", "queries/s, one by one", "x flat", "parameters", "goal"]
    rows = []
    for task in dict.fromkeys(score["task"] for score in file.content["scores"]):
        made, size, recall, batch, single = (
            file.find(task=task, metric=metric) or {"value": None}
            for metric in (
                "seconds to make",
                "resident bytes/row",
                "recall@10",
                "queries/s, all at once",
                "queries/s, one by one",
            )
        )
        memory = ratio(size["value"], value_of(file, BASELINE, "resident bytes/row"))
        faster = [
            ratio(score["value"], value_of(file, BASELINE, metric))
            for score, metric in ((batch, "queries/s, all at once"), (single, "queries/s, one by one"))
        ]
        reached = (
            recall["value"] >= GOAL_RECALL
            and memory is not None
            and memory <= GOAL_MEMORY
            and all(value is not None and value >= GOAL_SPEED for value in faster)
        )
        parameters = ", ".join(f"{name} {value}" for name, value in recall.get("parameters", {}).items())
        rows.append(
            [
                task,
                "" if made["value"] is None else f"{made['value']:.0f}",
                f"{size['value']:.0f}",
                memory,
                f"{recall['value']:.3f} [{recall['low']:.3f}, {recall['high']:.3f}]",
                f"{batch['value']:.1f}",
                faster[0],
                f"{single['value']:.1f}",
                faster[1],
                parameters,
                "" if task in (BASELINE, FAISS_FLAT) else "met" if reached else "missed",
            ]
        )
    return {"columns": columns, "rows": rows}


def kinds_part(
    kinds: list[str], folder: Path, recall: float, timing: Timing, file: ResultFile, seed: int, say: Say
) -> None:
    """Measure the kinds that are not in the result file yet."""
    for kind in kinds:
        if file.find(task=kind):
            say(f"{kind}: kept")
            continue
        facts = in_process(measure_kind, folder, kind, recall, timing)
        file.add(*scores_of(kind, facts, seed))
        file.add(tables={"index-kinds": kinds_table(file)})
        say(
            f"{kind}: recall@10 {value_of(file, kind, 'recall@10'):.3f}, "
            f"{value_of(file, kind, 'queries/s, all at once'):,.0f} queries/s at once, "
            f"{value_of(file, kind, 'queries/s, one by one'):,.0f} one by one, "
            f"{facts['resident bytes/row']:.0f} bytes/row"
        )


def write_corpus(path: Path, texts: Iterator[str]) -> None:
    """A .jsonl corpus with numbered ids."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts))
    os.replace(temporary, path)


def run_system(name: str, python: str, arguments: dict[str, str]) -> dict[str, Any]:
    """One system in a process of its own.

    Raises:
        RuntimeError: If it failed, with the end of what it said.
    """
    script = Path(__file__).with_name("index_systems.py")
    done = subprocess.run(
        [python, str(script), name, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def build_part(
    encoder: str, what: str, corpus: Path, work: Path, autofaiss: str | None, budget: str, file: ResultFile, say: Say
) -> None:
    """Measure the systems that are not in the result file yet, for one encoder.

    Args:
        encoder: As for `index_systems.load`.
        what: Name of the encoder in the table.
        corpus: A .jsonl file.
        work: Scratch.
        autofaiss: A Python that has autofaiss, or None.
        budget: `memory_budget` of the streaming builds.
        file: The result file.
        say: Takes one line per system.
    """
    for name in SYSTEMS:
        task = f"{name} ({what})"
        if "autofaiss" in name and (autofaiss is None or not encoder.startswith("table:")):
            continue
        if file.find(task=task):
            say(f"{task}: kept")
            continue
        out = work / "built"
        for path in work.glob("built*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        python = autofaiss if "autofaiss" in name and autofaiss else sys.executable
        facts = run_system(name, python, {"model": encoder, "corpus": str(corpus), "out": str(out), "budget": budget})
        facts["rows/s"] = facts["rows"] / facts["seconds"]
        size = sum(path.stat().st_size for path in [*work.glob("built*"), *out.rglob("*")] if path.is_file())
        facts["disk bytes/row"] = size / facts["rows"]
        file.add(*scores_of(task, facts, 0))
        file.add(tables={"index-build": build_table(file)})
        say(f"{task}: {facts['rows/s']:,.0f} rows/s, peak {facts['peak_mb']:,.0f} MB, {facts['index']}")


def build_table(file: ResultFile) -> dict[str, Any]:
    """Columns and rows for the report: every way beside the plain loop of the same encoder."""
    columns = ["text to index", "rows", "index", "rows/s", "x plain loop", "peak memory, MiB", "of plain loop"]
    rows = []
    for task in dict.fromkeys(score["task"] for score in file.content["scores"]):
        base = "plain loop (" + task.split(" (", 1)[1]
        speed, peak = value_of(file, task, "rows/s"), value_of(file, task, "peak_mb")
        rows.append(
            [
                task,
                f"{value_of(file, task, 'rows'):,.0f}",
                (file.find(task=task) or {}).get("index", ""),
                f"{speed:,.1f}",
                ratio(speed, value_of(file, base, "rows/s")),
                f"{peak:,.0f}",
                ratio(peak, value_of(file, base, "peak_mb")),
            ]
        )
    return {"columns": columns, "rows": rows}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or Hub id.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Lines of .txt(.gz), or .jsonl(.gz) with `text`.")] = None,
    vectors: Annotated[Path | None, typer.Option(help="Real embeddings as .npy, instead of --model.")] = None,
    rows: Annotated[int, typer.Option(min=1000, help="Rows of both parts.")] = 1_000_000,
    seed_rows: Annotated[int, typer.Option(help="Texts embedded as seeds of those rows.")] = 20_000,
    queries: Annotated[int, typer.Option(help="Held-back seeds as queries; as many again to tune with.")] = 500,
    model_rows: Annotated[int, typer.Option(help="Texts of the build part with the model itself; 0: none.")] = 2_000,
    kinds: Annotated[str, typer.Option(help="Index kinds, comma-separated; faiss:FACTORY, too.")] = KINDS,
    recall: Annotated[float, typer.Option(help="Recall the search parameters are tuned to.")] = 0.965,
    least_seconds: Annotated[float, typer.Option(help="A speed is measured for so long at least.")] = Timing.seconds,
    least_rounds: Annotated[int, typer.Option(help="And in so many rounds over all queries.")] = Timing.rounds,
    noise: Annotated[float, typer.Option(help="Strength of the perturbation.")] = 0.25,
    dtype: Annotated[str, typer.Option(help="Type of the stored vectors.")] = "float32",
    budget: Annotated[str, typer.Option(help="memory_budget of the streaming builds.")] = "256MB",
    autofaiss: Annotated[
        str | None, typer.Option(help="A Python that has autofaiss (it wants an older numpy).")
    ] = None,
    parts: Annotated[str, typer.Option(help="kinds, build or both.")] = "kinds,build",
    work: Annotated[Path, typer.Option(help="Scratch folder, kept; about 6 KB per row.")] = Path("runs/bench-index"),
    out: ResultsFolder = RESULTS,
    seed: int = 0,
) -> None:
    """Measure index kinds and index builds; what is measured already is kept."""
    import faiss

    with one_line_errors(RuntimeError):
        seeds, origin = seed_vectors(model, texts, vectors, seed_rows, work)
        folder = prepare(seeds, rows, noise, seed, dtype, queries, work)
        data = (
            f"{origin}; extended to {rows:,} rows: mixtures of two, perturbed by {noise} x a difference of two others"
        )

        def result(row: str, **facts: Any) -> ResultFile:
            record = run_record(
                command_line("benchmarks.index"),
                seed=seed,
                packages=("faiss-cpu", "pyarrow"),
                fingerprint=folder.name,
                dtype=dtype,
                prompt="none",
                pooling="none",
                data=data,
                faiss_threads=faiss.omp_get_max_threads(),
                **facts,
            )
            return ResultFile(out / f"{row}.json", benchmark="index", row=row, run=record, label=row)

        if "kinds" in parts:
            file = result("index-kinds", rows=rows, tuned_to=recall)
            kinds_part(kinds.split(","), folder, recall, Timing(least_seconds, least_rounds), file, seed, typer.echo)
        if "build" in parts:
            file = result("index-build", rows=rows, memory_budget=budget)
            corpus = folder / "texts.jsonl"
            if not corpus.exists():
                write_corpus(corpus, (f"{n} {FILLER}" for n in range(rows)))
            build_part(
                f"table:{folder / 'vectors.npy'}", "free encoder", corpus, work, autofaiss, budget, file, typer.echo
            )
            if model is not None and texts is not None and model_rows:
                corpus = folder / "sentences.jsonl"
                write_corpus(corpus, iter(read_texts(texts, model_rows)))
                build_part(model, Path(model).name, corpus, work, None, budget, file, typer.echo)


if __name__ == "__main__":
    app()
