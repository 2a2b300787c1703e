"""Freed memory is used again, without asking the kernel for it page by page."""

import os
import resource
import subprocess
import sys

import pytest

from qbatch.pipelines.cluster import KEEP_FREED_MEMORY
from tests.processes import ROOT

MIB = 2**20
STEPS, SETTLING = 20, 40
PROGRAM = f"""
import resource, threading
import torch
def step():
    a = torch.ones(40 * {MIB} // 4)
    return torch.cat([a, a])
def work():
    for _ in range({SETTLING}):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({STEPS}):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def page_faults(variables: dict[str, str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the variables are glibc's")
def test_a_pass_in_any_thread_gets_the_memory_of_those_before():
    """Not at once: an aligned piece does not fit where one of its size lay, until two join."""
    pages = STEPS * 120 * MIB // resource.getpagesize()
    assert page_faults(KEEP_FREED_MEMORY["env_vars"]) < pages / 10 < page_faults({})
