"""Generations: create-only, read back when unclear, refused when damaged."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch import manifest
from qbatch.errors import CommitRaceLostError, IntegrityError, NoInputError, StorageError
from qbatch.manifest import Generation, file_entry, fingerprint_id, latest_generation, publish
from qbatch.schema import FILES
from qbatch.storage import Storage
from qbatch.tables import open_vectors


def draft(*paths: str, **changes) -> Generation:
    entries = [{"path": p, "rows": 1, "bytes": 1, "sha256": "00"} for p in paths]
    fields = {
        "kind": "vectors",
        "fingerprint": {"model": "m"},
        "config": {"input": "x"},
        "counts": {"rows_in": len(paths)},
        "files": pa.Table.from_pylist(entries, schema=FILES),
        "rejects": FILES.empty_table(),
    }
    return Generation(**(fields | changes))


def test_readers_see_the_highest_generation(store_uri):
    storage = Storage(store_uri)
    assert latest_generation(storage) is None
    first = publish(storage, draft("data/a"), after=0)
    second = publish(storage, draft("data/a", "data/b"), after=1)
    assert latest_generation(storage) == second
    assert manifest.load_generation(storage, 1) == first
    assert (first.number, second.number) == (1, 2)


def test_of_concurrent_writers_one_wins(store_uri):
    def attempt(i: int) -> str:
        try:
            return publish(Storage(store_uri), draft(f"data/{i}"), after=0).nonce
        except CommitRaceLostError:
            return ""

    with ThreadPoolExecutor(8) as pool:
        nonces = [nonce for nonce in pool.map(attempt, range(12)) if nonce]
    assert nonces == [latest_generation(Storage(store_uri)).nonce]


class LyingStorage(Storage):
    """Writes, then fails as a store does whose answer is lost; optionally loses the write too."""

    written = True

    def create(self, path, data):
        if self.written:
            super().create(path, data)
        raise StorageError("500 Internal Server Error")


def test_a_lost_answer_is_read_back_and_taken_as_success(store_uri):
    generation = publish(LyingStorage(store_uri), draft("data/a"), after=0)
    assert latest_generation(Storage(store_uri)) == generation


def test_a_failed_write_is_not_taken_as_success(store_uri):
    storage = LyingStorage(store_uri)
    storage.written = False
    with pytest.raises(StorageError, match="500"):
        publish(storage, draft("data/a"), after=0)
    assert latest_generation(Storage(store_uri)) is None


def test_a_retry_that_meets_its_own_manifest_is_success(store_uri):
    class RetryingStorage(Storage):
        def create(self, path, data):
            super().create(path, data)
            super().create(path, data)

    generation = publish(RetryingStorage(store_uri), draft("data/a"), after=0)
    assert latest_generation(Storage(store_uri)) == generation


def test_a_single_writer_is_on_record_and_still_does_not_replace(store_uri):
    storage = Storage(store_uri, single_writer=True)
    publish(storage, draft("data/a"), after=0)
    assert latest_generation(storage).single_writer
    with pytest.raises(CommitRaceLostError, match="published by another writer"):
        publish(storage, draft("data/b"), after=0)


def test_long_lists_move_to_parquet_with_their_hash(tmp_path):
    storage = Storage(str(tmp_path))
    paths = [f"data/{i:06d}" for i in range(10_001)]
    publish(storage, draft(*paths), after=0)
    document = json.loads((tmp_path / "manifests/00000001.json").read_bytes())
    assert document["files"]["rows"] == 10_001
    assert latest_generation(storage).files["path"].to_pylist() == paths
    listed = tmp_path / document["files"]["path"]
    listed.write_bytes(listed.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="damaged or replaced"):
        latest_generation(storage)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"kind": 3}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_manifest_is_named(tmp_path, data):
    storage = Storage(str(tmp_path))
    publish(storage, draft("data/a"), after=0)
    storage.write("manifests/00000002.json", data)
    with pytest.raises(IntegrityError, match=r"00000002\.json is not a manifest"):
        latest_generation(storage)


def test_a_file_without_a_path_is_a_damaged_manifest(tmp_path):
    storage = Storage(str(tmp_path))
    publish(storage, draft("data/a"), after=0)
    document = json.loads(storage.read("manifests/00000001.json"))
    document["files"][0]["path"] = None
    storage.write("manifests/00000002.json", json.dumps(document).encode())
    with pytest.raises(IntegrityError, match="path None is no text"):
        latest_generation(storage)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "s3://other/x", "data/../../x"])
def test_a_manifest_cannot_name_files_outside_its_table(tmp_path, path):
    storage = Storage(str(tmp_path))
    publish(storage, draft(path), after=0)
    with pytest.raises(IntegrityError, match="leaves the table"):
        latest_generation(storage)


def test_other_files_beside_manifests_are_ignored(tmp_path):
    storage = Storage(str(tmp_path))
    publish(storage, draft("data/a"), after=0)
    storage.write("manifests/99999999.json.bak", b"x")
    storage.write("manifests/old/99999999.json", b"x")
    assert latest_generation(storage).number == 1


def test_same_content_is_recognised():
    one = draft("data/a")
    assert one.has_content_of(replace(one, number=7, counts={"other": 1}))
    assert not one.has_content_of(draft("data/b"))
    assert not one.has_content_of(draft("data/a", fingerprint={"model": "n"}))


def test_fingerprint_id_ignores_order_and_sees_every_value():
    assert fingerprint_id({"a": 1, "b": 2}) == fingerprint_id({"b": 2, "a": 1})
    assert fingerprint_id({"a": 1}) != fingerprint_id({"a": "1"})
    assert len(fingerprint_id({})) == 32


def put_table(storage: Storage, path: str, table: pa.Table) -> dict:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    storage.write(path, data)
    return file_entry(path, table.num_rows, data)


def test_a_reader_keeps_its_generation_and_sees_only_listed_files(store_uri):
    storage = Storage(store_uri)
    entry = put_table(storage, "data/a.parquet", pa.table({"doc_id": ["1", "2"]}))
    put_table(storage, "data/unlisted.parquet", pa.table({"doc_id": ["9"]}))
    files = pa.Table.from_pylist([entry], schema=FILES)
    publish(storage, draft(files=files), after=0)
    table = open_vectors(store_uri)
    publish(storage, draft(), after=1)
    assert table.to_table(["doc_id"])["doc_id"].to_pylist() == ["1", "2"]
    assert open_vectors(store_uri, generation=1).num_rows == 2
    storage.write("data/a.parquet", b"PAR1 something else")
    with pytest.raises(IntegrityError, match="damaged or replaced"):
        table.to_table()
    storage.delete("data/a.parquet")
    with pytest.raises(IntegrityError, match="gone"):
        table.to_table()


def test_an_unpublished_table_is_no_input(tmp_path):
    with pytest.raises(NoInputError, match="no published generation"):
        open_vectors(str(tmp_path))


def test_a_reader_beside_a_writer_sees_whole_generations(tmp_path):
    storage = Storage(str(tmp_path))
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            found = latest_generation(Storage(str(tmp_path)))
            if found is not None:
                assert found.files.num_rows == found.number
                seen.append(found.number)

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for after in range(30):
            publish(storage, draft(*[f"data/{i}" for i in range(after + 1)]), after=after)
        done.set()
        reader.result()
    assert seen == sorted(seen)
    assert seen
