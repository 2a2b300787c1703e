"""Where vectors files go: evenly, stably, completely."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from qbatch.pipelines.index_parts import assign_shards, list_parts, sample_counts
from qbatch.schema import PARTS
from qbatch.tables import open_vectors
from tests.vector_tables import clustered, rows_table, split_files, write_vectors


def parts_of(rows: list[int]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"name": f"n{i}", "path": f"p{i}", "rows": n, "bytes": n, "sha256": f"s{i}"}
            for i, n in enumerate(rows)
        ],
        schema=PARTS,
    )


sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


@given(sizes, st.integers(1, 10))
def test_every_part_is_in_one_shard_and_shards_are_even(rows, num_shards):
    shards = assign_shards(parts_of(rows), num_shards)
    placed = Counter(part["name"] for shard in shards for part in shard.parts)
    assert placed == Counter(f"n{i}" for i in range(len(rows)))
    assert len(shards) == min(num_shards, len(rows))
    largest = max(shard.rows for shard in shards)
    assert largest <= sum(rows) / num_shards + max(rows)
    for shard in shards:
        names = [int(part["name"][1:]) for part in shard.parts]
        assert names == sorted(names)


@given(sizes, st.integers(1, 10), st.data())
def test_known_parts_stay_where_they_were(rows, num_shards, data):
    before = {
        part["name"]: shard.number
        for shard in assign_shards(parts_of(rows), num_shards)
        for part in shard.parts
    }
    changed = data.draw(st.integers(0, len(rows) - 1))
    later = parts_of([n + (i == changed) for i, n in enumerate([*rows, 17])])
    after = {
        part["name"]: shard.number
        for shard in assign_shards(later, num_shards, before)
        for part in shard.parts
    }
    assert {name: after[name] for name in before} == before


def test_keys_follow_content_and_fingerprint():
    (one,) = assign_shards(parts_of([3, 4]), 1)
    (other,) = assign_shards(parts_of([3, 4, 5]), 1)
    assert one.key("a") == one.key("a")
    assert len({one.key("a"), one.key("b"), other.key("a")}) == 3


def test_a_changed_object_keeps_its_name(tmp_path):
    uri = str(tmp_path)
    files = split_files(rows_table(clustered(60, 8), [f"d{i}" for i in range(60)]), 6)
    write_vectors(uri, files)
    before = list_parts(open_vectors(uri)).to_pylist()
    files["003.jsonl"] = rows_table(clustered(11, 8, seed=9), [f"e{i}" for i in range(11)])
    write_vectors(uri, files)
    after = list_parts(open_vectors(uri)).to_pylist()
    assert [p["name"] for p in before] == [p["name"] for p in after]
    different = [p["name"] for p, q in zip(before, after, strict=True) if p != q]
    assert different == ["corpus/003.jsonl#0"]


def test_files_without_rows_are_no_parts(tmp_path):
    files = split_files(rows_table(clustered(20, 8), [f"d{i}" for i in range(20)]), 2)
    files["empty.jsonl"] = files["000.jsonl"].slice(0, 0)
    write_vectors(str(tmp_path), files)
    assert list_parts(open_vectors(str(tmp_path)))["rows"].to_pylist() == [10, 10]


def test_samples_are_even_over_rows():
    rows = np.array([1000, 10, 100_000, 5000])
    drawn = sum(sample_counts(rows, 1000, np.random.default_rng(i)) for i in range(200))
    np.testing.assert_allclose(drawn / drawn.sum(), rows / rows.sum(), atol=0.01)
    np.testing.assert_array_equal(sample_counts(rows, 10**9, np.random.default_rng(0)), rows)
