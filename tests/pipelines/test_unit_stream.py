"""The three stages on a real Ray: what is computed is written soon."""

import numpy as np
import pyarrow as pa
import pytest

from qbatch.pipelines.cluster import KEEP_FREED_MEMORY, plan_pool, ray_session
from qbatch.pipelines.unit_stream import Stages, run_stages
from tests.timed_stages import Passing, read, write

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def told(ray_cluster) -> list[dict]:
    """What the stages tell of sixty units on two processors, the tightest case."""
    plan = pa.table({"unit_key": [f"unit-{i}" for i in range(60)]})
    stages = Stages(read=read, actor=Passing, actor_arguments={}, write=write)
    with ray_session(stall_timeout_s=60):
        pool = plan_pool(None, None, None)
        return list(run_stages([plan.slice(i, 1) for i in range(60)], stages, pool))


def test_units_are_written_while_others_are_read(told):
    """Whatever is not written is lost with a killed job."""
    assert sorted(row["unit_key"] for row in told) == sorted(f"unit-{i}" for i in range(60))
    read_at = np.sort([row["read_at"] for row in told])
    written_at = np.sort([row["written_at"] for row in told])
    assert written_at[10] < read_at[50]


def test_an_actor_computes_in_the_thread_that_made_it(told):
    """Each thread that computes has a team of OpenMP, and teams together are slow."""
    assert all(row["same_thread"] for row in told)


def test_an_actor_keeps_the_memory_that_it_frees(told):
    assert {row["mmap_max"] for row in told} == {KEEP_FREED_MEMORY["env_vars"]["MALLOC_MMAP_MAX_"]}
