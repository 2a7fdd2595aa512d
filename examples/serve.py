"""Embeddings and chat from one process, by the OpenAI protocol: `python -m examples.serve models/ubmoe-135m`.

Both views are exported once as GGUF; llama.cpp's own server, in the prebuilt wheel of xllamacpp, answers. The encoder
gets a port of its own, because one llama.cpp context either embeds or generates.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

LONGEST = 2048
"""Tokens of a chat, and of one text to embed: with full attention a text must fit into one batch."""


def server(gguf: Path, name: str, *, embedding: bool, port: int, host: str = "127.0.0.1", threads: int = 0) -> Any:
    """A running llama.cpp server for one GGUF file; it ends with the process.

    Args:
        gguf: The model.
        name: What the field `model` of a request says.
        embedding: Serve `/v1/embeddings`; otherwise `/v1/chat/completions`.
        port: 0 takes a free one, see `listening_address` of what is returned.
        host: To listen on.
        threads: 0: as many as llama.cpp chooses.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {name}
    params.hostnames, params.port, params.ui = [host], port, False
    params.embedding = embedding
    params.n_ctx = params.n_batch = params.n_ubatch = LONGEST
    params.n_parallel = 1
    if threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.use_jinja = True
    params.verbosity = 0
    return xllamacpp.Server(params)


def main(
    checkpoint: Annotated[str, typer.Argument(help="UBMoE checkpoint: a folder or a Hub id.")] = "models/ubmoe-135m",
    folder: Annotated[
        Path, typer.Option(help="Folder of the GGUF files; those newer than the checkpoint are kept.")
    ] = Path("runs/serve"),
    encoder_port: Annotated[int, typer.Option(help="Port of the embeddings; 0 takes a free one.")] = 8080,
    generator_port: Annotated[int, typer.Option(help="Port of the chat; 0 takes a free one.")] = 8081,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    threads: Annotated[int, typer.Option(help="Number of threads; 0 leaves the choice to llama.cpp.")] = 0,
) -> None:
    """Serve both views of a checkpoint until interrupted."""
    from ubmoe_st.export import export

    files = {"encoder": folder / "encoder.gguf", "generator": folder / "generator.gguf"}
    sums = Path(checkpoint) / "SHA256SUMS"
    for view, file in files.items():
        if not file.exists() or (sums.exists() and file.stat().st_mtime < sums.stat().st_mtime):
            file.parent.mkdir(parents=True, exist_ok=True)
            export(checkpoint, file, view=view, format="gguf", overwrite=True)  # type: ignore[arg-type]
    encoder = server(files["encoder"], "encoder", embedding=True, port=encoder_port, host=host, threads=threads)
    generator = server(
        files["generator"], "generator", embedding=False, port=generator_port, host=host, threads=threads
    )
    typer.echo(f"{encoder.listening_address}/v1/embeddings")
    typer.echo(f"{generator.listening_address}/v1/chat/completions")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


if __name__ == "__main__":
    typer.run(main)
