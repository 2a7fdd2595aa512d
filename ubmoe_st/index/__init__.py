"""Retrieval indexes at corpus scale: streaming, resumable, exact about what they hold."""

from .core import EmbeddingIndex
from .corpus import BadRow, Corpus, CorpusError
from .group import IndexGroup
from .progress import BuildProgress
from .search import Hit
from .store import Entry
from .tuning import TuningReport

__all__ = [
    "BadRow",
    "BuildProgress",
    "Corpus",
    "CorpusError",
    "EmbeddingIndex",
    "Entry",
    "Hit",
    "IndexGroup",
    "TuningReport",
]
