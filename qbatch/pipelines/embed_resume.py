"""The plan of an embed or rerank job: its units, which are pending, and the record of all."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.errors import IntegrityError
from qbatch.manifest import Generation
from qbatch.pipelines.unit_files import listed_files, listed_rejects, store_plan
from qbatch.schema import UNITS
from qbatch.storage import Storage

T = TypeVar("T")

_PLAN = pa.schema([UNITS.field("unit_key"), UNITS.field("spans")])
_BATCH_UNITS = 1000


class PlannedUnit(Protocol):
    """What a plan needs of a unit of work."""

    def key(self, fingerprint: str) -> str:
        """Return the name of its output under a fingerprint: 32 hex digits."""

    def to_json(self) -> str:
        """Return what a stage needs to find its input."""


class Plan:
    """The units of a job in a local temporary file; memory holds their keys only."""

    def __init__(self, units: Iterable[PlannedUnit], fingerprint: str) -> None:
        """Consume a stream of units.

        Args:
            units: Each covers other rows than the rest.
            fingerprint: Id of everything besides the unit that changes its output.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="qbatch-plan-")  # lives as we do
        self._path = f"{self._directory.name}/plan.parquet"
        keys = [pa.array([], pa.string())]
        with pq.ParquetWriter(self._path, _PLAN, compression="zstd") as writer:
            for batch in _batched(units, _BATCH_UNITS):
                keys.append(pa.array([unit.key(fingerprint) for unit in batch], pa.string()))
                spans = pa.array([unit.to_json() for unit in batch], pa.large_string())
                writer.write_table(pa.table([keys[-1], spans], schema=_PLAN))
        self.keys = pa.chunked_array(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def iter_tables(self) -> Iterator[pa.Table]:
        """Yield ``unit_key`` and ``spans`` in plan order."""
        for batch in pq.ParquetFile(self._path).iter_batches(_BATCH_UNITS):
            yield pa.Table.from_batches([batch])

    def iter_pending(self, finished: pa.Table, block_units: int) -> Iterator[pa.Table]:
        """Yield the units that are not in ``finished``, ``block_units`` at a time."""
        pending = pc.invert(pc.is_in(self.keys, finished["unit_key"].combine_chunks()))
        waiting, first = _PLAN.empty_table(), 0
        for table in self.iter_tables():
            mask = pending.slice(first, len(table))
            waiting = pa.concat_tables([waiting, table.filter(mask)])
            first += len(table)
            while len(waiting) >= block_units:
                yield waiting.slice(0, block_units)
                waiting = waiting.slice(block_units)
        if len(waiting):
            yield waiting


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def draft_of_units(
    storage: Storage,
    plan: Plan,
    outputs: pa.Table,
    *,
    kind: str,
    fingerprint: Mapping[str, Any],
    config: Mapping[str, Any],
    counts: Mapping[str, Any],
) -> Generation:
    """Write which units made which files; return the generation to publish.

    Args:
        storage: The table.
        plan: Of all units.
        outputs: OUTPUTS of all of them.
        kind: See ``Generation``.
        fingerprint: See ``Generation``.
        config: See ``Generation``.
        counts: See ``Generation``.

    Raises:
        IntegrityError: A planned unit has no output.
    """
    return Generation(
        kind=kind,
        fingerprint=fingerprint,
        config=config,
        counts=counts,
        files=listed_files(outputs),
        rejects=listed_rejects(outputs),
        plan=_write_units(storage, plan, outputs),
    )


def _write_units(storage: Storage, plan: Plan, outputs: pa.Table) -> dict[str, Any]:
    """Write the schema.UNITS table of a generation; return its schema.FILES entry.

    Raises:
        IntegrityError: A planned unit has no output.
    """
    index = pc.index_in(plan.keys, outputs["unit_key"].combine_chunks())
    if index.null_count:
        missing = plan.keys.filter(pc.is_null(index))
        raise IntegrityError(
            f"{len(missing)} of {len(plan)} planned units have no output, the first {missing[0]}; "
            "nothing was published. This is a bug: report it with the log"
        )
    ordered, sink, first = outputs.take(index), pa.BufferOutputStream(), 0
    with pq.ParquetWriter(sink, UNITS, compression="zstd") as writer:
        for table in plan.iter_tables():
            rest = ordered.slice(first, len(table)).drop_columns(["unit_key"])
            writer.write_table(pa.table([*table.columns, *rest.columns], schema=UNITS))
            first += len(table)
    return store_plan(storage, memoryview(sink.getvalue()), len(plan))
