"""Candidates from what a search found, against plain loops."""

import numpy as np
import pyarrow as pa
import pytest

from qbatch.errors import ConfigError
from qbatch.index.columns import VectorColumn
from qbatch.index.diversity import diversify
from qbatch.index.items import ItemRows, ItemTable, needed_columns
from qbatch.index.selecting import SelectionOptions, select_candidates
from qbatch.schema import LOCATED_RUN, RUN, vector_array
from tests.vector_tables import clustered

COLUMN = VectorColumn(name="vector", dim=8, normalize=True, is_exact=True)


def plain_mmr(relevance, similarity, top_k, diversity) -> list[int]:
    chosen: list[int] = []
    left = [i for i, value in enumerate(relevance) if np.isfinite(value)]
    while left and len(chosen) < top_k:
        penalties = [max((similarity[i, j] for j in chosen), default=0.0) for i in left]
        gains = [
            (1 - diversity) * relevance[i] - diversity * penalty
            for i, penalty in zip(left, penalties, strict=True)
        ]
        chosen.append(left.pop(int(np.argmax(gains))))
    return chosen + [-1] * (min(top_k, len(relevance)) - len(chosen))


@pytest.mark.parametrize("diversity", [0.0, 0.3, 0.7, 1.0])
def test_diversify_is_maximal_marginal_relevance(diversity):
    rng = np.random.default_rng(1)
    queries = clustered(20, 8, seed=1)
    vectors = clustered(20 * 12, 8, seed=2).reshape(20, 12, 8)
    relevance = np.einsum("nd,nkd->nk", queries, vectors)
    for i in range(20):
        relevance[i, rng.integers(0, 13) :] = -np.inf
    similarity = vectors @ vectors.transpose(0, 2, 1)
    for top_k in (1, 5, 30):
        chosen = diversify(relevance, similarity, top_k=top_k, diversity=diversity)
        for i in range(20):
            wanted = plain_mmr(relevance[i], similarity[i], top_k, diversity)
            assert chosen[i].tolist() == wanted


def items_table(vectors: np.ndarray, texts: list[str], groups: list[str | None]) -> ItemTable:
    hashes = pa.array([text.encode().ljust(16) for text in texts], pa.binary(16))
    table = pa.table({"vector": vector_array(vectors), "content_hash": hashes, "group": groups})
    half = len(table) // 2
    return ItemTable(
        [table.slice(0, half), table.slice(half)],
        rows=len(table),
        column=COLUMN,
        group_column="group",
    )


def rows_from(items: ItemTable, first: int) -> ItemRows:
    return ItemRows(hashes=items.hashes[first:], groups=items.groups[first:])


def located_run(lists: dict[int, list[tuple[int, float]]]) -> pa.Table:
    """From the row of each query to rows found and scores."""
    rows = [
        {
            "query_id": f"d{query}",
            "doc_id": f"d{row}",
            "passage_id": f"d{row}#0",
            "rank": rank,
            "score": score,
            "query_row": query - 1,
            "row": row,
        }
        for query, found in lists.items()
        for rank, (row, score) in enumerate(found, start=1)
    ]
    return pa.Table.from_pylist(rows, schema=LOCATED_RUN)


def chosen_rows(table: pa.Table) -> dict[str, list[str]]:
    assert table.schema.equals(RUN)
    found: dict[str, list[str]] = {}
    for row in table.to_pylist():
        found.setdefault(row["query_id"], []).append(row["doc_id"])
        assert row["rank"] == len(found[row["query_id"]])
    return found


def test_copies_near_duplicates_and_other_groups_are_left_out():
    items = items_table(
        clustered(8, 8),
        ["a", "b", "c", "d", "b", "d", "e", "d"],
        ["x", "x", None, "y", "x", "x", "x", "x"],
    )
    run = located_run(
        {
            1: [(0, 0.99), (4, 0.9), (7, 0.8), (5, 0.8), (3, 0.7), (2, 0.6), (6, 0.5)],
            2: [(1, 0.9), (0, 0.8)],
            4: [(6, 0.9), (1, 0.8)],
        }
    )

    def select(**options) -> dict[str, list[str]]:
        chosen = SelectionOptions(top_k=4, are_items=True, **options)
        return chosen_rows(select_candidates(run, items, chosen, asking=rows_from(items, 1)))

    # 4 is a copy of 1; of the copies 3, 5 and 7 the first id counts
    assert select() == {"d1": ["d0", "d3", "d2", "d6"], "d2": ["d1", "d0"], "d4": ["d6"]}
    assert select(max_similarity=0.95)["d1"] == ["d3", "d2", "d6"]
    # the null of 2 is like nothing, not even like itself
    assert select(same="group") == {"d1": ["d0", "d5", "d6"], "d4": ["d6"]}


def test_diversity_looks_at_the_stored_vectors_of_what_is_left():
    vectors = clustered(40, 8)
    texts = [str(i) for i in range(40)]
    items = items_table(vectors, texts, ["x", None, "y", "x"] * 10)
    scores = vectors @ vectors.T
    lists = {}
    for query, depth in ((1, 20), (3, 3), (5, 39)):
        best = [row for row in np.argsort(-scores[query]).tolist() if row != query][:depth]
        lists[query] = [(row, float(scores[query, row])) for row in best]
    options = SelectionOptions(top_k=6, are_items=True, max_similarity=0.9, diversity=0.5)
    asking = rows_from(items, 1)
    found = chosen_rows(select_candidates(located_run(lists), items, options, asking=asking))
    for query, hits in lists.items():
        left = [row for row, score in hits if score <= np.float32(0.9)]
        wanted = plain_mmr(scores[query, left], scores[np.ix_(left, left)], 6, 0.5)
        assert found[f"d{query}"] == [f"d{left[i]}" for i in wanted if i >= 0]


def test_an_empty_run_gives_no_candidates():
    items = items_table(clustered(4, 8), list("abcd"), [None] * 4)
    for diversity in (0.0, 0.5):
        options = SelectionOptions(top_k=3, are_items=True, diversity=diversity)
        found = select_candidates(LOCATED_RUN.empty_table(), items, options)
        assert found.equals(RUN.empty_table())


def test_items_are_known_by_row():
    vectors = clustered(7, 8)
    items = items_table(vectors, list("abcabca"), ["x", "y", None, "x", "z", "y", None])
    np.testing.assert_array_equal(items.vectors(np.array([[6, 0]])), vectors[[[6, 0]]])
    codes = items.groups.tolist()
    assert (codes[0], codes[1]) == (codes[3], codes[5])
    assert [i for i, code in enumerate(codes) if code == -1] == [2, 6]
    assert len(set(codes)) == 4
    assert (items.hashes[0] == items.hashes[6]).all()
    assert not (items.hashes[0] == items.hashes[1]).all()
    assert needed_columns(None, "group") == ["content_hash", "group"]
    hashes = pa.array([text.encode().ljust(16) for text in "bz"], pa.binary(16))
    others = items.rows_of(pa.table({"content_hash": hashes, "group": ["z", "unknown"]}))
    assert (others.hashes[0] == items.hashes[1]).all()
    assert others.groups.tolist() == [codes[4], -1]
    table = pa.table({"content_hash": pa.array([b"x" * 16], pa.binary(16)), "group": [[1]]})
    with pytest.raises(ConfigError, match=r"column 'group' is list<.*give --same a column"):
        ItemTable([table], rows=1, group_column="group")
    with pytest.raises(ValueError, match="made without vectors"):
        ItemTable([], rows=0).vectors(np.array([0]))
