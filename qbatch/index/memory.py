"""Will it fit: what an index and the tasks that build it need, known before any work.

The factors are measured, see tests/benchmarks/bench_index.py: they cover the slack of growing
lists and the copies that FAISS makes.
"""

from dataclasses import dataclass

from qbatch.index.choosing import index_bytes
from qbatch.index.columns import VectorColumn
from qbatch.index.factory import bytes_per_row, fixed_bytes, make_index, num_lists
from qbatch.index.probes import EXACT_DEPTH

_PROCESS_BYTES = 600 * 2**20
"""A Ray worker with Arrow and FAISS before it does anything."""

_LIST_SLACK = 1.6
"""Inverted lists grow by doubling: on average half of the new half is empty."""

_ID_BYTES = 160
"""Of a row's ids and kept columns in memory, an estimate."""

_PARTS_IN_MEMORY = 4
"""One read ahead, one being added, and their file bytes."""

_TRAINING_COPIES = 2
"""The sample as drawn, in the object store, and shuffled.

Measured with 525,288 rows of 256 (513 MiB): 597 MiB beside the sample as drawn.
"""

_CODEC_ROWS = 100_000
"""FAISS trains codecs on so many, which it copies twice: as drawn and as residuals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes of memory; a process that needs more than its line breaks a promise."""

    index: int
    """Of all shards together, loaded for search."""
    training: int
    """Of the one training task."""
    shard: int
    """Of one task that builds the largest shard."""
    largest_shard: int
    """Of that shard alone, which must fit a GPU where one is used."""

    @classmethod
    def of(
        cls,
        factory: str,
        column: VectorColumn,
        *,
        ntotal: int,
        shard_rows: int,
        part_rows: int,
        num_probes: int,
    ) -> "MemoryPlan":
        """Plan for a factory.

        Args:
            factory: Not ``auto``.
            column: Which vectors.
            ntotal: Of all shards.
            shard_rows: Of the largest shard.
            part_rows: Of the largest vectors file.
            num_probes: Vectors that recall is measured with.
        """
        index = make_index(factory, column.dim, column.metric)
        row_bytes = 4 * column.dim
        probes = num_probes * (row_bytes + 16 * EXACT_DEPTH * 12)
        shard = bytes_per_row(index) * shard_rows + fixed_bytes(index)
        sample = min(max(num_lists(index) * 128, 65_536) + num_probes, ntotal)
        training_rows = _TRAINING_COPIES * sample + 2 * min(sample, _CODEC_ROWS)
        return cls(
            index=index_bytes(index, ntotal) + _ID_BYTES * ntotal,
            training=_PROCESS_BYTES + training_rows * row_bytes,
            shard=_PROCESS_BYTES
            + int(_LIST_SLACK * shard)
            + _ID_BYTES * shard_rows
            + _PARTS_IN_MEMORY * max(part_rows, min(16_384, shard_rows)) * row_bytes
            + probes,
            largest_shard=int(_LIST_SLACK * shard),
        )
