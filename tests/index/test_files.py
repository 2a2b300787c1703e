"""Damaged index files end as typed errors, in a process of their own, before FAISS sees them."""

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from qbatch.errors import IntegrityError
from qbatch.index.files import check_header, read_index, write_index
from qbatch.index.training import train_template
from qbatch.storage import Storage
from tests.vector_tables import clustered

DIM, ROWS = 16, 2000


@pytest.fixture
def stored(store_uri):
    vectors = clustered(ROWS, DIM)
    index = train_template("IVF8,SQ8", "l2", vectors, seed=0)
    index.add(vectors)
    storage = Storage(store_uri)
    return storage, write_index(storage, "shards/abc", index), index


def test_an_index_comes_back_as_it_was(stored):
    storage, entry, index = stored
    again = read_index(storage, entry, dim=DIM, metric="l2")
    np.testing.assert_array_equal(faiss.serialize_index(again), faiss.serialize_index(index))
    assert entry["path"] == f"shards/abc-{entry['sha256'][:16]}.faiss"
    assert entry["rows"] == ROWS


def damaged(data: bytes, how: str) -> bytes:
    if how == "truncated":
        return data[: len(data) // 2]
    if how == "flipped byte":
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    if how == "foreign dim":
        return data[:4] + struct.pack("<i", DIM * 2) + data[8:]
    if how == "huge ntotal":
        return data[:8] + struct.pack("<q", 2**60) + data[16:]
    return b""


KINDS = ["truncated", "flipped byte", "foreign dim", "huge ntotal", "empty"]


@pytest.mark.parametrize("how", KINDS)
def test_damage_is_noticed_by_the_hash(stored, how, monkeypatch):
    storage, entry, _ = stored
    storage.write(entry["path"], damaged(storage.read(entry["path"]), how))
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("FAISS was given the file"))
    with pytest.raises(IntegrityError, match="damaged or replaced"):
        read_index(storage, entry, dim=DIM, metric="l2")


@pytest.mark.parametrize("how", ["foreign dim", "huge ntotal", "empty"])
def test_a_wrong_header_under_a_right_hash_is_not_given_to_faiss(stored, how, monkeypatch):
    storage, entry, _ = stored
    data = damaged(storage.read(entry["path"]), how)
    storage.write(entry["path"], data)
    forged = entry | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("FAISS was given the file"))
    with pytest.raises(IntegrityError, match=r"header of|too short"):
        read_index(storage, forged, dim=DIM, metric="l2")


def test_a_truncated_file_under_a_right_hash_is_a_typed_error(tmp_path):
    """FAISS is given this one: its header is right. It must not take the process with it."""
    vectors = clustered(ROWS, DIM)
    index = train_template("IVF8,SQ8", "l2", vectors, seed=0)
    index.add(vectors)
    data = faiss.serialize_index(index).tobytes()[:-1000]
    entry = {
        "path": "x.faiss",
        "rows": ROWS,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    Storage(str(tmp_path)).write("x.faiss", data)
    code = (
        "from qbatch.errors import IntegrityError\n"
        "from qbatch.index.files import read_index\n"
        "from qbatch.storage import Storage\n"
        f"try:\n    read_index(Storage({str(tmp_path)!r}), {entry!r}, dim={DIM}, metric='l2')\n"
        "except IntegrityError as error:\n    print('typed', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("typed FAISS cannot read")


def test_a_missing_file_says_so(stored):
    storage, entry, _ = stored
    storage.delete(entry["path"])
    with pytest.raises(IntegrityError, match="listed in a manifest but gone"):
        read_index(storage, entry, dim=DIM, metric="l2")


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "HNSW16", "IVF8,Flat", "RR16,IVF8,SQ8", "PQ4x4"]
)
@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_headers_of_all_kinds_are_understood(factory, metric):
    index = train_template(factory, metric, clustered(ROWS, DIM), seed=0)
    index.add(clustered(7, DIM))
    header = faiss.serialize_index(index).tobytes()[:37]
    check_header(header, "x", dim=DIM, ntotal=7, metric=metric)
    with pytest.raises(IntegrityError, match="8 vectors"):
        check_header(header, "x", dim=DIM, ntotal=8, metric=metric)
