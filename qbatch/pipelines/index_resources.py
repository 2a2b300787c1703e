"""Fitting a build into a cluster: how many tasks at once, with how many threads, and whether."""

from dataclasses import dataclass

import ray

from qbatch.errors import ConfigError
from qbatch.index.memory import MemoryPlan

_NODE_SHARE = 0.9
"""Of a node's memory that Ray lets tasks book; the rest is for the object store and the system."""

_GPU_SHARE = 0.6
"""Of a GPU's memory that a shard may fill: scratch space and slack take the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What the largest machine of the cluster has."""

    cpus: int
    gpus: int
    memory: int
    """Bytes that Ray lets tasks book."""


def largest_node() -> Node:
    """Return the resources of the node with most memory."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray's
    nodes = [node["Resources"] for node in alive]
    best = max(nodes, key=lambda resources: resources.get("memory", 0.0))
    return Node(
        cpus=max(1, int(best.get("CPU", 1))),
        gpus=int(best.get("GPU", 0)),
        memory=int(_NODE_SHARE * best.get("memory", 0.0)),
    )


def check_fits(plan: MemoryPlan, node: Node, *, budget_bytes: int, gpu_bytes: int) -> None:
    """Refuse an index that no machine of the cluster can build or that breaks the budget.

    Raises:
        ConfigError: With what is needed, what there is, and what to change.
    """
    gib = 2**30
    if plan.index > budget_bytes:
        raise ConfigError(
            f"the index needs {plan.index / gib:.2f} GiB, --memory-budget-gib allows "
            f"{budget_bytes / gib:.2f}. Allow more, choose a factory with fewer bytes a vector "
            "(SQ8, SQ4, PQ64), or let --factory=auto choose"
        )
    for what, needed, remedy in (
        ("training", plan.training, "fewer lists in --factory"),
        ("the largest shard", plan.shard, "more --num-shards"),
    ):
        if needed > node.memory:
            raise ConfigError(
                f"{what} needs {needed / gib:.2f} GiB in one process, the largest node offers "
                f"{node.memory / gib:.2f}. Use {remedy}, or larger nodes"
            )
    if node.gpus and plan.largest_shard > _GPU_SHARE * gpu_bytes:
        raise ConfigError(
            f"the largest shard needs {plan.largest_shard / gib:.2f} GiB on a GPU, "
            f"{_GPU_SHARE:.0%} of --gpu-memory-gib={gpu_bytes / gib:g} may be filled. Use more "
            "--num-shards"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Booking:
    """What Ray reserves for a task."""

    num_cpus: int
    """Also its threads."""
    num_gpus: int
    memory: int
    """Bytes."""


def book_shard_task(plan: MemoryPlan, node: Node, num_tasks: int) -> Booking:
    """Return what each of some shard tasks books, so that a node is full and never overfull."""
    at_once = max(1, min(num_tasks, node.cpus, node.memory // plan.shard))
    if node.gpus:
        at_once = min(at_once, node.gpus)
    return Booking(
        num_cpus=max(1, node.cpus // at_once), num_gpus=min(1, node.gpus), memory=plan.shard
    )


_SHARD_BYTES = 4 * 2**30
"""A shard of this size is read, built and lost in minutes, not hours."""

_LEAST_SHARD_ROWS = 50_000
"""Smaller shards cost more to open than to search."""


def default_num_shards(plan_one: MemoryPlan, ntotal: int, node: Node) -> int:
    """Return a number of shards that fit, and that keep all processors busy if there is enough.

    Args:
        plan_one: Of the index as a single shard.
        ntotal: Vectors in all.
        node: The largest of the cluster.
    """
    limit = min(_SHARD_BYTES, max(node.memory // 2, 1))
    for_memory = -(-plan_one.shard // limit)
    for_processors = min(node.cpus, ntotal // _LEAST_SHARD_ROWS)
    return int(max(1, for_memory, for_processors))
