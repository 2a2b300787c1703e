"""The Ray cluster a job runs on: joining or starting it, and sizing the actor pool to it."""

import gc
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.data import DataContext
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import ActorDiedError, RayError, RayTaskError, WorkerCrashedError
from ray.util.annotations import RayDeprecationWarning

from qbatch import errors
from qbatch.errors import ConfigError, QbatchError, StalledError

log = logging.getLogger(__name__)

_CPUS_PER_CPU_ACTOR = 8
"""Without GPUs: beyond this many threads a forward pass of short texts gains little."""

MAX_RETRIES = 5
"""How often work is tried again whose process died; without a bound Ray retries for ever."""

KEEP_FREED_MEMORY = {
    "env_vars": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**62),
    }
}
"""Ray's ``runtime_env`` of processes that compute: glibc keeps what they free for the next pass.

A pass on a CPU allocates its activations and frees them. By default glibc gives large ones back to
the kernel, which hands them out again page by page, full of zeros: a tenth of the time in the 0.6B
shape, four tenths of a small model's training step. The process then stays as large as its largest
pass. Variables, since mallopt does not reach the arena of a thread that computes.
"""

_RAISED = re.compile(r"^qbatch\.errors\.(\w+): (.+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolPlan:
    """How many actors a stage may have and what each of them holds."""

    min_actors: int
    max_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    """What Ray books: together at most half of all, so that reading and writing never starve."""
    threads_per_actor: int
    cpus_per_task: float
    """What Ray books for a task that reads or writes: one of each fits beside all actors, else Ray
    writes nothing before all is read, and a killed job has lost it all."""


@contextmanager
def ray_session(*, stall_timeout_s: float, with_dashboard: bool = False) -> Iterator[None]:
    """Join the cluster named by RAY_ADDRESS or already joined, or run a local one for this job.

    Errors that a stage raised on purpose come out as themselves, whichever process raised them.

    Args:
        stall_timeout_s: Seconds without progress after which the job ends.
        with_dashboard: Of a local cluster: it takes seconds to start and ends with the job, but
            Ray Train asks its state API every second, and complains where there is none.

    Raises:
        StalledError: Nothing moved for ``stall_timeout_s``.
    """
    owned = not ray.is_initialized()
    if owned:
        ray.init(logging_level=logging.WARNING, include_dashboard=with_dashboard)
    # Ray means to drop free-form remote arguments in 2.64; pyproject.toml stays below that.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False  # jobs report units and tokens, which Ray cannot know
    context.execution_no_progress_timeout_s = stall_timeout_s
    try:
        yield
    except (RayError, ExecutionTimeoutError) as error:
        own = _own_error(error, stall_timeout_s)
        _let_go(error)
        if own is None:
            raise
        raise own from error
    finally:
        if owned:
            ray.shutdown()


def _let_go(error: BaseException) -> None:
    """Free what the frames of a failed execution hold.

    Whoever keeps the error would keep its actors alive, and with them the processors that the next
    job of this process waits for.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        chained = waiting.pop()
        if chained is not None and id(chained) not in seen:
            seen.add(id(chained))
            traceback.clear_frames(chained.__traceback__)
            waiting += [chained.__cause__, chained.__context__]
    gc.collect()


def _own_error(error: BaseException, stall_timeout_s: float) -> QbatchError | None:
    """Find the error of ours, or the one a user understands, behind Ray's wrapping."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, QbatchError):
        return error.cause
    if isinstance(error, ExecutionTimeoutError):
        return StalledError(
            f"no unit moved for {stall_timeout_s:g} s (--stall-timeout-s): {error}. Finished units "
            "are kept; run the job again to go on"
        )
    if isinstance(error, ActorDiedError | WorkerCrashedError):
        return QbatchError(
            f"a process died {MAX_RETRIES + 1} times over the same work, out of memory or over a "
            f"poisonous row: {error}. Finished units are kept; give actors more memory or a "
            "smaller --token-budget, then run the job again to go on"
        )
    # Ray keeps the error of a stage as text only.
    found = _RAISED.findall(str(error))
    if not found:
        return None
    name, message = found[-1]
    own: QbatchError = getattr(errors, name)(message)
    return own


def cluster_resources() -> dict[str, float]:
    """Return what the joined cluster has in all: CPU, GPU, memory ..."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's
    return resources


def most_node_cpus() -> int:
    """Return the processors of the node that has most: an actor lies on one node."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray's
    return max(int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"])


def plan_pool(
    min_actors: int | None, max_actors: int | None, gpus_per_actor: float | None
) -> PoolPlan:
    """Size the actor pool: what the operator asked for, else all GPUs, else all CPUs.

    Raises:
        ConfigError: The cluster has fewer GPUs than the smallest pool needs.
    """
    resources = cluster_resources()
    num_gpus, num_cpus = resources.get("GPU", 0.0), int(resources.get("CPU", 1))
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if num_gpus else 0.0
    room = num_gpus / gpus_per_actor if gpus_per_actor else num_cpus / _CPUS_PER_CPU_ACTOR
    most = max_actors or max(min_actors or 1, int(room))
    fewest = min_actors or 1
    if fewest * gpus_per_actor > num_gpus:
        raise ConfigError(
            f"{fewest} actors of {gpus_per_actor:g} GPUs need more than the {num_gpus:g} GPUs of "
            "this cluster; lower --min-actors or --gpus-per-actor, or add nodes"
        )
    node_cpus = max(1, most_node_cpus())
    booked = _booked_cpus(num_cpus, most, has_gpus=gpus_per_actor > 0)
    cpus_per_actor = min(booked, node_cpus)
    return PoolPlan(
        min_actors=min(fewest, most),
        max_actors=most,
        gpus_per_actor=gpus_per_actor,
        cpus_per_actor=cpus_per_actor,
        threads_per_actor=max(1, min(num_cpus // most, node_cpus)),
        # Half of a node's is free on at least one node, since half of all is.
        cpus_per_task=min(1.0, node_cpus / 2, (num_cpus - most * cpus_per_actor) / 2),
    )


def _booked_cpus(num_cpus: int, num_actors: int, *, has_gpus: bool) -> float:
    """Return what Ray books for an actor: half of all together, and never the last whole one.

    Tasks that read and write book processors too; with none left they would wait for ever.
    """
    share = min(num_cpus / 2, num_cpus - 1) / num_actors
    return min(1.0, share) if has_gpus else share
