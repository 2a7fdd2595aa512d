"""Both views behind one HTTP port, by the OpenAI protocol: `ubmoe serve`, or `create_app` in a server of your own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .engine import Engine, Sampling, Tokens, TorchEngine
    from .native import NativeUBMoE
    from .settings import Settings

_HOME = {
    "Engine": "engine",
    "NativeUBMoE": "native",
    "Sampling": "engine",
    "Settings": "settings",
    "Tokens": "engine",
    "TorchEngine": "engine",
    "create_app": "app",
}

__all__ = ["Engine", "NativeUBMoE", "Sampling", "Settings", "Tokens", "TorchEngine", "create_app"]


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that the command line does not wait for FastAPI."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
