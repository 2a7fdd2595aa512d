"""Work in forked children that are killed at random moments."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable


def forked(work: Callable[[], object]) -> int:
    """A child that does the work, which a crash of the test does not outlive."""
    pid = os.fork()
    if pid == 0:
        try:
            # What the system holds outlives a killed process; only a power cut needs syncs, and they cost the most.
            os.fsync = lambda descriptor: None
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def ended(pid: int) -> bool:
    """Whether a child ended by itself; fails the test if its work failed."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "the work failed, see above"
    return True


def kill_often(work: Callable[[], object], check: Callable[[], object], kills: int, seed: int = 0) -> int:
    """Do the work again and again, each time killed at a random moment of the time that it takes.

    Args:
        work: In a forked child.
        check: In this process, after each.
        kills: How often the work is to be killed before its end.
        seed: Of the moments.

    Returns:
        How often the work came to its end meanwhile.
    """
    rng = random.Random(seed)
    begun = time.monotonic()
    assert ended(forked(work))
    check()
    longest, killed, whole = time.monotonic() - begun, 0, 1
    while killed < kills:
        pid = forked(work)
        moment = time.monotonic() + rng.uniform(0, longest)
        while time.monotonic() < moment and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        if ended(pid):
            whole += 1
            longest *= 0.9  # the machine was busier before
        else:
            killed += 1
            longest *= 1.02
        check()
    return whole
