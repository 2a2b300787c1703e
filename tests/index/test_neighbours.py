"""Neighbour lists against a sort of everything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbatch.index.neighbours import (
    ExactNeighbours,
    Neighbours,
    exact_neighbours,
    merge_neighbours,
)
from tests.vector_tables import clustered


def brute_force(queries: np.ndarray, vectors: np.ndarray, depth: int) -> np.ndarray:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :depth]


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_exact_neighbours_are_those_of_a_full_sort(metric):
    vectors, queries = clustered(500, 16), clustered(40, 16, seed=1)
    found = exact_neighbours(queries, vectors, 20, metric)
    np.testing.assert_array_equal(found.rows, brute_force(queries, vectors, 20))
    scores = np.take_along_axis(queries @ vectors.T, found.rows, 1)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_streamed_neighbours_equal_those_of_the_whole():
    vectors, queries = clustered(500, 16), clustered(40, 16, seed=1)
    exact = ExactNeighbours(queries, 20, "l2")
    for part in np.split(vectors, [3, 5, 5, 200]):
        exact.add(part)
    np.testing.assert_array_equal(exact.found.rows, brute_force(queries, vectors, 20))


def test_few_rows_leave_places_free():
    exact = ExactNeighbours(clustered(2, 16), 5, "l2")
    exact.add(clustered(3, 16, seed=1))
    assert (exact.found.rows[:, :3] >= 0).all()
    assert (exact.found.rows[:, 3:] == -1).all()
    assert np.isneginf(exact.found.scores[:, 3:]).all()


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=4))
def test_merging_equals_one_sort_and_ties_go_by_row(shards):
    """Scores from a few values make ties common; each shard holds rows of its own."""
    lists, everything, base = [], [], 0
    for scores in shards:
        rows = np.arange(base, base + 6)
        base += 6
        padded = np.full((1, 6), -np.inf, np.float32)
        padded[0, : len(scores)] = scores
        found = Neighbours(rows=np.where(np.isinf(padded), -1, rows), scores=padded)
        lists.append(found.ordered(6))
        everything += [(-s, r) for s, r in zip(scores, rows.tolist(), strict=False)]
    merged = merge_neighbours(lists, 5)
    wanted = [row for _, row in sorted(everything)][:5]
    assert merged.rows[0, : len(wanted)].tolist() == wanted
    assert (merged.rows[0, len(wanted) :] == -1).all()


def test_freed_places_move_to_the_end():
    found = Neighbours(rows=np.array([[4, 7, 9]]), scores=np.array([[3.0, 2.0, 1.0]], np.float32))
    kept = found.without(np.array([[False, True, False]]))
    assert kept.rows.tolist() == [[4, 9, -1]]
    assert kept.scores[0].tolist() == [3.0, 1.0, -np.inf]
    assert kept.shifted(100).rows.tolist() == [[104, 109, -1]]
