"""A function in a process of its own: result, error, death."""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.process import in_process, peak_of, status_bytes


def test_the_result_comes_from_another_process():
    assert in_process(os.getpid) != os.getpid()
    assert np.array_equal(in_process(np.arange, 2, 6, dtype=np.float32), np.arange(2, 6, dtype=np.float32))


def test_an_error_is_named():
    with pytest.raises(RuntimeError, match=r"listdir failed: FileNotFoundError: .*no-such-folder"):
        in_process(os.listdir, "no-such-folder")


def test_a_death_is_told_and_does_not_wait_for_ever():
    with pytest.raises(RuntimeError, match="_exit died"):
        in_process(os._exit, 3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_peak_counts_what_was_let_go_again():
    before = status_bytes("RssAnon")
    with peak_of("RssAnon", every_s=0.001) as peak:
        for _ in range(20):
            np.ones(8 << 20).sum()
    assert peak[0] - before > 48 << 20
    assert status_bytes("RssAnon") - before < 48 << 20
