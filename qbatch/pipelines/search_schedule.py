"""Which actor searches what: shards in groups that fit an actor, blocks to whoever holds the group.

Loading a group costs minutes where a block costs seconds, so an actor stays with its group while
blocks are left, then goes where most are left.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from qbatch.errors import ConfigError, StalledError
from qbatch.index.stored import StoredShard
from qbatch.pipelines.cluster import MAX_RETRIES
from qbatch.pipelines.index_resources import Node
from qbatch.pipelines.search_actor import SearchActor
from qbatch.pipelines.search_queries import QueryBlock
from qbatch.pipelines.search_task import SearchTask

_CPUS_PER_ACTOR = 8
"""FAISS gains little from more threads on a block; several actors also overlap their Python."""

_CALLS_IN_FLIGHT = 2
"""Of one actor: while FAISS searches one block, the next is read and the last is written."""

_PROCESS_BYTES = 600 * 2**20

_LOAD_FACTOR = 2.0
"""Memory of a loaded group against the bytes of its files: merged lists grow by doubling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPool:
    """How many actors of what size hold which shards."""

    groups: list[list[StoredShard]]
    num_actors: int
    num_cpus: int
    """Of one actor, also its threads."""
    num_gpus: int
    memory: int
    """Bytes that one actor books."""


def plan_search(shards: Sequence[StoredShard], node: Node, num_blocks: int) -> SearchPool:
    """Divide shards into as few groups as fit one actor each.

    Raises:
        ConfigError: A single shard does not fit the largest node.
    """
    per_node = node.gpus or max(1, node.cpus // _CPUS_PER_ACTOR)
    largest = max(needed_bytes([shard]) for shard in shards)
    per_node = max(1, min(per_node, node.memory // max(largest, 1)))
    limit = node.memory // per_node
    if largest > limit:
        raise ConfigError(
            f"the largest shard needs {largest / 2**30:.2f} GiB, a node offers "
            f"{limit / 2**30:.2f}. Build the index with more --num-shards, or use larger nodes"
        )
    groups: list[list[StoredShard]] = [[]]
    for shard in shards:
        if groups[-1] and needed_bytes([*groups[-1], shard]) > limit:
            groups.append([])
        groups[-1].append(shard)
    return SearchPool(
        groups=groups,
        num_actors=min(per_node * _num_nodes(), len(groups) * num_blocks),
        num_cpus=max(1, node.cpus // per_node),
        num_gpus=min(1, node.gpus),
        memory=max(needed_bytes(group) for group in groups),
    )


def needed_bytes(shards: Sequence[StoredShard]) -> int:
    """Return the memory of an actor that holds some shards."""
    return _PROCESS_BYTES + int(_LOAD_FACTOR * sum(shard.num_bytes for shard in shards))


def _num_nodes() -> int:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray's
    alive = [n for n in nodes if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    return max(1, len(alive))


def search_blocks(
    task: SearchTask,
    pool: SearchPool,
    work: Mapping[int, Sequence[tuple[QueryBlock, list[int]]]],
    *,
    stall_timeout_s: float,
) -> Iterator[dict[str, Any]]:
    """Search blocks in groups of shards; yield what each call of an actor returns.

    Args:
        task: What all actors share.
        pool: From ``plan_search``.
        work: For each group, the blocks and the shards in which each has to be searched.
        stall_timeout_s: Seconds without a finished call after which the job gives up.

    Raises:
        StalledError: No call finished for that long.
    """
    actor_class = ray.remote(SearchActor).options(
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        memory=pool.memory,
        max_restarts=-1,
        max_task_retries=MAX_RETRIES,
        max_concurrency=_CALLS_IN_FLIGHT,
    )
    # By value: an actor that restarts must not depend on an object that may be gone by then.
    actors = [actor_class.remote(task, pool.groups) for _ in range(pool.num_actors)]
    waiting = {group: deque(calls) for group, calls in work.items()}
    holding: dict[int, int] = {}
    running: dict[Any, int] = {}

    def start(number: int) -> None:
        group = _next_group(waiting, holding, number)
        if group is None:
            return
        holding[number] = group
        block, shards = waiting[group].popleft()
        call: Any = actors[number].search  # Ray's stubs lose methods behind options
        running[call.remote(block, group, shards)] = number

    for _ in range(_CALLS_IN_FLIGHT):
        for number in range(len(actors)):
            start(number)
    while running:
        done, _ = ray.wait(list(running), num_returns=1, timeout=stall_timeout_s)
        if not done:
            raise StalledError(
                f"none of {len(running)} searches finished for {stall_timeout_s:g} s "
                "(--stall-timeout-s). Finished blocks are kept; run the job again to go on"
            )
        start(running.pop(done[0]))
        yield ray.get(done[0])


def _next_group(
    waiting: Mapping[int, deque[Any]], holding: Mapping[int, int], actor: int
) -> int | None:
    """Return the group an actor should work on: its own, else the one with most left per actor."""
    own = holding.get(actor)
    if own is not None and waiting[own]:
        return own
    holders = list(holding.values())
    left = {g: len(calls) / (1 + holders.count(g)) for g, calls in waiting.items() if calls}
    return max(left, key=lambda group: left[group], default=None)
