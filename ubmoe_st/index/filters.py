"""Filters: which rows have the metadata that was asked for."""

from __future__ import annotations

import json
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, datetime, time, timezone
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import numpy as np

from ..forking import ForkSafeLock
from .corpus import id_text, plain_array
from .store import Snapshot

logger = logging.getLogger(__name__)

Filter = Mapping[str, Any] | Callable[[dict[str, Any]], bool]
"""`{"lang": "en"}`, `{"lang": ["en", "de"]}`, `{"year": {">=": 1990, "<": 2000}}` (all must hold), or a function of the
metadata of a row. `id`, `title` and `parent` of the entry are there too, unless the row has such a field of its own.
A wanted None is a field that is not there."""

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
COLLECTIONS = (list, tuple, set, frozenset)
NEGATIVE = ("!=", "not in")
OWN_FIELDS = ("id", "title", "parent")
"""What a filter sees of an entry beside its metadata."""
IDENTITIES = ("id", "parent")
ORDERS = ("<", "<=", ">", ">=")
MISSING = object()
KEPT_MASKS = 32
DEEPEST = 8
"""Lists in lists of a wanted value."""


def holds(value: Any, name: str, wanted: Any) -> bool:
    """Whether a field's value passes one condition. A list passes when one of its items does."""
    if name == "exists":
        return (value is not MISSING) == bool(wanted)
    if name in NEGATIVE:
        return not holds(value, {"!=": "==", "not in": "in"}[name], wanted)
    if name == "in":
        return any(holds(value, "==", item) for item in wanted)
    if wanted is None or value is MISSING:
        return wanted is None and value is MISSING
    if isinstance(value, list) and not (name == "==" and isinstance(wanted, list)):
        return any(holds(item, name, wanted) for item in value)
    if (pair := _alike(value, wanted)) is None:
        return False
    try:
        return bool(OPERATORS[name](*pair))
    except TypeError:
        return False


def _alike(value: Any, wanted: Any) -> tuple[Any, Any] | None:
    """A stored value and a wanted one in forms that compare; None where they are of different types.

    A corpus may hold as text what is wanted as a number or a truth value (CSV has nothing else), and dates are stored
    as ISO text.
    """
    if isinstance(wanted, date):
        return _as_times(value, wanted)
    if isinstance(wanted, bool) and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower())
    if isinstance(value, bool) or isinstance(wanted, bool):
        return (value, wanted) if isinstance(value, bool) and isinstance(wanted, bool) else None
    if isinstance(wanted, (int, float, Decimal)) and isinstance(value, str):
        try:
            value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        except ValueError:
            return None
    if isinstance(wanted, Decimal) and isinstance(value, float):
        wanted = float(wanted)  # as one with decimal places is stored; a whole number compares exactly
    return None if isinstance(value, str) != isinstance(wanted, str) else (value, wanted)


def _as_times(value: Any, wanted: date) -> tuple[date, date] | None:
    """ISO text and a wanted date, or a wanted time, which is in UTC where it has no zone; None for other values."""
    try:
        stored = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except (AttributeError, ValueError):
        return None
    if not isinstance(wanted, datetime):
        return stored.date(), wanted
    first, second = (one if one.tzinfo else one.replace(tzinfo=timezone.utc) for one in (stored, wanted))
    return first, second


def _items(value: Any) -> Any:
    """The items of a list, or the one value."""
    return value if isinstance(value, COLLECTIONS) else (value,)


def _as_id(value: Any) -> Any:
    """A wanted id as ids are stored."""
    return value if (identity := id_text(value)) is None else identity


def _as_wanted(field: str, value: Any, depth: int = 0) -> Any:
    """A wanted value, or a list of them, in the form in which values are stored.

    Raises:
        TypeError: If it is nothing that a field can hold.
        ValueError: If it is NaN or no time, which equal nothing, or lists in lists without an end.
    """
    if depth > DEEPEST:
        raise ValueError(f"filter on {field!r}: more than {DEEPEST} lists in lists")
    if hasattr(value, "tolist"):  # of numpy, pandas and torch
        value = plain_array(value)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (UUID, time)):
        return str(value) if isinstance(value, UUID) else value.isoformat()
    if value is None or isinstance(value, (str, int, float, Decimal, date)):
        if value != value:
            raise ValueError(f"filter on {field!r}: {value!r} equals nothing; ask for None, or for another value")
        return value
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray, Mapping)):
        return [_as_wanted(field, one, depth + 1) for one in value]
    raise TypeError(
        f"filter on {field!r}: expected a text, a number, a truth value, a date or None, or a list of those, "
        f"got {value!r}"
    )


def conditions(spec: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """A filter as (field, operator, value) triples that must all hold.

    Raises:
        ValueError: For an operator that does not exist, or none at all, and for NaN.
        TypeError: For what is no filter, a field that is no text, and a value that its operator does not take.
    """
    if not isinstance(spec, Mapping):
        raise TypeError(f"a filter is a mapping or a function, got {type(spec).__name__}")
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
                value = _as_wanted(field, value)
                many = isinstance(value, list)
                if name in ("in", "not in") and not many:
                    raise TypeError(f"filter on {field!r}: {name!r} takes a list of values, got {value!r}")
                if name in ORDERS and (many or value is None):
                    raise TypeError(f"filter on {field!r}: {name!r} takes one value, got {value!r}")
                if name == "exists" and not isinstance(value, bool):
                    raise TypeError(f"filter on {field!r}: 'exists' takes true or false, got {value!r}")
                triples.append((field, name, value))
        else:
            value = _as_wanted(field, wanted)
            triples.append((field, "in" if isinstance(value, list) else "==", value))
    return triples


def as_test(spec: Filter) -> Callable[[dict[str, Any]], bool]:
    """A filter as a function of the fields of a row.

    Raises:
        TypeError: As `conditions`, like `ValueError`.
    """
    if callable(spec):
        return spec
    wanted_all = conditions(spec)
    return lambda fields: all(
        holds(*_comparable(field, name, fields.get(field, MISSING), wanted)) for field, name, wanted in wanted_all
    )


def both(first: Filter | None, second: Filter | None) -> Filter | None:
    """A filter that is passed where both are."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, Mapping) and isinstance(second, Mapping) and not first.keys() & second.keys():
        return {**first, **second}
    tests = [as_test(first), as_test(second)]
    return lambda fields: all(test(dict(fields)) for test in tests)


def _comparable(field: str, name: str, value: Any, wanted: Any) -> tuple[Any, str, Any]:
    """The arguments of `holds`, with ids as they are stored."""
    if field not in IDENTITIES or name in ORDERS:
        return value, name, wanted
    many = isinstance(wanted, COLLECTIONS)
    return _as_id(value), name, [_as_id(one) for one in wanted] if many else _as_id(wanted)


class FilterEngine:
    """Evaluates filters over one snapshot; keeps the columns and masks it has worked out.

    Args:
        snapshot: The rows.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._columns: dict[str, list[Any]] = {}
        self._masks: dict[str, np.ndarray] = {}
        self._lock = ForkSafeLock()

    def mask(self, spec: Filter) -> np.ndarray:
        """Which stored rows pass, bool (N,). Deleted rows are not looked at apart.

        Raises:
            TypeError: If `spec` is neither a mapping nor callable; else as `conditions`.
        """
        if callable(spec):
            return np.fromiter((bool(spec(fields)) for fields in self._rows()), bool, self._snapshot.stored_rows)
        with self._lock:
            wanted_all = conditions(spec)
            key = repr(wanted_all)
            if key not in self._masks:
                mask = np.ones(self._snapshot.stored_rows, bool)
                for field, name, wanted in wanted_all:
                    column = self._column(field)
                    tests = (holds(*_comparable(field, name, value, wanted)) for value in column)
                    held = np.fromiter(tests, bool, len(column))
                    if name != "exists" and (held.all() if name in NEGATIVE else not held.any()):
                        self._warn_of_type(field, name, column, wanted)
                    mask &= held
                if len(self._masks) >= KEPT_MASKS:
                    self._masks.pop(next(iter(self._masks)))
                self._masks[key] = mask
            return self._masks[key]

    def _warn_of_type(self, field: str, name: str, column: list[Any], wanted: Any) -> None:
        """Say that a filter decides nothing because no row has a value of the type that is wanted."""
        other = None
        if any(one is None for one in _items(wanted)):
            return
        whole = isinstance(wanted, list) and name in ("==", "!=")  # of a field that is a list itself
        if whole and any(isinstance(value, list) for value in column):
            return
        for item in (item for value in column if value is not MISSING for item in _items(value)):
            value, _, wanted_here = _comparable(field, name, item, wanted)
            if not whole and any(_alike(value, one) is not None for one in _items(wanted_here)):
                return
            other = value
        if other is not None:
            logger.warning(
                "filter: no value of %r in %s compares with %r, a %s: they are like %r, a %s",
                field,
                self._snapshot.folder,
                wanted,
                type(wanted).__name__,
                other,
                type(other).__name__,
            )

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Every row's metadata, and what it has of `OWN_FIELDS` where the metadata have no field of that name."""
        for segment in self._snapshot.segments:
            for batch in segment.entries.batches():
                columns = (batch.column(name).to_pylist() for name in (*OWN_FIELDS, "metadata"))
                for *own, text in zip(*columns):
                    fields = {name: value for name, value in zip(OWN_FIELDS, own) if value is not None}
                    yield fields | json.loads(text) if text else fields

    def _column(self, field: str) -> list[Any]:
        if field not in self._columns:
            column = [fields.get(field, MISSING) for fields in self._rows()]
            if all(value is MISSING for value in column) and column:
                known = sorted({key for fields in self._rows() for key in fields if key not in OWN_FIELDS})
                logger.warning(
                    "filter: no row of %s has a field %r; it has %s",
                    self._snapshot.folder,
                    field,
                    ", ".join(known) or "no metadata",
                )
                return column  # not kept: whoever filters could ask for any number of names
            self._columns[field] = column
        return self._columns[field]
