"""`ubmoe serve`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ubmoe_st.serving.loading import Dtype
from ubmoe_st.terminal import only_for, say, status

if TYPE_CHECKING:
    from .settings import Settings

_SHUTDOWN_S = 5
ComputeOption = Annotated[
    Literal["stored", "auto", "bf16", "int8"],
    typer.Option(help="Numbers the encoder multiplies in; auto: bf16 where the processor has it, else as stored."),
]


def serve(
    path: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder or Hub id.", show_default=False)],
    index: Annotated[
        list[Path] | None, typer.Option(help="Index folder to search and to answer from; may be given several times.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; another one than loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="UBMOE_API_KEY", help="Key that clients must send.", show_default=False)
    ] = None,
    engine: Annotated[
        Literal["torch", "llama.cpp", "ray"], typer.Option(help="Library that computes; ray: torch in replicas.")
    ] = "torch",
    name: Annotated[str | None, typer.Option(help="Name of the model for clients; default: of the folder.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that compute; default: all cores.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Weight dtype of torch; default: as stored.")] = None,
    compute: ComputeOption = "stored",
    gguf: Annotated[
        Path | None, typer.Option(help="GGUF file of the base model for llama.cpp; default: its own, or one is made.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Number of replicas with ray; default: 2.", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a prompt and its continuation with llama.cpp; default: 2048."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Largest batch to embed, tokens with padding.")] = 8192,
    batch_wait_ms: Annotated[float, typer.Option(min=0, help="How long a text waits for others, milliseconds.")] = 2.0,
    generations: Annotated[int, typer.Option(min=1, help="Number of texts generated at the same time.")] = 2,
    max_queue: Annotated[int, typer.Option(min=1, help="Number of texts that may wait to be embedded.")] = 8192,
    max_waiting: Annotated[int, typer.Option(min=1, help="Number of requests that may wait to generate.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest time of a request, seconds.")] = 600.0,
) -> None:
    """Serve embeddings, chats and completions by the OpenAI protocol, from one process and one port."""
    try:
        from .app import check_host
        from .settings import Settings
    except ImportError as error:
        raise ImportError(f"serving needs FastAPI ({error.name} is missing): pip install 'ubmoe-st[serve]'") from error
    check_host(host, api_key)
    settings = Settings(
        batch_tokens=batch_tokens,
        batch_wait_ms=batch_wait_ms,
        generations=generations,
        max_queue=max_queue,
        max_waiting=max_waiting,
        timeout_s=timeout,
    )
    options: dict[str, Any] = {
        "index": [str(folder.resolve()) for folder in index or []],
        "api_key": api_key,
        "name": name,
        "dtype": dtype,
        "compute": compute,
        "threads": threads,
    }
    only_for("ray", engine, replicas=replicas)
    only_for("llama.cpp", engine, gguf=gguf, context=context)
    if engine == "ray":
        from .ray_app import run

        run(path, replicas=replicas or 2, host=host, port=port, settings=settings, **options)
        return
    _serve_here(path, engine, host, port, settings, gguf=gguf, context=context, **options)


def _serve_here(path: str, kind: Any, host: str, port: int, settings: Settings, **options: Any) -> None:
    import uvicorn

    from .loading import load_app

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Taken before the model is loaded: a port in use is told at once.
    with socket.create_server((host, port), family=family) as listening:
        with status(f"loading {path}"):
            app = load_app(path, kind, settings=settings, local=options["api_key"] is None, **options)
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{listening.getsockname()[1]}/v1")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SHUTDOWN_S)
        ending_server(config, app.state.service.generations.end, _SHUTDOWN_S - 2).run(sockets=[listening])


def ending_server(config: Any, end: Callable[[], None], seconds: float) -> Any:
    """A uvicorn server that tells its work to end before it cancels it, so that clients get an answer.

    Args:
        config: Of uvicorn.
        end: Called once the server has begun to shut down.
        seconds: So long after.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            later = asyncio.get_running_loop().call_later(seconds, end)
            try:
                await super().shutdown(sockets)
            finally:
                later.cancel()

    return Server(config)
