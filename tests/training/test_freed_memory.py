"""Freed memory is used again, without asking the kernel for it page by page."""

import resource
import subprocess
import sys

import pytest

from tests.processes import ROOT

MIB = 2**20
STEPS = 20
PROGRAM = f"""
import resource, sys
import torch
from qbatch.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    a = torch.ones(40 * {MIB} // 4)
    return torch.cat([a, a])
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_step_gets_the_memory_of_the_one_before():
    pages = STEPS * 120 * MIB // resource.getpagesize()
    assert page_faults("keep") < pages / 10 < page_faults("as it is")
