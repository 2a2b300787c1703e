"""Stages of units that run in the driver's process, one unit after the other."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyarrow as pa

from qbatch.pipelines import unit_stream
from qbatch.pipelines.cluster import PoolPlan
from qbatch.pipelines.unit_stream import Stages


@contextmanager
def stages_in_this_process() -> Iterator[None]:
    with mock.patch.object(unit_stream, "run_stages", _run_stages):
        yield


def _run_stages(
    blocks: Iterable[pa.Table], stages: Stages, pool: PoolPlan
) -> Iterator[Mapping[str, Any]]:
    actor = stages.actor(**stages.actor_arguments) if stages.actor else lambda batch: batch
    for block in blocks:
        for i in range(len(block)):
            told = stages.write(actor(stages.read(block.slice(i, 1))))
            yield from told.to_pylist()
