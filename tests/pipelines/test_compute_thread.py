"""Whoever calls, one thread computes; what goes wrong there is raised here."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from qbatch.errors import ConfigError
from qbatch.pipelines.compute_thread import ComputeThread


def test_callers_of_many_threads_share_one():
    thread, barrier = ComputeThread(), threading.Barrier(4)

    def call(number: int) -> tuple[int, int]:
        barrier.wait(10)
        return thread.run(lambda n: (n, threading.get_ident()), number)

    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(call, range(4)))
    assert [number for number, _ in found] == [0, 1, 2, 3]
    assert len({ident for _, ident in found}) == 1
    assert threading.get_ident() not in {ident for _, ident in found}


def test_an_error_comes_out_and_the_next_call_works():
    def fail() -> None:
        raise ConfigError("no such thing")

    thread = ComputeThread()
    with pytest.raises(ConfigError, match="no such thing"):
        thread.run(fail)
    assert thread.run(sum, [1, 2]) == 3
