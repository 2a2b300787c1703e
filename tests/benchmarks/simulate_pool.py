"""A pool far larger than this machine: actors that sleep instead of computing.

    python -m tests.benchmarks.simulate_pool --actors 64 --units 100000

Everything but the forward pass is the real job: units travel through Ray in blocks, guarded, to a
pool of actor processes and on to a stage that stands for writing. Utilisation is the share of the
pool's time in which actors were busy, from when all had begun until the first unit began that was
the last of its actor. What is missing to 1 is what Ray, the guards and the driver cost.
"""

import argparse
import json
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pyarrow as pa
import ray

from qbatch.pipelines.cluster import PoolPlan, ray_session
from qbatch.pipelines.trial import CarefulActor, Trial
from qbatch.pipelines.unit_stream import Stages, block_size, run_stages

_BOOKED = 0.5
"""Processors that Ray books for an actor; nothing is held to it."""

_FOR_TASKS = 4
"""Processors for the tasks that read and write."""

_MOST_UNITS = 100
"""Of a block, as in the embed job."""


class Sleeper(CarefulActor):
    """Takes as long as a forward pass, and no processor."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._name = ray.get_runtime_context().get_actor_id()

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.time()
        self.on_pack()
        time.sleep(self._seconds)
        facts = json.dumps([self._name, started, time.time()])
        return batch.append_column("facts", pa.array([facts]))

    def careful(self, batch: pa.Table, trial: Trial) -> pa.Table:
        return self(batch)


def _pass_on(batch: pa.Table) -> pa.Table:
    return batch


def blocks(num_units: int, size: int) -> Iterator[pa.Table]:
    for first in range(0, num_units, size):
        keys = [f"{i:032x}" for i in range(first, min(first + size, num_units))]
        yield pa.table({"unit_key": keys, "spans": ["{}"] * len(keys)})


def utilisation(facts: list[tuple[str, float, float]]) -> float:
    """Return the busy share of the pool while no actor lacked work.

    Args:
        facts: Actor, beginning and end of each unit.
    """
    by_actor: dict[str, list[tuple[float, float]]] = {}
    for actor, started, ended in facts:
        by_actor.setdefault(actor, []).append((started, ended))
    begin = max(min(spans)[0] for spans in by_actor.values())
    end = min(max(spans)[0] for spans in by_actor.values())
    busy = sum(
        max(0.0, min(ended, end) - max(started, begin))
        for spans in by_actor.values()
        for started, ended in spans
    )
    return busy / (len(by_actor) * (end - begin))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the simulation and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--actors", type=int, default=64)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=0.25, help="of a forward pass of a unit")
    options = parser.parse_args(arguments)
    ray.init(
        address="local",
        num_cpus=int(options.actors * _BOOKED) + _FOR_TASKS,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=2**29,
    )
    pool = PoolPlan(
        min_actors=options.actors,
        max_actors=options.actors,
        gpus_per_actor=0.0,
        cpus_per_actor=_BOOKED,
        threads_per_actor=1,
        cpus_per_task=1.0,
    )
    stages = Stages(
        read=_pass_on,
        actor=Sleeper,
        actor_arguments={"seconds": options.seconds},
        write=_pass_on,
    )
    driver = psutil.Process()
    started, driver_cpu = time.perf_counter(), sum(driver.cpu_times()[:2])
    with ray_session(stall_timeout_s=1800.0):
        size = block_size(options.units, _MOST_UNITS)
        told = run_stages(blocks(options.units, size), stages, pool)
        facts = [tuple(json.loads(row["facts"])) for row in told]
    found = {
        "actors": options.actors,
        "units": len(facts),
        "seconds_of_a_unit": options.seconds,
        "wall_s": round(time.perf_counter() - started, 1),
        "utilisation": round(utilisation(facts), 3),
        "driver_cpu_share": round(
            (sum(driver.cpu_times()[:2]) - driver_cpu) / (time.perf_counter() - started), 3
        ),
        "driver_peak_mib": round(driver.memory_info().rss / 2**20),
        "slowest_unit_s": round(float(np.max([e - b for _, b, e in facts])), 2),
    }
    print(json.dumps(found))
    ray.shutdown()
    return found


if __name__ == "__main__":
    main()
