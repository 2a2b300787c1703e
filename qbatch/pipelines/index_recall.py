"""From what each shard found for the probes to the recall of the whole index."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.index.neighbours import Neighbours, merge_neighbours
from qbatch.index.probes import EXACT_DEPTH, ProbeResults
from qbatch.index.recall import (
    TUNED_DEPTH,
    CurvePoint,
    Recall,
    check_recall,
    choose_effort,
    measured_recall,
    recall_of_probes,
)
from qbatch.manifest import read_verified
from qbatch.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The effort that reaches the target, and the recall it was seen to have."""

    effort: int
    recall: dict[int, Recall]
    """By depth, over the probes that did not choose the effort."""
    by_shard: list[float]
    """Recall@10 of each shard against its own neighbours."""
    curve: list[dict[str, float]]
    """``effort``, ``recall``, ``seconds`` of each point tried."""

    def check(self, target_recall: float) -> None:
        """Raise QualityGateError when recall@10 is below the target."""
        check_recall(self.recall[TUNED_DEPTH], target_recall, "the index")

    def as_details(self) -> dict[str, Any]:
        """Return what a manifest keeps."""
        return {
            "recall": {str(depth): found.as_dict() for depth, found in self.recall.items()},
            "recall_by_shard": self.by_shard,
            "curve": self.curve,
        }


def measure(
    storage: Storage,
    records: Sequence[Mapping[str, Any]],
    target_recall: float,
    dead: Sequence[Sequence[int]],
) -> Measured:
    """Choose an effort and measure recall from the stored results of all shards.

    Args:
        storage: The index.
        records: Completion records of the shards, in row order.
        target_recall: Of recall@10.
        dead: Of each shard, the rows that are no longer found.
    """
    results = [_read_results(storage, record) for record in records]
    results = [r.without(rows) if len(rows) else r for r, rows in zip(results, dead, strict=True)]
    bases = row_bases(records)
    exact = _merged((r.exact for r in results), bases)
    efforts = sorted({effort for result in results for effort in result.found})
    # Every shard stops by itself; where one stopped, more effort brings it nothing.
    curve = [
        CurvePoint(
            effort=effort,
            found=_merged((r.at(effort) for r in results), bases),
            seconds=sum(r.seconds[max(e for e in r.seconds if e <= effort)] for r in results),
        )
        for effort in efforts
    ]
    point, confirming = choose_effort(curve, exact, target_recall)
    return Measured(
        effort=point.effort,
        recall=measured_recall(point.found, exact, confirming),
        by_shard=[
            round(float(recall_of_probes(r.at(point.effort), r.exact, TUNED_DEPTH).mean()), 4)
            for r in results
        ],
        curve=[
            {
                "effort": p.effort,
                "recall": round(float(recall_of_probes(p.found, exact, TUNED_DEPTH).mean()), 4),
                "seconds": round(p.seconds, 4),
            }
            for p in curve
        ],
    )


def row_bases(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the first row of each shard, counted over all shards."""
    rows = [record["index"]["rows"] for record in records]
    bases: list[int] = np.cumsum([0, *rows])[:-1].tolist()
    return bases


def _read_results(storage: Storage, record: Mapping[str, Any]) -> ProbeResults:
    data = read_verified(storage, record["probes"])
    return ProbeResults.from_table(pq.read_table(pa.BufferReader(data)))


def _merged(lists: Iterator[Neighbours], bases: Sequence[int]) -> Neighbours:
    shifted = [found.shifted(base) for found, base in zip(lists, bases, strict=True)]
    return merge_neighbours(shifted, EXACT_DEPTH)
