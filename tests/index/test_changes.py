"""Differences of rows, against counters."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from qbatch.index.changes import RowChanges, row_hashes


def s16(values) -> np.ndarray:
    return np.array([f"{value:016d}".encode() for value in values], "S16")


@pytest.mark.parametrize("seed", range(5))
def test_changes_are_differences_of_multisets(seed):
    rng = np.random.default_rng(seed)
    removed, added = rng.integers(0, 40, 60), rng.integers(10, 50, 70)
    index = np.concatenate([removed, rng.integers(0, 50, 100)])
    rng.shuffle(index)
    changes = RowChanges(s16(removed), s16(added))
    gone = Counter(removed.tolist()) - Counter(added.tolist())
    new = Counter(added.tolist()) - Counter(removed.tolist())
    assert Counter(added[changes.new].tolist()) == new
    assert changes.num_gone == gone.total()
    assert set(changes.gone_hashes.tolist()) == set(s16(gone).tolist())
    wanted = index[np.isin(index, list(gone))]
    assert Counter(wanted[changes.choose_gone(s16(wanted))].tolist()) == gone


def test_nothing_changes_nothing():
    changes = RowChanges(s16([3, 1, 2]), s16([1, 2, 3]))
    assert (changes.num_gone, len(changes.new), len(changes.gone_hashes)) == (0, 0, 0)
    empty = RowChanges(s16([]), s16([]))
    assert (empty.num_gone, len(empty.new)) == (0, 0)


def test_every_column_counts_and_types_do_not():
    table = pa.table(
        {
            "doc_id": ["a", "a", "a", "ab", None, "a"],
            "hash": pa.array([b"x" * 16, b"x" * 16, b"y" * 16, b"x" * 16, b"x" * 16, b"x" * 16]),
            "year": [1, 1, 1, 1, 1, None],
            "tags": [["t"], ["t"], ["t"], ["t"], ["t"], ["t"]],
        }
    )
    table = table.set_column(1, "hash", table["hash"].cast(pa.binary(16)))
    hashes = row_hashes(table)
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:].tolist())) == 5
    wider = table.set_column(2, "year", table["year"].cast(pa.int32()))
    assert (row_hashes(wider) == hashes).all()
