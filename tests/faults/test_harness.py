"""The fault harness finds nothing in our protocol, and finds what is wrong with a broken one."""

import re
import subprocess
import sys

import pytest

from tests.processes import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def run_harness(*flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.faults.harness", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.returncode, done.stdout


def test_every_kind_of_fault_loses_and_doubles_nothing():
    code, table = run_harness("--cases", "11", "--jobs", "embed", "--seed", "1")
    assert "0 rows lost, 0 rows doubled" in table
    assert code == 0, table


def test_a_broken_protocol_is_caught():
    code, table = run_harness("--cases", "5", "--jobs", "embed", "--broken")
    assert code == 1
    assert int(re.search(r"(\d+) rows doubled", table)[1]) > 0


def test_a_few_damaged_inputs_of_every_reader():
    command = [sys.executable, "-m", "tests.faults.fuzz", "--inputs", "200", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
