"""What changed between two sets of rows, counted with repetition, wherever the rows lie.

A row is known by the hash of what an index shows of it. Rows that only moved from one file to
another are therefore no change; of equal rows it does not matter which one goes.
"""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

_HASH_BYTES = 16


def row_hashes(table: pa.Table) -> np.ndarray:
    """Return blake2b-128 of every row over all columns in their order: S16, (rows,).

    Null differs from every text; borders between columns count.
    """
    texts = [_as_text(column) for column in table.columns]
    hashes = np.empty(table.num_rows, f"S{_HASH_BYTES}")
    for i, values in enumerate(zip(*texts, strict=True)):
        joined = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
        hashes[i] = hashlib.blake2b(joined, digest_size=_HASH_BYTES).digest()
    return hashes


def _as_text(column: pa.ChunkedArray) -> Iterable[str | None]:
    if pa.types.is_fixed_size_binary(column.type):
        return (value and value.hex() for value in column.to_pylist())
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        return (None if value is None else repr(value) for value in column.to_pylist())
    texts: list[str | None] = column.cast(pa.large_string()).to_pylist()
    return texts


class RowChanges:
    """Which rows of new files an index lacks, and which of its rows no file has any more."""

    def __init__(self, removed: np.ndarray, added: np.ndarray) -> None:
        """Compare.

        Args:
            removed: S16, hashes of all rows of the files that are gone.
            added: S16, hashes of all rows of the files that are new.
        """
        self._keys, codes = np.unique(np.concatenate([removed, added]), return_inverse=True)
        num_keys = len(self._keys)
        num_removed = np.bincount(codes[: len(removed)], minlength=num_keys)
        num_added = np.bincount(codes[len(removed) :], minlength=num_keys)
        self._gone = np.maximum(num_removed - num_added, 0)
        missing = np.maximum(num_added - num_removed, 0)
        codes = codes[len(removed) :]
        self.new = np.flatnonzero(_occurrence(codes) < missing[codes])
        """int64: places in ``added`` of the rows to be added."""

    @property
    def num_gone(self) -> int:
        """Rows that no file has any more."""
        return int(self._gone.sum())

    @property
    def gone_hashes(self) -> np.ndarray:
        """Hashes of rows that no file has any more, sorted, each once: S16."""
        hashes: np.ndarray = self._keys[self._gone > 0]
        return hashes

    def choose_gone(self, found: np.ndarray) -> np.ndarray:
        """Return the places in ``found`` of the rows to be forgotten: the first of equal ones.

        Args:
            found: S16, hashes of rows of the index, all of them in ``gone_hashes``.
        """
        codes = np.searchsorted(self._keys, found)
        chosen: np.ndarray = np.flatnonzero(_occurrence(codes) < self._gone[codes])
        return chosen


def _occurrence(codes: np.ndarray) -> np.ndarray:
    """Return how often each value stood earlier in the array: int64, like ``codes``."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(starts, append=len(ordered))
    within = np.arange(len(ordered)) - np.repeat(starts, counts)
    occurrence = np.empty(len(codes), np.int64)
    occurrence[order] = within
    return occurrence
