"""A few reranked queries with their texts, for the report."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.pipelines.embed_task import unit_table
from qbatch.pipelines.rerank_join import RerankUnit
from qbatch.pipelines.segment_files import read_segment, table_of
from qbatch.report.ranking import NUM_SAMPLES, side_by_side
from qbatch.storage import Storage


def sample_queries(
    storage: Storage, units: Sequence[RerankUnit], keys: pa.ChunkedArray, outputs: pa.Table
) -> list[dict[str, Any]]:
    """Return ten queries of the first units, as ``side_by_side`` does.

    Args:
        storage: The reranked run.
        units: Of the join.
        keys: Of their outputs, in the same order.
        outputs: OUTPUTS of all units.
    """
    samples: list[dict[str, Any]] = []
    for unit, key in zip(units[:NUM_SAMPLES], keys[:NUM_SAMPLES].to_pylist(), strict=True):
        row = table_of(read_segment(storage, unit.segment))
        place = pc.index(outputs["unit_key"], key).as_py()
        data = storage.read(outputs["path"][place].as_py())
        ranked = pq.read_table(pa.BufferReader(data))
        samples += side_by_side(ranked, unit_table(row, "pairs"))
        if len({sample["query"] for sample in samples}) >= NUM_SAMPLES:
            break
    return samples
