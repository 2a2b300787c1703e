"""The queries of evaluation sets, so that no training pair asks what will be asked again."""

from collections.abc import Iterator, Sequence

import numpy as np

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units
from qbatch.storage import Storage
from qbatch.training.near_duplicates import band_keys, text_keys

_BEIR_QUERIES = ("queries.jsonl", "queries.jsonl.gz", "queries.jsonl.zst")


class LeakCheck:
    """Finds queries that are, or nearly are, among those of evaluation sets."""

    def __init__(self, queries: Sequence[str]) -> None:
        """Take the evaluation's queries; none makes a check that finds nothing."""
        self.num_queries = len(queries)
        self._exact = np.unique(text_keys(queries))
        self._near = np.unique(band_keys(queries)) if queries else np.empty(0, np.uint64)

    def is_leak(self, queries: Sequence[str]) -> np.ndarray:
        """Return for each query whether an evaluation asks it, or nearly: bool, (queries,)."""
        if not self.num_queries or not queries:
            return np.zeros(len(queries), bool)
        found: np.ndarray = np.isin(text_keys(queries), self._exact)
        found |= np.isin(band_keys(queries), self._near).any(axis=1)
        return found

    def fingerprint(self) -> list[int]:
        """Return what tells one set of queries from another: sum and number of their keys."""
        return [int(self._exact.sum(dtype=np.uint64)), len(self._exact)]


def read_evaluation_queries(uris: Sequence[str], text_column: str = "text") -> list[str]:
    """Return the queries of all evaluation sets.

    Args:
        uris: BEIR folders, or queries in any corpus format.
        text_column: Of the query.

    Raises:
        NoInputError: Nothing of a known format lies there.
    """
    return [text for uri in uris for text in _read(queries_of(uri), text_column)]


def queries_of(uri: str) -> str:
    """Return where the queries of an evaluation set lie: inside a BEIR folder, or there."""
    storage = Storage(uri)
    found = next((name for name in _BEIR_QUERIES if storage.exists(name)), None)
    return uri if found is None else storage.object_uri(found)


def _read(uri: str, text_column: str) -> Iterator[str]:
    config = CorpusConfig(input=uri, text_column=text_column)
    for unit in plan_units(config):
        yield from read_unit(unit, config).documents["text"].to_pylist()
