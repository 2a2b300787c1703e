"""One shard: vectors stream through, and an index, its ids and the truth about probes come out."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.index.columns import VectorColumn
from qbatch.index.device import to_cpu, to_gpu
from qbatch.index.factory import effort_of, inner_index
from qbatch.index.neighbours import ExactNeighbours, Neighbours
from qbatch.index.probes import EXACT_DEPTH, ProbeResults, Probes, mark_own_rows
from qbatch.index.recall import TUNED_DEPTH, recall_of_probes
from qbatch.index.sweep import RisingSearch
from qbatch.index.training import Template

_ADD_ROWS = 16_384
"""Vectors are added in batches: one by one, a GPU's lists would be moved again and again.

Larger files are added as they come: joining them took 0.2 of 7 s of 125,000 vectors of 256.
"""

_ENOUGH = 0.25
"""Of what a target recall allows to be lost: a shard that loses less searches no harder."""

_PLATEAU = 5e-4
"""More effort that brings less recall than this, twice, will not bring more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltShard:
    """A shard before it is stored."""

    index: faiss.Index
    ids: pa.Table
    """``doc_id``, ``passage_id`` and the kept columns; row i belongs to vector i."""
    probes: ProbeResults
    facts: dict[str, Any]
    """Rows, documents, list sizes, seconds by stage."""


class ShardBuilder:
    """Takes the tables of a shard one after the other."""

    def __init__(
        self,
        template: Template,
        column: VectorColumn,
        probes: Probes,
        *,
        num_rows: int,
        target_recall: float,
    ) -> None:
        """Copy the template, onto a GPU where there is one.

        Args:
            template: Of the whole index.
            column: Which vectors to add.
            probes: To measure with.
            num_rows: Vectors that will come.
            target_recall: Decides how hard the probes are searched for.
        """
        self._column = column
        self._probes = probes
        self._target_recall = target_recall
        self._index = to_gpu(template.copy(), rows=num_rows)
        self._exact = ExactNeighbours(probes.vectors, EXACT_DEPTH, column.metric)
        self._waiting: list[np.ndarray] = []
        self._ids: list[pa.Table] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, table: pa.Table) -> None:
        """Take in the rows of one vectors file."""
        with self._timed("read"):
            vectors = self._column.matrix(table)
            self._ids.append(table.drop_columns([self._column.name]))
        self._waiting.append(vectors)
        if sum(map(len, self._waiting)) >= _ADD_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        vectors = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting.clear()
        with self._timed("add"):
            self._index.add(vectors)
        with self._timed("exact"):
            self._exact.add(vectors)

    def finish(self) -> BuiltShard:
        """Return the shard; nothing can be added after."""
        self._flush()
        ids = pa.concat_tables(self._ids, promote_options="permissive").combine_chunks()
        with self._timed("sweep"):
            probes = self._measure(self._own_rows(ids["doc_id"]))
        index = to_cpu(self._index)
        facts = {
            "rows": int(index.ntotal),
            "documents": pc.count_distinct(ids["doc_id"]).as_py(),
            "lists": list_facts(index),
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
        }
        return BuiltShard(index=index, ids=ids, probes=probes, facts=facts)

    def _own_rows(self, doc_ids: pa.ChunkedArray) -> np.ndarray:
        """Return (probe, row) for every row of a probe's own document: int64, (pairs, 2)."""
        probes = self._probes.doc_ids
        rows = pa.table({"doc_id": doc_ids, "row": np.arange(len(doc_ids))})
        rows = rows.filter(pc.is_in(doc_ids, probes.drop_null()))
        numbered = pa.table({"doc_id": probes, "probe": np.arange(len(probes))})
        pairs = rows.join(numbered, "doc_id", join_type="inner")
        return np.stack([pairs["probe"].to_numpy(), pairs["row"].to_numpy()], axis=1)

    def _measure(self, own: np.ndarray) -> ProbeResults:
        """Search the probes with more and more effort, until more brings nothing."""
        exact = self._forget_own(self._exact.found, own)
        results = ProbeResults(exact=exact, found={}, seconds={})
        reached = [0.0]
        enough = 1 - _ENOUGH * (1 - self._target_recall)
        rising = RisingSearch(
            self._index, self._probes.vectors, EXACT_DEPTH, metric=self._column.metric
        )
        for effort in effort_of(self._index).steps():
            results.found[effort] = self._forget_own(rising.search(effort), own)
            results.seconds[effort] = rising.seconds
            reached.append(recall_of_probes(results.found[effort], exact, TUNED_DEPTH).mean())
            if reached[-1] >= enough or _is_flat(reached):
                break
        return results

    def _forget_own(self, found: Neighbours, own: np.ndarray) -> Neighbours:
        return found.without(mark_own_rows(found, own))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - started


def _is_flat(reached: list[float]) -> bool:
    return len(reached) > 3 and reached[-1] - reached[-3] < _PLATEAU


def list_facts(index: faiss.Index) -> dict[str, float]:
    """Return how evenly vectors fall into inverted lists; {} without any.

    ``imbalance`` is FAISS's factor: 1 for equal lists; a search costs that much more.
    """
    inner = inner_index(index)
    lists = inner.invlists if isinstance(inner, faiss.IndexIVF) else None
    if lists is None:
        return {}
    sizes = np.array([lists.list_size(i) for i in range(lists.nlist)])
    return {
        "imbalance": round(float(lists.imbalance_factor()), 3),
        "largest": int(sizes.max()),
        "median": float(np.median(sizes)),
    }
