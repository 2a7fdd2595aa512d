"""The result file: one JSON per benchmark and row, with everything needed to repeat the run.

    {"schema": 1, "benchmark": "embedding", "row": "ubmoe-135m", "label": ..., "kind": ...,
     "run": {command, date, commit, versions, cpu, threads, dtype, prompt, pooling, seed, data, fingerprint, seconds},
     "scores": [{"task", "split", "metric", "value", "low", "high", "n", command, date, commit, ...}, ...]}

`run` is the last run that wrote the file; each score names the command that made it. `low` and `high` are the ends of a
seeded bootstrap interval. A file may also carry `rows` (what was measured by name, where it is more than a score) and
`tables` (`{name: {"columns": [...], "rows": [[...]]}}`), which the report prints as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
RESAMPLES = 1000
LEVEL = 0.95
PACKAGES = ("ubmoe-st", "torch", "transformers", "sentence-transformers", "numpy")


def cpu_name() -> str:
    """Name of the processor and its logical core count."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} logical cores"


def commit() -> str | None:
    """Commit of the working tree, with `+changes` when a tracked file differs; None outside of git."""
    here = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def relative(path: str | Path) -> str:
    """The path seen from the working directory (far away: its last part), so that no file names a machine's folders."""
    if not os.path.isabs(path):
        return str(path)
    seen = os.path.relpath(path)
    return Path(path).name if seen.startswith(os.path.join("..", "..")) else seen


@contextlib.contextmanager
def one_line_errors(*also: type[Exception]) -> Iterator[None]:
    """A command whose expected errors are one line on standard error, and exit code 1.

    Args:
        *also: Expected kinds besides `ValueError`, `OSError` and, for what an extra installs, `ImportError`.
    """
    import typer

    expected: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *also)
    try:
        yield
    except expected as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def command_line(module: str, arguments: Sequence[str] | None = None) -> str:
    """The shell command of this run, without absolute paths.

    Args:
        module: Module that was run, as after `python -m`.
        arguments: Its arguments; None takes those of this process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    return " ".join(["python", "-m", module, *(shlex.quote(relative(a) if os.path.isabs(a) else a) for a in given)])


def run_record(
    command: str,
    *,
    seed: int,
    packages: Iterable[str] = (),
    **facts: Any,
) -> dict[str, Any]:
    """What must be known to repeat a run.

    Args:
        command: The shell command, see `command_line`.
        seed: Seed of sampling and of the bootstrap.
        packages: Distributions to record beside the usual five.
        **facts: Further entries: dtype, prompt, pooling, data, fingerprint ...
    """
    import torch

    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "versions": versions,
        "cpu": cpu_name(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "threads": torch.get_num_threads(),
        "seed": seed,
        **facts,
    }


def fingerprint(folder: str | Path, *, without: str | None = None) -> str:
    """First 12 digits of the sha256 over the weights and configuration in a model folder.

    Results of another fingerprint are another model: they are never merged.

    Args:
        folder: The model folder.
        without: A folder in it that what is measured does not read.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a model folder, got {str(folder)!r}; build one with `make model`.")
    digest = sha256()
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.suffix in {".safetensors", ".json", ".model", ".txt"} and path.is_file() and inner.parts[0] != without:
            digest.update(str(inner).encode())
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:12]


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON file so that an interruption leaves the old one whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: If the file is no JSON object, with its name.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected a JSON result file, got a broken one at {path}: {error}. Delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {type(content).__name__}. Delete the file.")
    return content


def read_all(folder: str | Path = RESULTS) -> list[dict[str, Any]]:
    """All result files of a folder, in the order of their names; each gets its name as `file`."""
    return [{"file": path.name, **read_json(path)} for path in sorted(Path(folder).glob("*.json"))]


class ResultFile:
    """One result file, rewritten after every finished task, so that a run can stop and go on.

    Args:
        path: Where it lives.
        benchmark: Name of the module that measures.
        row: Name of the row in the tables.
        run: From `run_record`; must hold `fingerprint`.
        **facts: Further top-level entries, such as `label` and `supervision`.
    """

    def __init__(self, path: str | Path, *, benchmark: str, row: str, run: Mapping[str, Any], **facts: Any) -> None:
        self.path = Path(path)
        self.content: dict[str, Any] = {"schema": SCHEMA, "benchmark": benchmark, "row": row, **facts, "run": dict(run)}
        self.content["scores"] = []
        if self.path.exists():
            old = read_json(self.path)
            # The seed draws the rows of a part of a task, otherwise the bootstrap alone.
            keys = ("fingerprint", "dtype", "prompt", "pooling", *(("seed",) if facts.get("limit") else ()))
            same = old.get("schema") == SCHEMA and all(old.get("run", {}).get(key) == run.get(key) for key in keys)
            if same:
                self.content |= {key: old[key] for key in ("scores", "rows") if key in old}

    @staticmethod
    def _key(score: Mapping[str, Any]) -> tuple[Any, ...]:
        what = ("task", "split", "metric", "data", "limit", "seed")
        how = ("dimension", "precision", "first", "method", "candidates", "length")
        return tuple(score.get(key) for key in (*what, *how))

    @property
    def rows(self) -> dict[str, Any]:
        """What was measured by name; `add(rows=...)` writes it."""
        rows: dict[str, Any] = self.content.setdefault("rows", {})
        return rows

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The first score whose entries equal all of `wanted`, or None."""
        for score in self.content["scores"]:
            if all(score.get(key) == value for key, value in wanted.items()):
                return score
        return None

    def add(self, *scores: Mapping[str, Any], **facts: Any) -> None:
        """Add or replace scores, set further top-level entries, and write the file."""
        run = self.content["run"]
        made = {key: run[key] for key in ("command", "date", "commit") if key in run}
        new = {self._key(score) for score in scores}
        kept = [score for score in self.content["scores"] if self._key(score) not in new]
        self.content["scores"] = kept + [{**score, **made} for score in scores]
        self.content.update(facts)
        write_json(self.path, self.content)


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Ends of the central interval that holds `level` of the resampled values."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Values of a statistic over resampled rows.

    Args:
        statistic: Takes row numbers (n,), drawn with replacement.
        n: Number of rows.
        seed: Of the draw.
        resamples: Number of draws.

    Returns:
        One value per draw, (resamples,).
    """
    generator = np.random.default_rng(seed)
    return np.asarray([statistic(generator.integers(0, n, n)) for _ in range(resamples)])


def spearman(gold: Sequence[float], predicted: Sequence[float]) -> float:
    """Spearman's rank correlation x100."""
    from scipy.stats import spearmanr

    return 100 * float(spearmanr(gold, predicted).statistic)


def bootstrap_spearman(
    gold: Sequence[float], predicted: Sequence[float], *, seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """Resampled Spearman correlations x100, (resamples,)."""
    from scipy.stats import rankdata

    x, y = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)

    def statistic(rows: np.ndarray) -> float:
        ranks = rankdata(x[rows]), rankdata(y[rows])
        return 100 * float(np.corrcoef(*ranks)[0, 1])

    return bootstrap(statistic, len(x), seed=seed, resamples=resamples)


def bootstrap_mean(values: Sequence[float], *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Resampled means of per-sample values, (resamples,)."""
    array = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda rows: float(array[rows].mean()), len(array), seed=seed, resamples=resamples)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence that names the known names nearest to an unknown one."""
    import difflib

    known = list(known)
    lowered = {k.lower(): k for k in known}
    found = [lowered[k] for k in difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.4)]
    return f"nearest: {', '.join(found)}" if found else f"known: {', '.join(sorted(known)[:20])}"
