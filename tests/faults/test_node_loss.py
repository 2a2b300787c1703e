"""A night on three nodes goes on when one of them is lost, and loses and doubles no document."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from qbatch.release import open_release
from qbatch.storage import Storage
from tests.nights import Corpus, indexed_documents, lists_of, write_queries
from tests.processes import Job, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_FILES, PER_FILE, QUERIES = 30, 40, 12


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Cluster]:
    """Three nodes of one processor each, on this machine, with a folder of their own.

    Not in pytest's folder: its name is too long for the sockets of a node. Drivers connect to the
    first node, the head, which is the one that stays.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        small = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 2**27}
        nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        try:
            for _ in range(2):
                nodes.add_node(**small)
            yield nodes
        finally:
            nodes.shutdown()


def raylet_of(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(parent: int) -> list[int]:
    """Return the processes that a raylet started: its workers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if parent_of(int(process.name)) == parent:
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def runs(node, title: str) -> bool:
    """Tell whether a process of this title runs on a node."""
    for pid in children_of(raylet_of(node)):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def lose(cluster: Cluster, node) -> None:
    """Kill all of a node at once, as when its machine is gone."""
    workers = children_of(raylet_of(node))
    os.kill(raylet_of(node), signal.SIGKILL)
    for pid in workers:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cluster.remove_node(node, allow_graceful=False)


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


def files_in(uri: str, folder: str) -> int:
    return sum(f"/{folder}/" in f"/{listed.path}" for listed in Storage(uri).iter_objects())


@pytest.mark.parametrize("folder", ["data", "shards"])
def test_a_lost_node_costs_no_document(cluster, tiny_model, tmp_path, folder):
    """Lost while the corpus is embedded, and while the index is built."""
    uri = str(tmp_path)
    corpus = Corpus(f"{uri}/corpus", NUM_FILES, PER_FILE)
    corpus.write()
    write_queries(f"{uri}/queries.jsonl", QUERIES)
    job = start_night(uri, tiny_model, cluster.address)
    assert wait_until(lambda: files_in(f"{uri}/night", folder), job), job.log()[-3000:]
    victims = sorted(cluster.worker_nodes, key=lambda node: runs(node, "ray::MapWorker"))
    lose(cluster, victims[-1])  # the one that computes, unless the head does
    assert job.process.poll() is None, "the night was over before the node was lost"
    code, summary = job.wait(600)
    assert code == 0, job.log()[-3000:]
    assert summary["released"]
    assert len(cluster.list_all_nodes()) == 2

    release = open_release(f"{uri}/night")
    ids = release.open("vectors").to_table(["doc_id"])["doc_id"].to_pylist()
    assert sorted(ids) == sorted(corpus.documents)
    assert summary["index"]["ntotal"] == len(corpus.documents)
    assert sorted(indexed_documents(release)) == sorted(corpus.documents)
    assert lists_of(release.open("answers")).keys() == {f"q{i}" for i in range(QUERIES)}
