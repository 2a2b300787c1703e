"""Searching the same queries with rising effort, each list visited once."""

import time

import faiss
import numpy as np

from qbatch.index.columns import Metric
from qbatch.index.device import is_on_gpu
from qbatch.index.factory import inner_index
from qbatch.index.neighbours import Neighbours, merge_neighbours, search_index, search_lists

_LEAST_ASSIGNED = 64
"""Lists found at once; finding them costs the same for one as for many."""

_PLAIN_LISTS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)


class RisingSearch:
    """Searches with more and more effort.

    Where lists are plain and their order is exact, an effort adds the lists that the last one did
    not visit. All steps together then cost what the hardest does by itself, not three times that.
    """

    def __init__(
        self, index: faiss.Index, queries: np.ndarray, depth: int, *, metric: Metric
    ) -> None:
        self._index = index
        self._queries = queries
        self._depth = depth
        self._metric = metric
        self._visited = 0
        self._lists = np.empty((len(queries), 0), np.int64)
        self._near = np.empty((len(queries), 0), np.float32)
        self._found: Neighbours | None = None
        self.seconds = 0.0
        """Of a search with the last effort by itself."""

    def search(self, effort: int) -> Neighbours:
        """Return what is found with an effort larger than the last one."""
        started = time.perf_counter()
        if _can_add_lists(self._index):
            found = self._add_lists(effort)
            self.seconds += time.perf_counter() - started
            return found
        found = search_index(
            self._index, self._queries, self._depth, effort=effort, metric=self._metric
        )
        self.seconds = time.perf_counter() - started
        return found

    def _add_lists(self, effort: int) -> Neighbours:
        if effort > self._lists.shape[1]:
            self._assign(effort)
        new = slice(self._visited, effort)
        found = search_lists(
            self._index, self._queries, self._depth, self._lists[:, new], self._near[:, new]
        )
        self._visited = effort
        lists = Neighbours.of(*found, self._metric)
        if self._found is not None:
            lists = merge_neighbours([self._found, lists], self._depth)
        self._found = lists
        return lists

    def _assign(self, effort: int) -> None:
        index = inner_index(self._index)
        wanted = min(max(_LEAST_ASSIGNED, 2 * effort), index.nlist)  # type: ignore[attr-defined]
        self._near, self._lists = index.quantizer.search(self._queries, wanted)  # type: ignore[attr-defined]


def _can_add_lists(index: faiss.Index) -> bool:
    """Tell whether lists can be visited a few at a time, nearest first.

    A graph of lists finds better ones when it is asked for more.
    """
    if type(index) not in _PLAIN_LISTS or is_on_gpu(index):
        return False
    return isinstance(faiss.downcast_index(index.quantizer), faiss.IndexFlat)  # type: ignore[attr-defined]
