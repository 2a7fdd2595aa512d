"""One model that embeds like a dedicated embedder and still generates exactly like the LLM it came from."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ubmoe_st.configuration import UBMoEConfig
    from ubmoe_st.dependence import dependence
    from ubmoe_st.index import EmbeddingIndex
    from ubmoe_st.model import UBMoE
    from ubmoe_st.transformer import UBMoETransformer
    from ubmoe_st.upcycling import upcycle

_HOME = {
    "EmbeddingIndex": "index",
    "UBMoE": "model",
    "UBMoEConfig": "configuration",
    "UBMoETransformer": "transformer",
    "dependence": "dependence",
    "upcycle": "upcycling",
}

__all__ = ["EmbeddingIndex", "UBMoE", "UBMoEConfig", "UBMoETransformer", "__version__", "dependence", "upcycle"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `ubmoe --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
