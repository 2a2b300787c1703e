"""Sizing the pool, and scheduling on declared GPUs with the processor doing the work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines import cluster
from qbatch.pipelines.cluster import plan_pool
from qbatch.schema import vector_matrix
from qbatch.tables import open_vectors
from tests.processes import ROOT


@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        ({"CPU": 1}, (None, None, None), (1, 1, 0, 1)),
        ({"CPU": 2}, (None, None, None), (1, 1, 0, 2)),
        ({"CPU": 64}, (None, None, None), (1, 8, 0, 8)),
        ({"CPU": 64}, (2, 4, None), (2, 4, 0, 16)),
        ({"CPU": 128, "GPU": 8}, (None, None, None), (1, 8, 1, 16)),
        ({"CPU": 128, "GPU": 8}, (None, None, 0.5), (1, 16, 0.5, 8)),
        ({"CPU": 128, "GPU": 8}, (None, 4, None), (1, 4, 1, 32)),
        ({"CPU": 128, "GPU": 8}, (None, None, 0.0), (1, 16, 0, 8)),
        ({"CPU": 2, "GPU": 2}, (2, 2, None), (2, 2, 1, 1)),
    ],
)
def test_the_pool_fits_the_cluster(monkeypatch, resources, asked, expected):
    monkeypatch.setattr(cluster, "cluster_resources", lambda: resources)
    monkeypatch.setattr(cluster, "most_node_cpus", lambda: int(resources["CPU"]))
    pool = plan_pool(*asked)
    got = (pool.min_actors, pool.max_actors, pool.gpus_per_actor, pool.threads_per_actor)
    assert got == expected
    assert pool.max_actors * pool.cpus_per_actor <= resources["CPU"] / 2
    assert resources["CPU"] - pool.max_actors * pool.cpus_per_actor >= 1  # a reader fits beside


@pytest.mark.parametrize(
    ("num_nodes", "node_cpus", "asked"),
    [(3, 1, (None, None, None)), (16, 2, (None, None, None)), (8, 4, (1, 2, None))],
)
def test_no_actor_books_more_than_a_node_has(monkeypatch, num_nodes, node_cpus, asked):
    """It could be placed nowhere, and the job would wait for it until it ends as stalled."""
    monkeypatch.setattr(cluster, "cluster_resources", lambda: {"CPU": num_nodes * node_cpus})
    monkeypatch.setattr(cluster, "most_node_cpus", lambda: node_cpus)
    pool = plan_pool(*asked)
    assert pool.cpus_per_actor == node_cpus
    assert pool.threads_per_actor == node_cpus


@pytest.mark.parametrize("node_cpus", [1, 2, 3])
@pytest.mark.parametrize("num_actors", [1, 2, 4])
def test_a_reader_fits_wherever_the_actors_went(monkeypatch, node_cpus, num_actors):
    nodes = 2
    monkeypatch.setattr(cluster, "cluster_resources", lambda: {"CPU": nodes * node_cpus})
    monkeypatch.setattr(cluster, "most_node_cpus", lambda: node_cpus)
    pool = plan_pool(num_actors, num_actors, None)
    placed = 0
    for on_first in range(num_actors + 1):
        left = [node_cpus - n * pool.cpus_per_actor for n in (on_first, num_actors - on_first)]
        if min(left) >= 0:
            placed += 1
            assert max(left) >= pool.cpus_per_task > 0
    assert placed


ON_DECLARED_GPUS = """
import json, sys, threading
import ray
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus

ray.init(address="local", num_cpus=2, num_gpus=2, object_store_memory=2**28)
free, done = [], threading.Event()
def watch():
    while not done.wait(0.05):
        free.append(ray.available_resources().get("GPU", 0.0))
watcher = threading.Thread(target=watch)
watcher.start()
summary = embed_corpus(EmbedCorpusConfig(**json.loads(sys.argv[1])))
done.set(); watcher.join()
print(json.dumps({"fewest_free": min(free), "summary": summary}))
"""


ON_SMALL_NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus

node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 2**27}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
ray.init(address=cluster.address)
print(json.dumps(embed_corpus(EmbedCorpusConfig(**json.loads(sys.argv[1])))), flush=True)
ray.shutdown()
cluster.shutdown()
"""


def run_script(script: str, config: dict[str, object]) -> dict:
    """Run a script in a process of its own; return what its last line says."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(config)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def small_job(folder: Path, model: str) -> dict[str, object]:
    """Write a corpus of 160 documents; return the job that embeds it by two actors."""
    for i in range(8):
        (folder / f"{i}.jsonl").write_text(f'{{"doc_id": "{i}", "text": "text {i}"}}\n' * 20)
    return {
        "input": str(folder / "*.jsonl"),
        "output": str(folder / "out"),
        "model": model,
        "dtype": "float32",
        "min_actors": 2,
        "unit_bytes": 700,
    }


@pytest.mark.ray
@pytest.mark.slow
def test_two_actors_leave_room_on_two_nodes_of_one_processor(tiny_model, tmp_path):
    config = small_job(tmp_path, tiny_model) | {"max_actors": 2, "stall_timeout_s": 60}
    assert run_script(ON_SMALL_NODES, config)["passages"] == 160


@pytest.mark.ray
@pytest.mark.slow
def test_two_actors_hold_one_declared_gpu_each(tiny_model, tmp_path):
    result = run_script(ON_DECLARED_GPUS, small_job(tmp_path, tiny_model))
    assert result["fewest_free"] == 0
    assert result["summary"]["passages"] == 160
    table = open_vectors(str(tmp_path / "out")).to_table(["doc_id", "vector"])
    texts = [f"text {doc_id}" for doc_id in table["doc_id"].to_pylist()]
    tokens = TextTokenizer.load(Path(tiny_model)).encode(texts)
    expected = EmbedderConfig(model_path=Path(tiny_model), dtype="float32").build()
    np.testing.assert_allclose(
        vector_matrix(table["vector"]), expected.embed(tokens.ids, tokens.lengths), atol=1e-5
    )
