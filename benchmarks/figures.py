"""The figures of the report, drawn from result files and from the curves of trainings: the same bytes each time."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lm_tasks import METRICS
from benchmarks.rows import TASK_LABELS, Results, of, of_generation, pick, released

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, MEASURED, PUBLISHED = "#b5301f", "#2e6f9e", "#b8b8b8"
LINES = ("#b5301f", "#2e6f9e", "#d99a1c", "#4a8f4a", "#7b5ea7", "#5b5b5b")
"""Told apart by lightness too; `STYLES` tells them apart without colour."""
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
SHOWN = (
    "UBMoE paper, FFN trained, 0.5B",
    "UBMoE paper, FFN trained, 7B",
    "LLM2Vec, Mistral-7B",
    "SimCSE, BERT-base",
)
"""Of the published results, those in the figure."""
PARTS = {"main": "on itself", "before": "on tokens before", "after": "on tokens after"}
CURVE = re.compile(r"(?:eval_)?(?P<set>.+?)_(?P<metric>spearman_cosine|cosine_ndcg@10)")


def figures(results: Results, experts: Path | None = None) -> dict[str, str]:
    """SVG texts by file name, the same bytes for the same results.

    Args:
        results: From `read_all`.
        experts: Folder of released experts, whose `training.json` hold the curves. None: no curves.
    """
    import matplotlib

    matplotlib.use("svg")
    drawn = {}
    with matplotlib.rc_context({"svg.hashsalt": "ubmoe", "svg.fonttype": "none", "font.size": 9}):
        for name, figure in (
            ("sts.svg", _sts(results)),
            ("generation.svg", _generation(results)),
            ("retrieval.svg", _retrieval(results)),
            ("dependence.svg", _dependence(results)),
            ("training.svg", _training(curves(experts)) if experts else None),
        ):
            if figure is not None:
                drawn[name] = _svg(figure)
    return drawn


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", facecolor="white"
    )
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _sts(results: Results) -> Figure | None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    own = released(results)
    bars: list[tuple[str, float, float, str]] = []
    for content in of(results, "embedding"):
        if average := content.get("averages", {}).get("avg7"):
            color = OURS if content["row"] in own else MEASURED
            bars.append((content["label"], average["value"], average["high"] - average["value"], color))
    if not bars:
        return None
    for content in of(results, "published"):
        bars += [(s["system"], s["avg7"], 0.0, PUBLISHED) for s in content["scores"] if s["system"] in SHOWN]
    bars.sort(key=lambda bar: bar[1])
    figure = Figure(figsize=(7.0, 0.3 * len(bars) + 1.2))
    axes = figure.subplots()
    names, values, errors, colors = zip(*bars)
    axes.barh(range(len(bars)), values, xerr=errors, color=colors, height=0.72, error_kw={"lw": 1})
    for place, (value, error) in enumerate(zip(values, errors)):
        axes.text(value + error + 1, place, f"{value:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), names)
    axes.set_xlim(0, 100)
    axes.set_xlabel("mean Spearman correlation x100, with 95 % interval")
    axes.set_title("Seven STS test sets (avg7)", loc="left", fontsize=10)
    kinds = {OURS: "this repository", MEASURED: "others, measured here", PUBLISHED: "published by others"}
    handles = [Patch(color=color, label=label) for color, label in kinds.items() if color in colors]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _grouped(
    title: str, groups: Sequence[str], series: Sequence[tuple[str, list[dict[str, Any] | None]]], label: str
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.1 * len(groups) + 1), 3.0))
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (name, scores) in enumerate(series):
        points = [(place, score) for place, score in enumerate(scores) if score is not None]
        axes.bar(
            [place + (number - (len(series) - 1) / 2) * width for place, _ in points],
            [score["value"] for _, score in points],
            width,
            yerr=[
                [score["value"] - score["low"] for _, score in points],
                [score["high"] - score["value"] for _, score in points],
            ],
            label=name,
            color=LINES[number % len(LINES)],
            edgecolor="white",
            error_kw={"lw": 0.8},
        )
    axes.set_xticks(range(len(groups)), groups, rotation=20 if len(groups) > 4 else 0)
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _generation(results: Results) -> Figure | None:
    files = sorted(of_generation(results), key=lambda c: (c["row"] != "base", c["row"]))
    tasks = [t for t in METRICS if t != "wikitext" and any(pick(c, task=t) for c in files)]
    if not files or not tasks:
        return None
    series = [(c["label"], [pick(c, task=task, metric=METRICS[task][0]) for task in tasks]) for c in files]
    title = "Generation, the base beside the generator view"
    return _grouped(title, [TASK_LABELS[task] for task in tasks], series, "accuracy x100, 95 % interval")


def _retrieval(results: Results) -> Figure | None:
    own = released(results)
    files = [content for content in of(results, "retrieval") if "fusion" not in content]
    files.sort(key=lambda content: content["row"] not in own)
    tasks = list(dict.fromkeys(s["task"] for c in files for s in c["scores"] if s["split"] == "test"))
    if not tasks:
        return None
    series = [(c["label"], [pick(c, task=t, metric="nDCG@10") for t in tasks]) for c in files]
    return _grouped("Retrieval, by collection", tasks, series, "nDCG@10 x100, 95 % interval")


def _dependence(results: Results) -> Figure | None:
    """By layer, in the bucket of the longest documents."""
    from matplotlib.figure import Figure

    rows = next((content["rows"] for content in of(results, "dependence") if content.get("rows")), None)
    if not rows:
        return None
    buckets = [bucket for row in rows.values() for bucket in row["buckets"]]
    longest = max(buckets, key=lambda bucket: int(bucket.split("-")[1]))
    figure = Figure(figsize=(8.6, 3.1), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    for column, (axes, (part, words)) in enumerate(zip(panels, PARTS.items())):
        for number, (label, row) in enumerate(rows.items()):
            if longest in row["buckets"]:
                layers = [values[column] for values in row["buckets"][longest]["layers"]]
                style = {"color": LINES[number % len(LINES)], "linestyle": STYLES[number % len(STYLES)]}
                axes.plot(range(1, len(layers) + 1), layers, label=label, linewidth=1.4, **style)
        axes.set_title(f"{part}: {words}", fontsize=9)
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of attention, percent")
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=6
    )
    figure.suptitle(f"Dependence of a token by layer, causal model, documents of {longest} tokens", fontsize=10)
    return figure


def curves(experts: Path) -> dict[str, dict[str, Any]]:
    """Development scores against tokens of each training under a folder, by name of its folder.

    Each holds `tokens`, one number for each evaluation, `scores` x100 by set and metric, and `exact`: False where the
    file has no tokens for its steps and they are taken in proportion of all it read (those a second, if need be).

    Raises:
        ValueError: If a file is no summary of a training, with its name.
    """
    found = {}
    for file in sorted(experts.glob("*/training.json")):
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
            entries = [entry for entry in summary["curve"] if any(CURVE.fullmatch(key) for key in entry)]
            exact = all("tokens" in entry for entry in entries)
            if not exact:
                each = summary.get("tokens", summary["tokens_per_second_and_process"] * summary["seconds"])
                total = each * summary["processes"]
            tokens = [e["tokens"] if exact else total * e["step"] / summary["steps"] for e in entries]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"Expected a summary of a training in {file}, got one without {error}.") from error
        if entries:
            keys = {key: match for entry in entries for key in entry if (match := CURVE.fullmatch(key))}
            scores = {
                (m["set"], m["metric"]): [100 * e[key] if key in e else None for e in entries]
                for key, m in keys.items()
            }
            found[file.parent.name] = {"tokens": tokens, "scores": scores, "exact": exact}
    return found


def _training(found: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    sets = list(dict.fromkeys(key for curve in found.values() for key in curve["scores"]))
    if not sets:
        return None
    figure = Figure(figsize=(3.6 * len(sets) + 0.8, 2.9), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, key in zip(panels, sets):
        for number, (name, curve) in enumerate(found.items()):
            points = [(t, s) for t, s in zip(curve["tokens"], curve["scores"].get(key, [])) if s is not None]
            if points:
                style = {"color": LINES[number % len(LINES)], "linestyle": STYLES[number % len(STYLES)]}
                label = name if curve["exact"] else f"{name} (tokens by steps)"
                axes.plot(*zip(*points), marker="o", markersize=3.5, linewidth=1.4, label=label, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("training tokens (log axis)")
        axes.set_ylabel("nDCG@10 x100" if "ndcg" in key[1] else "Spearman x100")
        axes.set_title(key[0], fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle("Development scores in training", fontsize=10)
    return figure
