"""A few reranked queries with their texts, for the report."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qbatch.pipelines.embed_task import unit_table
from qbatch.pipelines.rerank_join import RerankUnit
from qbatch.pipelines.segment_files import read_segment, table_of
from qbatch.report.ranking import NUM_SAMPLES, side_by_side
from qbatch.tables import PublishedTable


def sample_queries(
    table: PublishedTable, units: Sequence[RerankUnit], keys: pa.ChunkedArray, outputs: pa.Table
) -> list[dict[str, Any]]:
    """Return ten queries of the first units, as ``side_by_side`` does.

    Args:
        table: The reranked run.
        units: Of the join.
        keys: Of their outputs, in the same order.
        outputs: OUTPUTS of all units.
    """
    samples: list[dict[str, Any]] = []
    for unit, key in zip(units[:NUM_SAMPLES], keys[:NUM_SAMPLES].to_pylist(), strict=True):
        row = table_of(read_segment(table.storage, unit.segment))
        place = pc.index(outputs["unit_key"], key).as_py()
        ranked = table.read_file(outputs.slice(place, 1).to_pylist()[0])
        samples += side_by_side(ranked, unit_table(row, "pairs"))
        if len({sample["query"] for sample in samples}) >= NUM_SAMPLES:
            break
    return samples
