"""Filters: which rows have the metadata that was asked for."""

from __future__ import annotations

import json
import logging
import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .store import Snapshot

logger = logging.getLogger(__name__)

Filter = Mapping[str, Any] | Callable[[dict[str, Any]], bool]
"""`{"lang": "en"}`, `{"lang": ["en", "de"]}`, `{"year": {">=": 1990, "<": 2000}}` (all must hold), or a function of the
metadata of a row."""

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
COLLECTIONS = (list, tuple, set, frozenset)
NEGATIVE = ("!=", "not in")
MISSING = object()
KEPT_MASKS = 32


def _holds(value: Any, name: str, wanted: Any) -> bool:
    """Whether a field's value passes one condition. A list passes when one of its items does."""
    if name == "exists":
        return (value is not MISSING) == bool(wanted)
    if name in NEGATIVE:
        return not _holds(value, {"!=": "==", "not in": "in"}[name], wanted)
    if value is MISSING:
        return False
    if isinstance(value, list) and not (name == "==" and isinstance(wanted, list)):
        return any(_holds(item, name, wanted) for item in value)
    if name == "in":
        return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in wanted)
    if isinstance(value, bool) != isinstance(wanted, bool):
        return False
    try:
        return bool(OPERATORS[name](value, wanted))
    except TypeError:
        return False


def conditions(spec: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """A filter as (field, operator, value) triples that must all hold.

    Raises:
        ValueError: For an operator that does not exist, or none at all.
        TypeError: For a field that is no text, or `in` without a list.
    """
    triples = []
    for field, wanted in spec.items():
        if not isinstance(field, str):
            raise TypeError(f"a filter names fields by text, got {field!r}")
        if isinstance(wanted, Mapping):
            if not wanted:
                raise ValueError(f"filter on {field!r}: expected an operator and a value, got {{}}")
            for name, value in wanted.items():
                if name not in (*OPERATORS, *NEGATIVE, "in", "exists"):
                    known = ", ".join([*OPERATORS, *NEGATIVE, "in", "exists"])
                    raise ValueError(f"filter on {field!r}: there is no operator {name!r}, only {known}")
                if name in ("in", "not in") and not isinstance(value, COLLECTIONS):
                    raise TypeError(f"filter on {field!r}: {name!r} takes a list of values, got {value!r}")
                triples.append((field, name, value))
        else:
            many = isinstance(wanted, COLLECTIONS)
            triples.append((field, "in" if many else "==", wanted))
    return triples


class FilterEngine:
    """Evaluates filters over one snapshot; keeps the columns and masks it has worked out.

    Args:
        snapshot: The rows.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._columns: dict[str, list[Any]] = {}
        self._masks: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def mask(self, spec: Filter) -> np.ndarray:
        """Which stored rows pass, bool (N,). Deleted rows are not looked at apart.

        Raises:
            TypeError: If `spec` is neither a mapping nor callable.
        """
        if callable(spec):
            rows = (bool(spec(json.loads(text) if text else {})) for text in self._metadata())
            return np.fromiter(rows, bool, self._snapshot.stored_rows)
        if not isinstance(spec, Mapping):
            raise TypeError(f"a filter is a mapping or a function, got {type(spec).__name__}")
        with self._lock:
            wanted_all = conditions(spec)
            key = repr(sorted(spec.items(), key=lambda item: item[0]))
            if key not in self._masks:
                mask = np.ones(self._snapshot.stored_rows, bool)
                for field, name, wanted in wanted_all:
                    column = self._column(field)
                    mask &= np.fromiter((_holds(value, name, wanted) for value in column), bool, len(column))
                if len(self._masks) >= KEPT_MASKS:
                    self._masks.pop(next(iter(self._masks)))
                self._masks[key] = mask
            return self._masks[key]

    def _metadata(self) -> Any:
        for segment in self._snapshot.segments:
            for batch in segment.entries.batches():
                yield from batch.column("metadata").to_pylist()

    def _column(self, field: str) -> list[Any]:
        if field not in self._columns:
            self._columns[field] = [
                json.loads(text).get(field, MISSING) if text else MISSING for text in self._metadata()
            ]
            if all(value is MISSING for value in self._columns[field]) and self._columns[field]:
                known = sorted({key for text in self._metadata() if text for key in json.loads(text)})
                logger.warning(
                    "filter: no row of %s has a field %r; it has %s",
                    self._snapshot.folder,
                    field,
                    ", ".join(known) or "no metadata",
                )
        return self._columns[field]
