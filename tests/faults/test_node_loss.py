"""A night on three nodes goes on when one of them is lost, and loses and doubles no document."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbatch.release import open_release
from qbatch.storage import Storage
from tests.nights import Corpus, indexed_documents, lists_of, write_queries
from tests.processes import ROOT, Job, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_FILES, PER_FILE, QUERIES = 30, 40, 12


class Nodes:
    """The process that holds the cluster. Jobs join its head, which is the node that stays."""

    def __init__(self, folder: str, log: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.three_nodes"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
        )
        self.address = self.process.stdout.readline().strip()
        assert self.address, log.read_text()[-3000:]

    def lose_one(self, title: str) -> None:
        """Kill a node, one that runs a process of this title if it is not the head."""
        self.process.stdin.write(f"{title}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "lost\n"


@pytest.fixture
def nodes(tmp_path) -> Iterator[Nodes]:
    """Three nodes, not in pytest's folder: its name is too long for their sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        started = Nodes(folder, tmp_path / "nodes.log")
        yield started
        started.process.communicate(timeout=120)


def start_night(uri: str, model: str, address: str) -> Job:
    flags = {
        "output": f"{uri}/night",
        "embed.input": f"{uri}/corpus",
        "embed.model": model,
        "embed.dtype": "float32",
        "embed.unit_bytes": 700,
        "index.factory": "Flat",
        "index.num_shards": 3,
        "index.num_probes": 50,
        "answers.queries": f"{uri}/queries.jsonl",
        "answers.num_partitions": 2,
    }
    return Job("reindex.py", flags, Path(uri, "night.log"), ray_address=address)


def has_files(uri: str, folder: str) -> bool:
    return any(f"/{folder}/" in f"/{listed.path}" for listed in Storage(uri).iter_objects())


@pytest.mark.parametrize(
    ("folder", "title"),
    [("vectors/data", "ray::MapWorker(MapBatches(EmbedActor))"), ("shards", "ray::build_shard")],
)
def test_a_lost_node_costs_no_document(nodes, tiny_model, tmp_path, folder, title):
    """Lost while the corpus is embedded, and while the index is built."""
    uri = str(tmp_path)
    corpus = Corpus(f"{uri}/corpus", NUM_FILES, PER_FILE)
    corpus.write()
    write_queries(f"{uri}/queries.jsonl", QUERIES)
    job = start_night(uri, tiny_model, nodes.address)
    try:
        assert wait_until(lambda: has_files(f"{uri}/night", folder), job), job.log()[-3000:]
        nodes.lose_one(title)
        assert job.process.poll() is None, "the night was over before the node was lost"
        code, summary = job.wait(600)
    finally:
        if job.process.poll() is None:
            job.kill()
    assert code == 0, job.log()[-3000:]
    assert summary["released"]

    release = open_release(f"{uri}/night")
    ids = release.open("vectors").to_table(["doc_id"])["doc_id"].to_pylist()
    assert sorted(ids) == sorted(corpus.documents)
    assert sorted(indexed_documents(release)) == sorted(corpus.documents)
    assert lists_of(release.open("answers")).keys() == {f"q{i}" for i in range(QUERIES)}
