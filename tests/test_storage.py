"""Storage promises, on a disk and against a real HTTP S3 server."""

import http.server
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import s3fs

from qbatch.errors import ConfigError, ObjectExistsError, StorageError
from qbatch.storage import (
    Storage,
    object_info,
    open_object,
    probe,
    read_object,
    redact,
    split_uri,
)


def test_objects_round_trip_in_name_order(store_uri):
    storage = Storage(store_uri)
    names = ["b.txt", "a/x", "a.txt", "a/b/y", "a-1"]
    for name in names:
        storage.write(name, name.encode())
    listed = list(storage.iter_objects())
    assert [o.path for o in listed] == sorted(names)
    assert [o.size for o in listed] == [len(name) for name in sorted(names)]
    assert storage.read("a/b/y") == b"a/b/y"
    assert [o.path for o in storage.iter_objects("a")] == ["a/b/y", "a/x"]
    assert list(storage.iter_objects("absent")) == []


def test_listing_follows_every_page(s3_bucket):
    storage = Storage(s3_bucket)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.write(f"many/{i:05d}", b"x"), range(1100)))
    assert [o.path for o in storage.iter_objects("many")] == [f"many/{i:05d}" for i in range(1100)]


def test_version_changes_with_the_content(store_uri):
    storage = Storage(store_uri)
    storage.write("x", b"one")
    before = storage.info("x")
    storage.write("x", b"two")
    after = storage.info("x")
    assert before.version != after.version
    assert [o.version for o in storage.iter_objects()] == [after.version]
    assert object_info(after.uri).version == after.version


def test_objects_know_when_they_were_written(store_uri):
    storage = Storage(store_uri)
    before = time.time()
    storage.write("x", b"one")
    listed = next(storage.iter_objects()).modified
    assert before - 2 <= listed <= time.time() + 2  # S3 tells whole seconds
    assert storage.info("x").modified == pytest.approx(listed, abs=1)


def test_many_objects_go_in_one_call(store_uri):
    storage = Storage(store_uri)
    for i in range(5):
        storage.write(f"some/{i}", b"x")
    storage.delete_all(["some/0", "some/3", "some/absent", *(f"none/{i}" for i in range(1100))])
    storage.delete_all([])
    assert [o.path for o in storage.iter_objects()] == ["some/1", "some/2", "some/4"]


def test_a_listed_uri_can_be_opened_anywhere(store_uri):
    Storage(store_uri).write("deep/x", b"0123456789")
    listed = next(iter(Storage(store_uri).iter_objects()))
    with open_object(listed.uri) as file:
        file.seek(4)
        assert file.read(3) == b"456"


def test_create_never_replaces(store_uri):
    storage = Storage(store_uri)
    storage.create("x", b"first")
    with pytest.raises(ObjectExistsError, match="exists already"):
        storage.create("x", b"second")
    assert storage.read("x") == b"first"


def test_a_single_writer_does_not_replace_either(store_uri):
    storage = Storage(store_uri, single_writer=True)
    storage.create("x", b"first")
    with pytest.raises(ObjectExistsError, match="exists already"):
        storage.create("x", b"second")
    assert storage.read("x") == b"first"


def test_of_many_creators_one_wins(store_uri):
    def attempt(i: int) -> bool:
        try:
            Storage(store_uri).create("x", str(i).encode())
        except ObjectExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(attempt, range(24)))
    assert sum(wins) == 1
    assert Storage(store_uri).read("x") == str(wins.index(True)).encode()


def test_absent_objects_are_file_not_found(store_uri):
    storage = Storage(store_uri)
    with pytest.raises(FileNotFoundError, match="x"):
        storage.read("x")
    with pytest.raises(FileNotFoundError, match="x"):
        storage.info("x")
    storage.delete("x")


def test_half_written_local_files_are_not_listed(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("x", b"x")
    (tmp_path / ".y.0123abcd.tmp").write_bytes(b"half")
    assert [o.path for o in storage.iter_objects()] == ["x"]


def test_storage_travels_between_processes(store_uri):
    Storage(store_uri).write("x", b"x")
    storage = Storage(store_uri, single_writer=True)
    storage.read("x")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.read("x") == b"x"
    assert copy.single_writer


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://169.254.169.254/latest", "unknown storage scheme 'http'"),
        ("s3://key:secret@bucket/x", "credentials inside the URI"),
        ("s3://bucket/a/../b", "'..' inside the URI"),
        ("s3://", "names no bucket"),
    ],
)
def test_dangerous_uris_are_refused(uri, message):
    with pytest.raises(ConfigError, match=message) as caught:
        split_uri(uri)
    assert "secret" not in str(caught.value)


def test_redact_hides_the_password():
    assert redact("s3://user:pw@bucket/x") == "s3://***@bucket/x"


def test_probe_accepts_a_safe_store_and_leaves_nothing(store_uri):
    probe(Storage(store_uri))
    probe(Storage(store_uri, single_writer=True))
    assert list(Storage(store_uri).iter_objects()) == []


def test_probe_refuses_an_absent_bucket(s3_endpoint):
    with pytest.raises((StorageError, FileNotFoundError), match="bucket"):
        probe(Storage("s3://no-such-bucket-anywhere/x"))


class _PlainStore(http.server.BaseHTTPRequestHandler):
    """The least of an S3 API; ``conditional`` says how it meets If-None-Match."""

    conditional = "ignore"
    protocol_version = "HTTP/1.1"  # clients wait for "100 Continue" before they send a body

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        refused = self.conditional == "refuse" and self.headers.get("If-None-Match")
        error = b"<Error><Code>NotImplemented</Code></Error>"
        self._answer(501 if refused else 200, error if refused else b"")

    def do_GET(self):
        self._answer(200, b"<ListBucketResult></ListBucketResult>")

    def do_DELETE(self):
        self._answer(204, b"")

    def _answer(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def plain_store(request, monkeypatch):
    """A loopback server of ``_PlainStore``; clients made meanwhile talk to it and are forgotten."""
    handler = type("Handler", (_PlainStore,), {"conditional": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        s3fs.S3FileSystem.clear_instance_cache()
        yield "s3://bucket/x"
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()


@pytest.mark.parametrize(
    ("plain_store", "message"),
    [("ignore", "ignores conditional PUT"), ("refuse", "refuses conditional PUT")],
    indirect=["plain_store"],
)
def test_probe_refuses_a_store_without_conditional_put(plain_store, message):
    with pytest.raises(StorageError, match=message) as caught:
        probe(Storage(plain_store))
    assert "--single-writer" in str(caught.value)
    Storage(plain_store, single_writer=True).create("y", b"y")


def test_one_object_by_its_uri(store_uri):
    Storage(store_uri).write("a/b", b"content")
    assert read_object(f"{store_uri}/a/b") == b"content"
    assert object_info(f"{store_uri}/a/b").size == 7
    for absent in ("a", "a/c", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=rf"store/{absent}|specified key"):
            read_object(f"{store_uri}/{absent}")


def test_one_object_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "name").write_bytes(b"content")
    monkeypatch.chdir(tmp_path)
    assert read_object("name") == b"content"
    assert object_info("name").uri == str(tmp_path / "name")
    assert read_object(f"file://{tmp_path}/name") == b"content"
