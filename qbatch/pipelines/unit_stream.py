"""A row is a unit: three stages that read, compute on a pool of actors, and write."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext

from qbatch.pipelines.cluster import KEEP_FREED_MEMORY, PoolPlan, cluster_resources
from qbatch.pipelines.compute_thread import ComputeThread
from qbatch.pipelines.deaths import Guard, start_record
from qbatch.pipelines.embed_resume import Plan
from qbatch.pipelines.trial import CarefulActor, Trial

log = logging.getLogger(__name__)

_BLOCKS_PER_CPU = 8
"""Fewer would leave processors idle at the end, when the last blocks run alone."""

_SILENT_SHARE = 8
"""A forward pass may take this fraction of the stall limit: a row that hangs is found before it."""


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
    read_carefully: Callable[[pa.Table, Trial], pa.Table] | None = None
    """``read``, without the parts of a unit that kill their process."""
    may_hang: bool = True
    """A careful actor that is silent for long is ended; False where it has time limits of its
    own."""


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
    """Run blocks of units through the stages; yield what the last one returned, row by row.

    Units over which a process died come at the end, each in a block of its own.
    """
    record = start_record()
    references: list[Any] = [ray.put(block) for block in blocks]
    yield from _run(references, stages, pool, record, is_last_try=False)
    put_off: list[str] = ray.get(record.all_put_off.remote())
    if put_off:
        log.warning("%d units whose process died are tried again, one by one", len(put_off))
        again = (ray.get(reference) for reference in references)
        found = pa.concat_tables(
            block.filter(pc.is_in(block["unit_key"], pa.array(put_off))) for block in again
        )
        alone: list[Any] = [ray.put(found.slice(i, 1)) for i in range(len(found))]
        yield from _run(alone, stages, pool, record, is_last_try=True)


def _run(
    references: list[Any],
    stages: Stages,
    pool: PoolPlan,
    record: ActorHandle[Any],
    *,
    is_last_try: bool,
) -> Iterator[Mapping[str, Any]]:
    # Ray tries for ever what died; the guards count, and end it.
    unit_at_a_time: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    as_task: dict[str, Any] = {"num_cpus": pool.cpus_per_task, "max_retries": -1}
    guard = partial(Guard, record=record, is_last_try=is_last_try)
    dataset = ray.data.from_arrow_refs(references).map_batches(
        partial(
            _run_guarded,
            guard=guard(stage="reading"),
            plain=stages.read,
            careful=stages.read_carefully,
        ),
        **as_task,
        **unit_at_a_time,
    )
    if stages.actor is not None:
        dataset = dataset.map_batches(
            _guarded(stages.actor, guard(stage="computing", silence_s=_silence_s(stages))),
            fn_constructor_kwargs=dict(stages.actor_arguments),
            compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
            num_gpus=pool.gpus_per_actor,
            num_cpus=pool.cpus_per_actor,
            max_restarts=-1,
            max_task_retries=-1,
            runtime_env=KEEP_FREED_MEMORY,
            **unit_at_a_time,
        )
    dataset = dataset.map_batches(
        partial(_run_guarded, guard=guard(stage="writing"), plain=stages.write),
        **as_task,
        **unit_at_a_time,
    )
    batch: Any  # Arrow tables, as asked for
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


def _run_guarded(
    batch: pa.Table,
    *,
    guard: Guard,
    plain: Callable[[pa.Table], pa.Table],
    careful: Callable[[pa.Table, Trial], pa.Table] | None = None,
) -> pa.Table:
    return guard.run(batch, plain, careful)


def _silence_s(stages: Stages) -> float | None:
    """Return for how long an actor may be silent; only careful ones say when they move."""
    if not (stages.may_hang and stages.actor and issubclass(stages.actor, CarefulActor)):
        return None
    return DataContext.get_current().execution_no_progress_timeout_s / _SILENT_SHARE


def _guarded(actor: type, guard: Guard) -> type:
    """Return a class like ``actor``, and of its name, whose calls are guarded, in one thread."""

    class Guarded(actor):  # type: ignore[misc]  # known at run time only
        on_pack = staticmethod(guard.beat)

        def __init__(self, **arguments: Any) -> None:  # noqa: ANN401 - the actor's own
            self._thread = ComputeThread()
            self._thread.run(super().__init__, **arguments)

        def __call__(self, batch: pa.Table) -> pa.Table:
            careful = getattr(super(), "careful", None)
            return self._thread.run(guard.run, batch, super().__call__, careful)

    Guarded.__name__ = Guarded.__qualname__ = actor.__name__
    return Guarded


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
