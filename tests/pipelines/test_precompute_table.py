"""Keys, lists and changes of recommendations, without a cluster."""

import hashlib

import pyarrow as pa
import pytest

from qbatch.errors import IntegrityError
from qbatch.pipelines.precompute_delta import changes_between
from qbatch.pipelines.precompute_slices import MEMBERS, partitions_of
from qbatch.pipelines.precompute_table import merge_slices
from qbatch.schema import RECOMMENDATION_CHANGES, RECOMMENDATIONS


def recommendations(lists: dict[str, list[tuple[str, float]]]) -> pa.Table:
    rows = [
        {"key": key, "items": [{"doc_id": d, "score": s} for d, s in items]}
        for key, items in sorted(lists.items())
    ]
    return pa.Table.from_pylist(rows, schema=RECOMMENDATIONS)


def keys_slice(*keys: str) -> pa.Table:
    rows = [{"key": key, "rank": 0} for key in keys]
    return pa.Table.from_pylist(rows, schema=MEMBERS)


def run_slice(*lists: tuple[str, list[str]], best: float = 1.0) -> pa.Table:
    rows = [
        {"key": key, "rank": rank, "doc_id": doc_id, "score": best / rank}
        for key, doc_ids in lists
        for rank, doc_id in enumerate(doc_ids, start=1)
    ]
    return pa.Table.from_pylist(rows, schema=MEMBERS)


def test_every_key_has_one_row_and_the_best_of_its_lists():
    slices = [
        keys_slice("b", "\u00e9", "b"),
        keys_slice("a", "c", "b"),
        run_slice(("c", ["y", "x"]), ("b", ["no", "no2", "no3"]), best=0.5),
        run_slice(("b", ["x", "y"]), ("\u00e9", ["z"]), ("b", ["no"])),
    ]
    table, num_queries = merge_slices(slices)
    assert num_queries == 6
    lists = {"a": [], "b": ["x", "y"], "c": ["y", "x"], "\u00e9": ["z"]}
    best = {"c": 0.5}
    wanted = {
        key: [(d, best.get(key, 1) / rank) for rank, d in enumerate(items, start=1)]
        for key, items in lists.items()
    }
    assert table.equals(recommendations(wanted))
    assert merge_slices([])[0].equals(RECOMMENDATIONS.empty_table())
    assert merge_slices([keys_slice("a")])[0].equals(recommendations({"a": []}))


def test_rows_of_no_key_are_an_error():
    with pytest.raises(IntegrityError, match="rows of 'b', which is not among its queries"):
        merge_slices([keys_slice("a"), run_slice(("a", ["x"]), ("b", ["x"]))])


def test_partitions_are_the_documented_hash():
    keys = ["a", "b", "a", "\u65e5\u672c", ""]
    wanted = [
        int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8).digest(), "little") % 7
        for k in keys
    ]
    assert partitions_of(pa.array(keys, pa.large_string()), 7).tolist() == wanted
    assert partitions_of(pa.array([], pa.large_string()), 7).tolist() == []


def test_changes_are_what_differs_by_more_than_rounding():
    before = recommendations(
        {
            "same": [("x", 0.5), ("y", 0.25)],
            "rounded": [("x", 0.5), ("y", 0.25)],
            "rescored": [("x", 0.5), ("y", 0.25)],
            "swapped": [("x", 0.5), ("y", 0.5)],
            "shorter": [("x", 0.5), ("y", 0.25)],
            "emptied": [("x", 0.5)],
            "gone": [("x", 0.5)],
            "empty": [],
        }
    )
    lists = {
        "same": [("x", 0.5), ("y", 0.25)],
        "rounded": [("x", 0.500001), ("y", 0.25)],
        "rescored": [("x", 0.5), ("y", 0.26)],
        "swapped": [("y", 0.5), ("x", 0.5)],
        "shorter": [("x", 0.5)],
        "emptied": [],
        "empty": [],
        "new": [("x", 0.5)],
    }
    delta = changes_between(before, recommendations(lists))
    assert delta.schema.equals(RECOMMENDATION_CHANGES)
    put = {k: lists[k] for k in ("rescored", "swapped", "shorter", "emptied", "new")}
    wanted = recommendations(put | {"gone": []})
    assert delta.drop_columns("deleted").equals(wanted)
    assert delta.filter(delta["deleted"])["key"].to_pylist() == ["gone"]


@pytest.mark.parametrize("lists", [{}, {"a": []}, {"a": [("x", 0.5)]}])
def test_nothing_changes_between_equals_and_all_against_nothing(lists):
    table, empty = recommendations(lists), RECOMMENDATIONS.empty_table()
    assert changes_between(table, table).num_rows == 0
    put, removed = changes_between(empty, table), changes_between(table, empty)
    assert put.drop_columns("deleted").equals(table)
    assert removed["deleted"].to_pylist() == [True] * len(lists)
