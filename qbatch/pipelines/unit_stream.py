"""A row is a unit: three stages that read, compute on a pool of actors, and write."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from qbatch.pipelines.cluster import MAX_RETRIES, PoolPlan, cluster_resources
from qbatch.pipelines.embed_resume import Plan

_BLOCKS_PER_CPU = 8
"""Fewer would leave processors idle at the end, when the last blocks run alone."""


class Watcher(Protocol):
    """Whoever wants to know of each finished unit."""

    def add(self, stats: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Take in what the stages measured and what became of the unit's rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """What happens to a unit; each stage gets a table of one row and returns one."""

    read: Callable[[pa.Table], pa.Table]
    """From a row of the plan to what the actor takes."""
    actor: type | None
    """Class of the actors, called with that; None where nothing is to be computed."""
    actor_arguments: Mapping[str, Any]
    """Of its constructor."""
    write: Callable[[pa.Table], pa.Table]
    """From what the actor returned to what is told of the unit."""


def block_size(num_pending: int, most_units: int) -> int:
    """Return how many units a Ray block should hold.

    Args:
        num_pending: All units that are to be made.
        most_units: A block costs 45 ms however many it holds; in a block of many large ones the
            last would wait for one actor.
    """
    num_blocks = int(cluster_resources().get("CPU", 1)) * _BLOCKS_PER_CPU
    return min(max(1, num_pending // num_blocks), most_units)


def run_stages(
    blocks: Iterable[pa.Table], stages: Stages, pool: PoolPlan
) -> Iterator[Mapping[str, Any]]:
    """Run blocks of units through the stages; yield what the last one returned, row by row."""
    unit_at_a_time: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    references: list[Any] = [ray.put(block) for block in blocks]
    dataset = ray.data.from_arrow_refs(references).map_batches(
        stages.read, max_retries=MAX_RETRIES, **unit_at_a_time
    )
    if stages.actor is not None:
        dataset = dataset.map_batches(
            stages.actor,
            fn_constructor_kwargs=dict(stages.actor_arguments),
            compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
            num_gpus=pool.gpus_per_actor,
            num_cpus=pool.cpus_per_actor,
            max_restarts=-1,
            max_task_retries=MAX_RETRIES,
            **unit_at_a_time,
        )
    dataset = dataset.map_batches(stages.write, max_retries=MAX_RETRIES, **unit_at_a_time)
    batch: Any  # Arrow tables, as asked for
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


def make_units(
    plan: Plan,
    done: pa.Table,
    stages: Stages,
    pool: PoolPlan,
    *,
    most_units: int,
    watchers: Sequence[Watcher],
) -> Iterator[dict[str, Any]]:
    """Run the missing units of a plan; yield a row of OUTPUTS for each as it is finished.

    Args:
        plan: Of all units.
        done: Those finished before, OUTPUTS.
        stages: What happens to each; the last one returns ``output``, a row of OUTPUTS, and
            ``stats``, both JSON.
        pool: How many actors of what size.
        most_units: Of a Ray block, see ``block_size``.
        watchers: Are told of each unit.
    """
    num_pending = len(plan) - len(done)
    if not num_pending:
        return
    blocks = plan.iter_pending(done, block_size(num_pending, most_units))
    for told in run_stages(blocks, stages, pool):
        made: dict[str, Any] = json.loads(told["output"])
        stats, counts = json.loads(told["stats"]), json.loads(made["counts"])
        for watcher in watchers:
            watcher.add(stats, counts)
        yield made
