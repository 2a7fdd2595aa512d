"""From a checkpoint, and maybe an index, to what an app serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ubmoe_st.compute import Compute

    from .engine import Engine
    from .settings import Settings

Kind = Literal["torch", "llama.cpp"]
Dtype = Literal["float32", "bfloat16", "float16"]


def load_engine(
    path: str,
    kind: Kind = "torch",
    *,
    name: str | None = None,
    dtype: Dtype | None = None,
    compute: Compute = "stored",
    threads: int | None = None,
    gguf: Path | None = None,
    context: int | None = None,
    generations: int = 2,
) -> Engine:
    """The model of a server.

    Args:
        path: Checkpoint folder or Hub id.
        kind: Library that computes.
        name: What clients call it. None: the last part of `path`.
        dtype: Of the weights, with torch. None: as stored.
        compute: In what numbers the encoder multiplies, with torch; see `UBMoE`.
        threads: None: as many as the library chooses.
        gguf: The base model for llama.cpp. None: see `NativeUBMoE.from_checkpoint`.
        context: Tokens of a prompt and its continuation, with llama.cpp. None: as `NativeUBMoE` says.
        generations: Texts that llama.cpp generates at the same time.

    Raises:
        ValueError: If an argument is of the other kind.
    """
    name = name or Path(path).expanduser().resolve().name
    if kind == "llama.cpp":
        from .native import NativeUBMoE

        for argument, given in (("dtype", dtype is not None), ("compute", compute != "stored")):
            if given:
                raise ValueError(f"{argument} is for the engine torch; with llama.cpp the GGUF file decides")
        more = {} if context is None else {"context": context}
        return NativeUBMoE.from_checkpoint(path, gguf=gguf, name=name, threads=threads, generations=generations, **more)
    for argument, value in (("gguf", gguf), ("context", context)):
        if value is not None:
            raise ValueError(f"{argument} is for the engine llama.cpp; torch goes by the checkpoint alone")
    import torch

    from ubmoe_st.model import UBMoE

    from .engine import TorchEngine

    if threads is not None:
        torch.set_num_threads(threads)
    model = UBMoE(path, model_kwargs={"dtype": getattr(torch, dtype)} if dtype else {})
    views: Any = model[0]
    if model.ubmoe_config is not None and model.ubmoe_config.expert_rank:
        views.use_low_memory()
    views.compute_in(compute)
    return TorchEngine(model, name)


def open_index(paths: Sequence[str | Path], engine: Engine) -> Any:
    """One index, or several as one, searched with the engine's own model. None without a path.

    Args:
        paths: Index folders.
        engine: Of the server.

    Raises:
        ValueError: If the index was built with another model.
    """
    if not paths:
        return None
    from ubmoe_st.index import EmbeddingIndex, IndexGroup

    opened = [EmbeddingIndex.open(path) for path in paths]
    index: Any = opened[0] if len(opened) == 1 else IndexGroup(opened)
    index.use_model(getattr(engine, "model", engine))
    return index


def load_app(
    path: str,
    kind: Kind = "torch",
    *,
    index: Sequence[str | Path] = (),
    api_key: str | None = None,
    settings: Settings | None = None,
    local: bool = False,
    **options: Any,
) -> FastAPI:
    """The app over a checkpoint.

    Args:
        path: Checkpoint folder or Hub id.
        kind: Library that computes.
        index: Index folders to search.
        api_key: As for `create_app`.
        settings: As for `create_app`.
        local: As for `create_app`.
        **options: As for `load_engine`.
    """
    from .app import create_app
    from .settings import Settings

    settings = settings or Settings()
    engine = load_engine(path, kind, generations=settings.generations, **options)
    return create_app(engine, index=open_index(index, engine), api_key=api_key, settings=settings, local=local)
