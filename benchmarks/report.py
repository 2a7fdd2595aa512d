"""Tables and figures of README.md, MODEL_CARD.md and benchmarks/README.md from `benchmarks/results/*.json`.

`python -m benchmarks.report` fills every region `<!-- results:NAME -->` ... `<!-- /results:NAME -->` and draws
`docs/*.svg`; with `--check` it writes nothing and fails when something differs. In the front matter of the model card
the region is `# results:model-index` ... `# /results:model-index`. Every number printed stands in a result file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.embedding import AVG7, SICK_TEST
from benchmarks.figures import figures
from benchmarks.lm_tasks import METRICS
from benchmarks.options import ResultsFolder
from benchmarks.results import RESULTS, nearest, read_all
from benchmarks.rows import MODEL, TASK_LABELS, Results, of, of_generation, pick, released, row_of

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "MODEL_CARD.md", "benchmarks/README.md")
NOT_MEASURED = "*Not measured yet.*"
INSIDE = "≈"
"""Marks a value whose difference from `MODEL` is inside the noise."""
REGION = re.compile(
    r"(?P<open><!-- results:(?P<name>[\w-]+) -->\n).*?(?P<close><!-- /results:(?P=name) -->)", re.DOTALL
)
FRONT_REGION = re.compile(r"(?P<open># results:model-index\n).*?(?P<close># /results:model-index)", re.DOTALL)

MTEB_DATASETS = {
    "STS12": "mteb/sts12-sts",
    "STS13": "mteb/sts13-sts",
    "STS14": "mteb/sts14-sts",
    "STS15": "mteb/sts15-sts",
    "STS16": "mteb/sts16-sts",
    "STSBenchmark": "mteb/stsbenchmark-sts",
    "SICK-R": "mteb/sickr-sts",
    "BIOSSES": "mteb/biosses-sts",
    "STS17": "mteb/sts17-crosslingual-sts",
    "Banking77Classification": "mteb/banking77",
}
"""Where mteb has its tasks from; every other collection is a local one."""
METRIC_LABELS = {"RR@10": "MRR@10", "R@100": "Recall@100"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def inside_noise(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether a difference may be chance, at the 95 % level.

    Where both kept what each sample gave, the differences of the same samples are tested (mean against 1.96 standard
    errors). Elsewhere the two bootstrap deviations are taken as independent, which is too wide: what is marked there
    may still differ.
    """
    if "sd" not in first or "sd" not in second:
        return False
    ours, theirs = _outcomes(first), _outcomes(second)
    if len(ours) > 1 and len(ours) == len(theirs) and first.get("samples") == second.get("samples"):
        differences = ours - theirs
        return bool(abs(differences.mean()) <= 1.96 * differences.std(ddof=1) / math.sqrt(len(differences)))
    return abs(first["value"] - second["value"]) < 1.96 * math.hypot(first["sd"], second["sd"])


def _outcomes(score: Mapping[str, Any]) -> np.ndarray:
    """What each sample gave: right or wrong, a value, or the log-likelihood of a page."""
    return np.array([float(o[0] if isinstance(o, list) else o) for o in score.get("outcomes") or ()])


def _number(score: Mapping[str, Any] | None, reference: Mapping[str, Any] | None = None, digits: int = 1) -> str:
    if score is None:
        return ""
    mark = INSIDE if reference is not None and reference is not score and inside_noise(score, reference) else ""
    return f"{score['value']:.{digits}f}{mark}"


def _with_interval(score: Mapping[str, Any] | None, reference: Mapping[str, Any] | None = None, digits: int = 1) -> str:
    if score is None:
        return ""
    text = _number(score, reference, digits)
    return f"{text} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]" if "low" in score else text


def _name(content: Mapping[str, Any], results: Results) -> str:
    return f"**{content['label']}**" if content["row"] in released(results) else str(content["label"])


def models(results: Results) -> str:
    """The released models, the best first: what they are, and in a number each what was measured."""

    def quality(content: Mapping[str, Any]) -> float:
        averages = (row_of(of(results, "embedding"), content["row"]) or {}).get("averages", {})
        return float(averages["avg7"]["value"]) if "avg7" in averages else 0.0

    rows = []
    for content in sorted(of(results, "models"), key=quality, reverse=True):
        row, facts = content["row"], content["facts"]
        embedding = row_of(of(results, "embedding"), row)
        average = (embedding or {}).get("averages", {}).get("avg7")
        found = (row_of(of(results, "retrieval"), row) or {}).get("averages", {}).get("nDCG@10")
        origin = ", dequantised" if facts["base_origin"] == "gguf" else ""
        rows.append(
            [
                f"**{content['label']}**",
                f"{facts['base']}{origin}",
                f"{facts['base_millions']:.1f} M / {facts['added_millions']:.2f} M ({facts['added_percent']:.2f} %)",
                str(facts["dimension"]),
                facts["training"],
                _number(pick(embedding, task="STSBenchmark", split="validation"), digits=2),
                _with_interval(average, digits=2),
                _with_interval(found),
                _lossless(results, row),
                _both_views(results, row),
            ]
        )
    header = ["model", "base", "parameters, base / added", "dimension", "trained", "STSB-dev", "avg7 [95 %]"]
    header += ["nDCG@10, mean of three", "generation", "weights of both views in memory"]
    return table(header, rows) if rows else NOT_MEASURED


def _lossless(results: Results, row: str) -> str:
    """Whether all answers of the generator view are its base's, in the tasks that both were asked."""
    own = row_of(of_generation(results), row)
    base = row_of(of_generation(results), (own or {}).get("base_row", "base"))
    pairs = [(score, pick(base, task=score["task"], metric=score["metric"])) for score in (own or {}).get("scores", ())]
    answers = [one["answers_sha256"] == other["answers_sha256"] for one, other in pairs if other]
    return "" if not answers else "every answer is the base's" if all(answers) else "differs from the base"


def _both_views(results: Results, row: str) -> str:
    """Memory of the weights of both views against the base alone."""
    file = row_of(of(results, "speed"), row)
    low, full = (pick(file, task="memory", split=split, metric="weights MiB") for split in ("low", "ubmoe"))
    text = f"{low['ratio']:.2f} x base (`low_memory`)" if low else ""
    return text + (f"{', else ' if low else ''}{full['ratio']:.2f} x base" if full else "")


def sts(results: Results) -> str:
    """Spearman x100 on the seven STS test sets, sorted by their mean."""
    files = [content for content in of(results, "embedding") if "avg7" in content.get("averages", {})]
    if not files:
        return NOT_MEASURED
    own = row_of(files)
    rows = []
    for content in sorted(files, key=lambda c: -c["averages"]["avg7"]["value"]):
        cells = [_name(content, results), content["supervision"]]
        cells += [_number(pick(content, task=t, split="test"), pick(own, task=t, split="test")) for t in AVG7]
        average = own["averages"]["avg7"] if own else None
        rows.append([*cells, _with_interval(content["averages"]["avg7"], average, 2)])
    header = ["model", "trained with", *(task.replace("STSBenchmark", "STSB") for task in AVG7), "avg7 [95 %]"]
    note = f"\n\n{INSIDE}: the difference from {MODEL} is inside the noise." if own and len(rows) > 1 else ""
    return table(header, rows) + note


def sts_more(results: Results) -> str:
    """The further STS sets and averages of the same runs."""
    files = [content for content in of(results, "embedding") if "avg7" in content.get("averages", {})]
    if not files:
        return NOT_MEASURED
    tasks = {SICK_TEST: "SICK-R, own test split", "BIOSSES": "BIOSSES", "STS17": "STS17 en-en"}
    means = {"avg7_sick_test": "avg7 with that split", "avg9": "avg9", "avg10": "avg10"}
    means = {key: label for key, label in means.items() if any(key in c["averages"] for c in files)}
    rows = []
    for content in sorted(files, key=lambda c: -c["averages"]["avg7"]["value"]):
        cells = [
            _name(content, results),
            *(_with_interval(pick(content, task=task, split="test")) for task in tasks),
        ]
        rows.append([*cells, *(_with_interval(content["averages"].get(key), digits=2) for key in means)])
    return table(["model", *tasks.values(), *means.values()], rows)


def published(results: Results) -> str:
    """What others published, beside the measured rows."""
    rows = [
        [
            s["system"],
            s["supervision"],
            str(s["avg7"]),
            f"{s['avg10']:.1f}" if "avg10" in s else "",
            s["source"],
        ]
        for content in of(results, "published")
        for s in content["scores"]
    ]
    return table(["system", "trained with", "avg7", "avg10", "source"], rows) if rows else NOT_MEASURED


def classification(results: Results) -> str:
    """Accuracy of mteb's classification tasks."""
    return _by_task(results, "accuracy")


def dev(results: Results) -> str:
    """Spearman x100 on the development splits, the only ones used for choices."""
    files = [c for c in of(results, "embedding") if any(s["split"] == "validation" for s in c["scores"])]
    if not files:
        return NOT_MEASURED
    tasks = sorted({s["task"] for c in files for s in c["scores"] if s["split"] == "validation"}, reverse=True)
    rows = [[_name(c, results), *(_with_interval(pick(c, task=t, split="validation")) for t in tasks)] for c in files]
    return table(["model", *(f"{task} dev" for task in tasks)], rows)


def _by_task(results: Results, metric: str) -> str:
    files = [c for c in of(results, "embedding") if pick(c, metric=metric)]
    if not files:
        return NOT_MEASURED
    tasks = list(dict.fromkeys(s["task"] for c in files for s in c["scores"] if s["metric"] == metric))
    own = row_of(files)
    rows = [
        [
            _name(c, results),
            *(_with_interval(pick(c, task=t, metric=metric), pick(own, task=t, metric=metric)) for t in tasks),
        ]
        for c in files
    ]
    return table(["model", *tasks], rows)


def _is_base(content: Mapping[str, Any]) -> bool:
    return bool(content["row"] == content.get("base_row", "base"))


def generation(results: Results) -> str:
    """lm-eval scores of the base and of the generator view (number of samples); `=`: all answers are the base's."""
    files = of_generation(results)
    if not files:
        return NOT_MEASURED
    tasks = [task for task in METRICS if any(pick(c, task=task) for c in files)]
    rows = []
    for content in sorted(files, key=lambda c: (c.get("base_row", "base"), not _is_base(c), c["row"])):
        base = None if _is_base(content) else row_of(files, content.get("base_row", "base"))
        cells = [_name(content, results)]
        for task in tasks:
            score = pick(content, task=task, metric=METRICS[task][0])
            other = pick(base, task=task, metric=METRICS[task][0])
            same = score and other and score["answers_sha256"] == other["answers_sha256"]
            cells.append("= " + _number(score) if same else _with_interval(score, other))
        rows.append(cells)
    note = "\n\n`=`: every answer equals the base's to the last bit." if len(rows) > 1 else ""
    if any(INSIDE in cell for row in rows for cell in row):
        note += f" {INSIDE}: the difference from the base is inside the noise."
    sizes = {task: sorted({s["n"] for c in files for s in c["scores"] if s["task"] == task}) for task in tasks}
    header = [f"{TASK_LABELS.get(task, task)} ({'/'.join(map(str, sizes[task]))})" for task in tasks]
    return table(["model", *header], rows) + note


def retrieval(results: Results) -> str:
    """nDCG@10, Recall@100 and MRR@10 x100 per test collection."""
    return _retrieval_table(results, "test", ("nDCG@10", "R@100", "RR@10"))


def retrieval_dev(results: Results) -> str:
    """nDCG@10 x100 on the development set, with the weight of the vectors that was chosen on it."""
    return _retrieval_table(results, "dev", ("nDCG@10", "RR@10"))


def _retrieval_table(results: Results, split: str, metrics: Sequence[str]) -> str:
    files = [c for c in of(results, "retrieval") if any(s["split"] == split for s in c["scores"])]
    measured = dict.fromkeys((s["task"], s["metric"]) for c in files for s in c["scores"] if s["split"] == split)
    columns = [(task, metric) for task, metric in measured if metric in metrics]
    if not columns:
        return NOT_MEASURED
    own = row_of(files)

    def key(content: dict[str, Any]) -> float:
        found = pick(content, task=columns[0][0], metric=columns[0][1])
        return -found["value"] if found else 0.0

    rows = []
    for content in sorted(files, key=key):
        weight = f" ({content['weight']:.1f} vectors)" if content.get("weight") is not None else ""
        cells = [_name(content, results) + weight]
        for task, metric in columns:
            score, other = pick(content, task=task, metric=metric), pick(own, task=task, metric=metric)
            cells.append((_with_interval if metric.startswith("nDCG") else _number)(score, other))
        rows.append(cells)
    return table(["system", *(f"{task} {METRIC_LABELS.get(metric, metric)}" for task, metric in columns)], rows)


def _speed_table(results: Results, tasks: Callable[[str], bool], header: Sequence[str]) -> str:
    rows = []
    for content in of(results, "speed"):
        for score in content["scores"]:
            if tasks(score["task"]) and score["metric"] != "texts/s":
                spread = f" [{score['low']:.0f}, {score['high']:.0f}]" if "low" in score else ""
                value = f"{score['value']:.0f}{spread} {score['metric'].split()[-1]}"
                what = score["task"] if score["task"] != "memory" else score["metric"].removesuffix(" MiB")
                rows.append([what, score["label"], value, f"{score['ratio']:.2f}", score["ratio_to"]])
    return table(header, rows) if rows else NOT_MEASURED


_IN_TURNS = ("load", "encode, ", "one line", "prefill", "decode", "training step")


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 10 else 1 if value >= 1 else 2}f}"


def in_turns(results: Results) -> str:
    """What was measured in turns beside the ceiling of its matrix products, each checkpoint in a table of its own."""
    tables = []
    for content in of(results, "speed"):
        rows = []
        for score in content["scores"]:
            if not score["task"].startswith(_IN_TURNS):
                continue
            spread = f" [{_short(score['low'])}, {_short(score['high'])}]" if "low" in score else ""
            spread += f" (p95 {_short(score['p95'])})" if "p95" in score else ""
            cells = [score["task"], score["label"], f"{_short(score['value'])}{spread} {score['metric']}"]
            cells += [f"{score[key]:.2f}" if key in score else "" for key in ("ratio", "share")]
            rows.append([*cells, score.get("ratio_to", "")])
        if rows:
            has = ", ".join(name for name, there in content["run"]["processor"].items() if there) or "none of them"
            header = ["what", "system", "median [range]", "ratio", "share of the products", "ratio to"]
            tables.append(f"{content['label']}, instructions: {has}\n\n{table(header, rows)}")
    return "\n\n".join(tables) or NOT_MEASURED


def speed(results: Results) -> str:
    """Throughput beside peers of the same run."""
    others = (*_IN_TURNS, "memory")
    return _speed_table(
        results, lambda t: not t.startswith(others), ["what", "system", "median [range]", "ratio", "ratio to"]
    )


def memory(results: Results) -> str:
    """Memory beside peers of the same run."""
    return _speed_table(results, lambda t: t == "memory", ["what", "system", "size", "ratio", "ratio to"])


def runs(results: Results) -> str:
    """Command, date, commit and machine of every result file; `+changes`: with uncommitted changes."""
    rows = []
    for content in results:
        run = content.get("run")
        if not run or content.get("limit"):
            continue
        machine = f"{run['cpu']}, {run['threads']} threads, {run.get('dtype', '')}"
        made = [(s["command"], s["date"], s["commit"]) for s in content.get("scores", []) if "command" in s]
        for command, date, place in dict.fromkeys(made or [(run["command"], run["date"], run["commit"])]):
            changed = "+changes" if (place or "").endswith("+changes") else ""
            rows.append([f"`{content['file']}`", f"`{command}`", date[:10], (place or "")[:12] + changed, machine])
    return table(["file", "command", "date", "commit", "machine"], rows) if rows else NOT_MEASURED


TABLES: dict[str, Callable[[Results], str]] = {
    "models": models,
    "sts": sts,
    "sts-more": sts_more,
    "sts-dev": dev,
    "published": published,
    "classification": classification,
    "generation": generation,
    "retrieval": retrieval,
    "retrieval-dev": retrieval_dev,
    "speed": speed,
    "speed-in-turns": in_turns,
    "memory": memory,
    "runs": runs,
}


OWN = ("ablation", "dependence", "dimensions", "exports", "gpu", "index", "long", "native", "reranking", "training")
"""How the names of tables begin that result files carry themselves."""


def own_tables(results: Results) -> dict[str, str]:
    """Tables that result files carry under `tables`, by name."""
    found = {}
    for content in results:
        for name, one in content.get("tables", {}).items():
            found[name] = table(one["columns"], [[_cell(cell) for cell in row] for row in one["rows"]])
    return found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def render(name: str, results: Results) -> str:
    """The Markdown of one region.

    Raises:
        ValueError: If there is no table of that name, with the nearest names.
    """
    own = own_tables(results)
    if name in own:
        return own[name]
    if name in TABLES:
        return TABLES[name](results)
    if name.startswith(OWN):
        return NOT_MEASURED
    known = [*TABLES, *own]
    raise ValueError(f"Expected a table name in `<!-- results:NAME -->`, got {name!r} ({nearest(name, known)}).")


def fill(text: str, results: Results) -> str:
    """The document with all its regions filled."""
    text = REGION.sub(lambda m: f"{m['open']}{render(m['name'], results)}\n{m['close']}", text)
    return FRONT_REGION.sub(lambda m: f"{m['open']}{model_index(results)}{m['close']}", text)


def model_index(results: Results, row: str = MODEL) -> str:
    """YAML of the card's `model-index` with the measured results of one row; empty when there are none."""
    import yaml
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    found = []
    kinds = {"cosine_spearman": ("STS", "Spearman correlation x100"), "accuracy": ("Classification", "Accuracy x100")}
    for content in of(results, "embedding"):
        for score in content["scores"] if content["row"] == row else ():
            if score["split"] == "test" and score["metric"] in kinds and score["task"] != SICK_TEST:
                kind, label = kinds[score["metric"]]
                source = MTEB_DATASETS.get(score["task"])
                name = f"MTEB {score['task']}" if source else f"{score['task']} (local collection)"
                found.append((kind, source or score["task"], name, score, label))
    for content in of(results, "retrieval"):
        for score in content["scores"] if content["row"] == row else ():
            if score["metric"] == "nDCG@10" and score["split"] == "test":
                name = f"{score['task']} (local collection)"
                found.append(("Retrieval", score["task"], name, score, "nDCG@10 x100"))
    for content in of_generation(results):
        for score in content["scores"] if content["row"] == row else ():
            if score["metric"] == METRICS.get(score["task"], ("acc",))[0]:
                label = TASK_LABELS.get(score["task"], score["task"])
                name = f"{label} ({score['n']} samples)"
                found.append(("text-generation", score["task"], name, score, f"lm-eval {score['metric']}"))
    if not found:
        return ""
    evaluations = [
        EvalResult(
            task_type=kind,
            dataset_type=source,
            dataset_name=name,
            dataset_split=score["split"] if "split" in score else None,
            metric_type=score["metric"],
            metric_name=label,
            metric_value=round(score["value"], 2),
        )
        for kind, source, name, score, label in found
    ]
    index = eval_results_to_model_index(row, evaluations)
    return yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True, width=110)


def outputs(results: Results, root: Path = ROOT) -> dict[Path, str]:
    """Everything the report writes: path to content. Documents that do not exist are left out."""
    written = {}
    for name in DOCUMENTS:
        path = root / name
        if path.exists():
            text = path.read_text(encoding="utf-8")
            if REGION.search(text) or FRONT_REGION.search(text):
                written[path] = fill(text, results)
    for name, content in figures(results, root / "experts").items():
        written[root / "docs" / name] = content
    return written


app = typer.Typer(add_completion=False)


@app.command()
def main(
    check: Annotated[bool, typer.Option(help="Write nothing; fail when something differs.")] = False,
    results_dir: ResultsFolder = RESULTS,
    root: Annotated[Path, typer.Option(help="Root of the repository.")] = ROOT,
) -> None:
    """Fill the tables and draw the figures from the result files."""
    try:
        results = read_all(results_dir)
        if not results:
            raise ValueError(f"expected result files (*.json) in {results_dir}, found none; run a benchmark first")
        wanted = outputs(results, root)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    differing = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in differing:
        if check:
            typer.echo(
                f"differs from the result files: {path.relative_to(root)}; run python -m benchmarks.report", err=True
            )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            typer.echo(f"wrote {path.relative_to(root)}")
    if check and differing:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
