"""Limits of the numbers of a recipe."""

from __future__ import annotations

from typing import Any


def at_least(section: Any, least: int, *names: str) -> None:
    """Refuse numbers of a recipe that are too small.

    Args:
        section: With the numbers, or lists of them; None is none.
        least: The smallest that there may be.
        *names: Of the numbers.

    Raises:
        ValueError: If one is smaller.
    """
    for name in names:
        value = getattr(section, name)
        smallest = min(value, default=None) if isinstance(value, list) else value
        if smallest is not None and smallest < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def above(section: Any, limit: float, *names: str) -> None:
    """Refuse numbers of a recipe that are a limit or below it.

    Args:
        section: With the numbers; None is none.
        limit: That they must be above.
        *names: Of the numbers.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= limit:
            raise ValueError(f"{name} must be above {limit}, got {value}")


def shares(section: Any, *names: str) -> None:
    """Refuse shares of a recipe that are none.

    Args:
        section: With the numbers; None is none.
        *names: Of the numbers.

    Raises:
        ValueError: If one is not from 0 to 1.
    """
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is a share from 0 to 1, got {value}")
