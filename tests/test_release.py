"""Releases: what belongs together, published as one, and taken back."""

import pyarrow as pa
import pytest

from qbatch.errors import CommitRaceLostError, ConfigError, IntegrityError, NoInputError
from qbatch.manifest import latest_generation, publish
from qbatch.release import (
    TableRef,
    latest_release,
    open_release,
    publish_release,
    release_numbers,
    roll_back,
)
from qbatch.schema import FILES
from qbatch.storage import Storage
from tests.test_manifest import draft, put_table


def add_rows(root: Storage, path: str, *rows: str) -> TableRef:
    """Publish one more generation of a small table."""
    storage = Storage(root.object_uri(path))
    name = f"data/{'-'.join(rows)}.parquet"
    files = pa.Table.from_pylist([put_table(storage, name, pa.table({"x": rows}))], schema=FILES)
    current = latest_generation(storage)
    made = publish(storage, draft(files=files), after=current.number if current else 0)
    return TableRef(path=path, generation=made.number)


def release_of(root: Storage, **tables: TableRef):
    return publish_release(root, tables, current=latest_release(root), config={}, gates=[])


def rows_of(release, name: str) -> list[str]:
    return release.open(name).to_table()["x"].to_pylist()


def test_readers_follow_the_release_and_not_the_tables(store_uri):
    root = Storage(store_uri)
    vectors, index = add_rows(root, "m/vectors", "a"), add_rows(root, "m/index", "b")
    first = release_of(root, vectors=vectors, index=index)
    newer = add_rows(root, "m/vectors", "c")
    assert newer.generation == 2
    opened = open_release(store_uri)
    assert (opened.number, rows_of(opened, "vectors"), rows_of(opened, "index")) == (
        1,
        ["a"],
        ["b"],
    )
    second = release_of(root, vectors=newer, index=index)
    assert (first.number, second.number) == (1, 2)
    assert rows_of(open_release(store_uri), "vectors") == ["c"]
    assert rows_of(opened, "vectors") == ["a"]
    assert rows_of(open_release(store_uri, 1), "vectors") == ["a"]
    assert open_release(store_uri).generation.counts["index"] == {"rows_in": 0}


def test_the_same_tables_are_not_released_twice(tmp_path):
    root = Storage(str(tmp_path))
    vectors = add_rows(root, "vectors", "a")
    assert release_of(root, vectors=vectors).number == 1
    assert release_of(root, vectors=vectors).number == 1


def test_of_two_writers_one_releases(store_uri):
    root = Storage(store_uri)
    one, other = add_rows(root, "vectors", "a"), add_rows(root, "vectors", "b")
    publish_release(root, {"vectors": one}, current=None, config={}, gates=[])
    with pytest.raises(CommitRaceLostError, match="published by another writer"):
        publish_release(root, {"vectors": other}, current=None, config={}, gates=[])
    assert rows_of(open_release(store_uri), "vectors") == ["a"]


def test_what_is_not_whole_is_not_released(tmp_path):
    root = Storage(str(tmp_path))
    vectors = add_rows(root, "vectors", "a")
    with pytest.raises(IntegrityError, match="has no generation 7; nothing was released"):
        release_of(root, vectors=TableRef(path="vectors", generation=7))
    path = vectors.open(root).generation.files["path"][0].as_py()
    data = root.read(f"vectors/{path}")
    root.write(f"vectors/{path}", data[:-1])
    with pytest.raises(IntegrityError, match=r"lacks 1 of its files, the first is data/a\.parquet"):
        release_of(root, vectors=vectors)
    root.delete(f"vectors/{path}")
    with pytest.raises(IntegrityError, match="lacks 1 of its files"):
        release_of(root, vectors=vectors)
    assert release_numbers(root) == []


def test_rolling_back_gives_an_older_content_a_new_number(store_uri):
    root = Storage(store_uri)
    refs = [add_rows(root, "vectors", name) for name in "abc"]
    for ref in refs:
        release_of(root, vectors=ref)
    back = roll_back(root, 1, config={})
    assert (back.number, rows_of(open_release(store_uri), "vectors")) == (4, ["a"])
    assert back.withdrawn == [{"vectors": refs[2]}]
    assert roll_back(root, 1, config={}).number == 4
    # forward again: what serves is not withdrawn, what served is
    forward = roll_back(root, 3, config={})
    assert (forward.number, rows_of(forward, "vectors")) == (5, ["c"])
    assert forward.withdrawn == [{"vectors": refs[0]}]
    assert release_numbers(root) == [1, 2, 3, 4, 5]


def test_what_is_not_there_is_named(tmp_path):
    root = Storage(str(tmp_path))
    with pytest.raises(NoInputError, match="nothing was released"):
        open_release(root.uri)
    release_of(root, vectors=add_rows(root, "vectors", "a"))
    with pytest.raises(NoInputError, match=r"no release 4 in .*; it has \[1\]"):
        roll_back(root, 4, config={})
    with pytest.raises(NoInputError, match="has no table 'answers'; it has vectors"):
        open_release(root.uri).open("answers")
    with pytest.raises(ConfigError, match="holds vectors, not releases"):
        open_release(f"{root.uri}/vectors")
