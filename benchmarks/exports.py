"""Exports beside the checkpoint: `python -m benchmarks.exports run --model models/ubmoe-135m`.

Each export is opened in a process of its own by the engine that it is for, takes turns with torch fp32 in the same run,
and is compared by cosine, by Spearman on STSBenchmark dev, and by the tokens a second of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import data as local
from benchmarks.options import Checkpoint, DataDir
from benchmarks.process import in_process
from benchmarks.results import RESULTS, ResultFile, command_line, fingerprint, one_line_errors, run_record, spearman
from training.data import data_folder

LONGEST = 2048
"""Tokens of the longest text, for llama.cpp."""

EXPORTS: dict[str, tuple[str, str | None]] = {
    "onnx": ("onnx", None),
    "onnx-int8": ("onnx", "int8"),
    "openvino": ("openvino", None),
    "openvino-int8": ("openvino", "int8"),
    "gguf": ("gguf", None),
    "gguf-f16": ("gguf", "f16"),
    "gguf-int8": ("gguf", "int8"),
}
LABELS = {
    "torch": "torch, fp32",
    "onnx": "onnxruntime, fp32",
    "onnx-int8": "onnxruntime, int8",
    "openvino": "OpenVINO, fp32",
    "openvino-int8": "OpenVINO, int8",
    "gguf": "llama.cpp, F32",
    "gguf-f16": "llama.cpp, F16",
    "gguf-int8": "llama.cpp, Q8_0",
}


def _llama_cpp(gguf: Path, threads: int) -> Any:
    """A llama.cpp server that embeds; it ends with the process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.hostnames, params.port, params.ui = ["127.0.0.1"], 0, False
    params.embedding = True
    # With full attention a text must fit into one batch.
    params.n_ctx = params.n_batch = params.n_ubatch = LONGEST
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    return xllamacpp.Server(params)


def encoder(system: str, path: str, threads: int) -> Any:
    """A function from a list of texts to vectors (N, D), in the engine of `system`.

    Args:
        system: A key of `LABELS`.
        path: The checkpoint, or the export.
        threads: Threads of the engine.
    """
    if system == "torch":
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        model = SentenceTransformer(path, device="cpu")
        return lambda texts: model.encode(texts, batch_size=len(texts))
    if system.startswith("gguf"):
        llama = _llama_cpp(Path(path), threads)

        def embed(texts: Sequence[str]) -> np.ndarray:
            found = llama.handle_embeddings({"input": list(texts)})
            return np.array([entry["embedding"] for entry in found["data"]])

        return embed
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))

    def inputs(texts: Sequence[str]) -> dict[str, np.ndarray]:
        batch = tokenizer.encode_batch(list(texts))
        return {
            "input_ids": np.array([x.ids for x in batch]),
            "attention_mask": np.array([x.attention_mask for x in batch]),
        }

    if system.startswith("onnx"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(Path(path) / "onnx" / "model.onnx"), options)
        return lambda texts: session.run(["sentence_embedding"], inputs(texts))[0]
    import openvino

    model = openvino.compile_model(
        Path(path) / "openvino" / "openvino_model.xml",
        "CPU",
        {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"},
    )
    return lambda texts: np.array(model(inputs(texts))["sentence_embedding"])


def measure(
    system: str, path: str, texts: Sequence[str], *, batch_size: int, threads: int, repeats: int = 1
) -> tuple[np.ndarray, list[float]]:
    """Vectors (N, D) of texts, in batches of similar length, and seconds of each repeat; in this (fresh) process.

    Args:
        system: A key of `LABELS`.
        path: The checkpoint, or the export.
        texts: N texts.
        batch_size: Texts per batch.
        threads: Threads of the engine.
        repeats: How often all texts are encoded, after one batch that is not counted.
    """
    run = encoder(system, path, threads)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [[texts[i] for i in order[first : first + batch_size]] for first in range(0, len(order), batch_size)]
    run(batches[0])
    seconds, found = [], np.zeros(0)
    for _ in range(repeats):
        start = time.perf_counter()
        found = np.concatenate([run(batch) for batch in batches])
        seconds.append(time.perf_counter() - start)
    vectors = np.empty_like(found)
    vectors[order] = found
    return vectors, seconds


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, (N,)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def spearman_of_pairs(vectors: np.ndarray, gold: Sequence[float]) -> float:
    """Spearman x100 of the cosines of rows 2n and 2n + 1 with the gold scores."""
    return spearman(gold, cosines(vectors[::2], vectors[1::2]).tolist())


def size_of(path: Path) -> int:
    """Bytes of a file, or of the encoder's files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if "generator" not in file.parts]
    return sum(file.stat().st_size for file in files if file.is_file())


app = typer.Typer(add_completion=False)


@app.callback()
def commands() -> None:
    """Exports of a checkpoint beside the checkpoint."""


@app.command(name="run")
def main(
    model: Checkpoint = Path("models/ubmoe-135m"),
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = RESULTS,
    exports: Annotated[Path, typer.Option(help="Folder of the exports; what is there is not written again.")] = Path(
        "runs/exports"
    ),
    systems: Annotated[str, typer.Option(help="Systems, with commas between.")] = ",".join(EXPORTS),
    pairs: Annotated[int, typer.Option(help="Pairs of STSBenchmark dev, from the start of a seeded order.")] = 1500,
    rounds: Annotated[int, typer.Option(help="Turns each system takes.")] = 1,
    batch_size: int = 32,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Write the exports of a checkpoint and measure them beside torch fp32."""
    from ubmoe_st.export import export

    with one_line_errors(RuntimeError):
        wanted = [name.strip() for name in systems.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in EXPORTS]
        if unknown:
            raise ValueError(f"systems must be of {', '.join(EXPORTS)}, got {unknown[0]!r}")
        dev = local.sts_pairs(data_folder(data_dir), "STSBenchmark", "validation")
        chosen = np.random.default_rng(seed).permutation(len(dev["score"]))[:pairs]
        texts = [dev[side][index] for index in chosen for side in ("sentence1", "sentence2")]
        gold = [dev["score"][index] for index in chosen]
        record = run_record(
            command_line("benchmarks.exports"),
            seed=seed,
            packages=("onnxruntime", "openvino", "nncf", "gguf", "xllamacpp"),
            dtype="float32",
            prompt="none",
            pooling="mean",
            pairs=len(gold),
            fingerprint=fingerprint(model),
        )
        record["threads"] = threads
        paths = {"torch": str(model)}
        for name in wanted:
            format, quantize = EXPORTS[name]
            target = exports / (f"{model.name}-{name}" + (".gguf" if format == "gguf" else ""))
            if not target.exists():
                typer.echo(f"writing {target}")
                export(str(model), target, format=format, quantize=quantize)  # type: ignore[arg-type]
            paths[name] = str(target)
        vectors: dict[str, np.ndarray] = {}
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        for _ in range(rounds):
            for name, path in paths.items():
                vectors[name], taken = in_process(measure, name, path, texts, batch_size=batch_size, threads=threads)
                seconds[name] += taken
                typer.echo(f"{LABELS[name]}: {len(texts) / min(taken):.1f} texts/s")
        reference = spearman_of_pairs(vectors["torch"], gold)
        peer = float(np.median([len(texts) / taken for taken in seconds["torch"]]))
        rows = []
        for name, path in paths.items():
            close, found = cosines(vectors[name], vectors["torch"]), spearman_of_pairs(vectors[name], gold)
            rates = [len(texts) / taken for taken in seconds[name]]
            rows.append(
                [
                    LABELS[name],
                    f"{size_of(Path(path)) / 1e6:.0f}",
                    f"{close.mean():.5f}",
                    f"{close.min():.5f}",
                    f"{found:.2f} ({found - reference:+.2f})",
                    f"{np.median(rates):.1f} [{min(rates):.1f}, {max(rates):.1f}]",
                    f"{np.median(rates) / peer:.2f}",
                ]
            )
            typer.echo(" | ".join(rows[-1]))
        columns = ["engine", "MB", "mean cosine", "smallest cosine", "STSB-dev", "texts/s [range]", "x torch"]
        file = ResultFile(
            out / f"exports-{model.name}.json", benchmark="exports", row=model.name, run=record, label=model.name
        )
        file.add(tables={"exports": {"columns": columns, "rows": rows}})


if __name__ == "__main__":
    app()
