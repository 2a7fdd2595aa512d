"""Scripts that run an export in a process of its own, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

# An import hook that hides packages, put before scripts that run in a process of their own.
HIDE = """
import sys, importlib.util as util
for name in {hidden!r}:
    sys.modules[name] = None
"""


def in_process(script: str, *arguments: object, hidden: tuple[str, ...] = ("ubmoe_st",)) -> object:
    run = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + script, *(str(x) for x in arguments)],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def cosine(a, b) -> np.ndarray:
    a, b = np.asarray(a), np.asarray(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def tree(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
