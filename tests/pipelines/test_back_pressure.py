"""A small object store, mostly full of what others hold: readers wait, and little is spilled."""

import json
import os
import subprocess
import sys

import pytest

from tests.processes import ROOT

UNITS, STORE_MIB, HELD_MIB = 60, 128, 64

SCRIPT = f"""
import json, sys, threading
from pathlib import Path
import numpy as np, pyarrow as pa, ray
from qbatch.pipelines.cluster import plan_pool, ray_session
from qbatch.pipelines.unit_stream import Stages, run_stages
from tests import large_stages

spilled = Path(sys.argv[1])
ray.init(
    address="local", num_cpus=2, num_gpus=0, include_dashboard=False,
    object_store_memory={STORE_MIB} * 2**20, object_spilling_directory=str(spilled),
)
held = ray.put(np.ones({HELD_MIB} * 2**20, np.uint8))
most, done = [0], threading.Event()
def watch():
    while not done.wait(0.02):
        sizes = []
        for file in spilled.rglob("*"):
            try:
                sizes.append(file.stat().st_size)
            except FileNotFoundError:
                pass
        most.append(sum(sizes))
watcher = threading.Thread(target=watch)
watcher.start()
plan = pa.table({{"unit_key": [f"unit-{{i}}" for i in range({UNITS})]}})
stages = Stages(
    read=getattr(large_stages, sys.argv[2]),
    actor=large_stages.Passing,
    actor_arguments={{}},
    write=getattr(large_stages, sys.argv[3]),
)
with ray_session(stall_timeout_s=120):
    blocks = [plan.slice(i, 1) for i in range({UNITS})]
    told = list(run_stages(blocks, stages, plan_pool(None, None, None)))
whole, most_spilled = len(ray.get(held)), max(most)
more = [ray.put(np.ones({HELD_MIB} * 2**20, np.uint8)) for _ in range(3)]  # does the watcher see?
done.wait(1); done.set(); watcher.join()
print(json.dumps({{
    "units": sorted(row["unit_key"] for row in told), "whole": whole,
    "most_spilled": most_spilled, "spilled_on_purpose": max(most),
    "read": sum(row["num_bytes"] for row in told),
}}))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("source", "sink"), [("read", "write_slowly"), ("read_slowly", "write"), ("read", "write")]
)
def test_a_nearly_full_store_slows_a_job_down_and_spills_little(tmp_path, source, sink):
    """Eight times what is free is read; only what is on its way may lie on disk."""
    (tmp_path / "spilled").mkdir()
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "spilled"), source, sink],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["units"] == sorted(f"unit-{i}" for i in range(UNITS))
    assert found["whole"] == HELD_MIB * 2**20
    free = (STORE_MIB - HELD_MIB) * 2**20
    assert found["read"] > 7 * free
    assert found["most_spilled"] < free < found["spilled_on_purpose"]
