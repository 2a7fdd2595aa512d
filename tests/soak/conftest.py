"""Counts of the reliability tests: a few seconds by default, all of them with `UBMOE_SOAK=1` (`make soak`).

Another number is a share of the full counts: `UBMOE_SOAK=0.1`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

SHARE = float(os.environ.get("UBMOE_SOAK", "0"))


@pytest.fixture
def amount() -> Callable[[int, int], int]:
    """How many: of a short and a full count the one that is wanted."""

    def choose(short: int, full: int) -> int:
        return max(short, round(full * SHARE))

    return choose


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Keeps what a test measured, for the table at the end of a long run."""
    begun, said = time.monotonic(), []
    yield said.append
    took = time.monotonic() - begun
    request.node.user_properties += [("figure", f"{text} ({took:.0f} s)") for text in said]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not SHARE:
        return
    terminalreporter.section("figures")
    for report in terminalreporter.getreports(""):  # of setups and teardowns
        for name, text in report.user_properties:
            if name == "figure" and report.when == "teardown":
                terminalreporter.line(f"{report.nodeid.rpartition('::')[2]}: {text}")
