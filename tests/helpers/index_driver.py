"""A process that builds and changes indexes in forked children, which a test may kill at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

CUT = {"window_tokens": 60, "batch_tokens": 20, "segment_rows": 25}
"""Cuts a corpus of a few dozen rows into several windows, batches and segments."""

ROOT = Path(__file__).parents[2]

# Imports the index alone (no torch), then forks one child per attempt, so that an attempt takes milliseconds.
DRIVER = """
import os, random, signal, sys, time, types
from pathlib import Path
root = Path(sys.argv[1])
package = types.ModuleType("ubmoe_st")
package.__path__ = [str(root / "ubmoe_st")]
sys.modules["ubmoe_st"] = package
sys.path.insert(0, str(root / "tests"))
import numpy, pyarrow, faiss
os.fsync = lambda descriptor: None  # what a killed process wrote stays with the system; only a power cut needs syncs
from helpers.encoders import HashEncoder
from ubmoe_st.index import EmbeddingIndex

def build(corpus, out, delay=0.0):
    encoder = HashEncoder(16, batch_noise=1e-3, delay=delay)
    EmbeddingIndex.build(encoder, corpus, out, window_tokens=1000, batch_tokens=200, segment_rows=60,
                         chunk_tokens=20, overlap_tokens=4, on_duplicate="upsert", on_bad_row="skip")

# One build before forking loads every module once, not in each child.
import tempfile
with tempfile.TemporaryDirectory() as folder:
    build(sys.argv[2], folder + "/i")

def attempt(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return pid

def finish(pid):
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed"
    if os.WEXITSTATUS(status):
        sys.exit("the build failed")
    return "done"
"""


def drive(body: str, *arguments: str) -> str:
    """What `DRIVER` and `body`, run in a fresh process with these arguments, print."""
    script = DRIVER + textwrap.dedent(body)
    command = [sys.executable, "-c", script, str(ROOT), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def small(tmp_path: Path, count: int = 60) -> list[dict]:
    return [{"id": f"d{number}", "text": f"some text number {number}"} for number in range(count)]
