"""A forked child encodes, generates and searches whatever the threads of its parent were doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ubmoe_st import transformer
from ubmoe_st.forking import ForkSafeLock, held_over_fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
PATIENCE_S = 30


def child_ends(work) -> bool:
    """Whether a forked child gets through `work`; one that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def forked_while_held(lock) -> bool:
    """Whether a child can take a lock that a thread of its parent holds at the time of the fork."""
    held = threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def take() -> None:
        signal.alarm(5)
        with lock:
            pass

    ended = child_ends(take)
    thread.join()
    return ended


@pytest.mark.parametrize("lock", ["_BUILD_LOCK", "_TOKENIZER_LOCK"])
def test_locks_of_the_module_are_free_in_a_child(lock):
    assert forked_while_held(getattr(transformer, lock))


def test_each_kind_of_lock_is_free_in_a_child_and_a_plain_one_is_not():
    assert forked_while_held(ForkSafeLock())
    assert forked_while_held(held_over_fork(threading.RLock()))
    assert not forked_while_held(threading.Lock())


SEARCH = """
import os, sys
import numpy as np, torch, faiss
import ubmoe_st.index
faiss.omp_set_num_threads(2), torch.set_num_threads(2)
index = faiss.IndexFlatIP(64)
index.add(np.random.default_rng(0).random((20_000, 64), np.float32))
rows = index.reconstruct_n(0, 500)
linear = torch.nn.Linear(512, 512)
def work():
    index.search(rows, 5)
    with torch.inference_mode():
        linear(torch.ones(4096, 512)).exp().sum()
work()
if os.fork() == 0:
    import signal
    signal.alarm(15)
    work()
    os._exit(0)
sys.exit(os.wait()[1])
"""


def test_faiss_and_torch_compute_in_a_child():
    pytest.importorskip("faiss")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", SEARCH], env=environment, timeout=120, check=False)
    assert ended.returncode == 0
