"""Plain Ray tasks, watched: results as they come, and an end when nothing comes any more."""

from collections.abc import Iterable, Iterator
from typing import Any

import ray

from qbatch.errors import StalledError


def results_as_completed(refs: Iterable[Any], *, stall_timeout_s: float) -> Iterator[Any]:
    """Yield the results of Ray tasks in the order in which they finish.

    Raises:
        StalledError: None finished for ``stall_timeout_s``.
    """
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=stall_timeout_s)
        if not done:
            raise StalledError(
                f"none of {len(pending)} running tasks finished for {stall_timeout_s:g} s "
                "(--stall-timeout-s). Finished work is kept; run the job again to go on"
            )
        yield ray.get(done[0])
