"""The index job in this process, against a local Ray, a disk and a real S3 server."""

import json
from dataclasses import replace

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from qbatch.errors import ConfigError, NoInputError, QualityGateError
from qbatch.index.stored import stored_shards
from qbatch.manifest import latest_generation
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.storage import Storage
from qbatch.tables import open_table, open_vectors
from tests.vector_tables import FINGERPRINT, clustered, rows_table, split_files, write_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROWS, DIM, FILES = 3000, 32, 12
VECTORS = clustered(ROWS, DIM)
DOC_IDS = [f"d{i}" for i in range(ROWS)]


def write_table(uri: str) -> dict:
    files = split_files(rows_table(VECTORS, DOC_IDS, {"lang": ["en", "de"] * (ROWS // 2)}), FILES)
    write_vectors(uri, files)
    return files


@pytest.fixture
def config(store_uri) -> BuildIndexConfig:
    write_table(f"{store_uri}/vectors")
    return config_for(store_uri)


@pytest.fixture
def disk_config(tmp_path) -> BuildIndexConfig:
    write_table(f"{tmp_path}/vectors")
    return config_for(str(tmp_path))


def config_for(uri: str) -> BuildIndexConfig:
    return BuildIndexConfig(
        vectors=f"{uri}/vectors",
        output=f"{uri}/index",
        factory="IVF16,Flat",
        num_shards=4,
        num_probes=100,
    )


def rows_of_shards(uri: str) -> dict[str, np.ndarray]:
    """Return every stored vector by document, read with FAISS and the sidecars alone."""
    table = open_table(uri)
    found = {}
    for shard in stored_shards(table.storage, table.generation):
        index = faiss.deserialize_index(
            np.frombuffer(table.storage.read(shard.index["path"]), np.uint8)
        )
        index.make_direct_map()
        ids = table.read_file(shard.ids)["doc_id"].to_pylist()
        assert index.ntotal == len(ids) == shard.rows
        found |= dict(zip(ids, index.reconstruct_n(0, index.ntotal), strict=True))
    return found


def test_every_vector_is_indexed_once_and_a_second_run_makes_nothing(config):
    summary = build_index(config)
    assert summary["generation"] == 1
    assert (summary["ntotal"], summary["factory"]) == (ROWS, "IVF16,Flat")
    assert (summary["num_shards"], summary["shards_made"], summary["shards_reused"]) == (4, 4, 0)
    assert set(summary["recall"]) == {"1", "10", "100"}
    assert summary["recall"]["10"] >= 0.95
    assert set(summary["seconds"]) == {"train", "build", "measure", "total"}
    stored = rows_of_shards(config.output)
    assert stored.keys() == set(DOC_IDS)
    for i in (0, 17, ROWS - 1):
        np.testing.assert_allclose(stored[f"d{i}"], VECTORS[i], atol=1e-6)
    report = json.loads(Storage(config.output).read("report.json"))
    assert report["details"]["curve"][0]["effort"] == 1
    assert sum(shard["rows"] for shard in report["details"]["shards"]) == ROWS
    assert b"Recall against time" in Storage(config.output).read("report.html")

    again = build_index(config)
    assert (again["generation"], again["shards_made"], again["shards_reused"]) == (1, 0, 4)


def test_the_manifest_says_what_readers_need(disk_config):
    build_index(disk_config)
    generation = open_table(disk_config.output).generation
    assert generation.kind == "index"
    assert generation.fingerprint["embedding"]["weights_sha256"] == "w"
    assert generation.fingerprint["metric"] == "l2"
    template = generation.details["training"]["template"]
    assert generation.fingerprint["template_sha256"] == template["sha256"]
    assert set(generation.details["search"]) == {"nprobe"}
    assert generation.details["recall"]["10"]["low"] <= generation.details["recall"]["10"]["mean"]
    assert len(generation.details["recall_by_shard"]) == 4
    shards = stored_shards(Storage(disk_config.output), generation)
    assert [s.row_base for s in shards] == np.cumsum([0, *(s.rows for s in shards)])[:-1].tolist()
    listed = set(generation.files["path"].to_pylist())
    assert {s.index["path"] for s in shards} | {s.ids["path"] for s in shards} < listed


def test_measured_recall_is_the_recall_of_the_whole_index(disk_config):
    """The gate's number against a plain search of all shards for all probes."""
    summary = build_index(replace(disk_config, target_recall=0.9))
    table = open_table(disk_config.output)
    details = table.generation.details
    probes = table.read_file(details["training"]["probes"])
    queries = np.stack(probes["vector"].to_numpy())
    own = [int(name[1:]) for name in probes["doc_id"].to_pylist()]
    truth = np.argsort(-(queries @ VECTORS.T), axis=1, kind="stable")
    found = []
    for shard in stored_shards(table.storage, table.generation):
        index = faiss.read_index(f"{disk_config.output}/{shard.index['path']}")
        ids = table.read_file(shard.ids)["doc_id"].to_pylist()
        index.nprobe = details["search"]["nprobe"]
        distances, rows = index.search(queries, 20)
        found.append((distances, np.array([[int(ids[r][1:]) for r in line] for line in rows])))
    distances = np.concatenate([d for d, _ in found], axis=1)
    rows = np.take_along_axis(
        np.concatenate([r for _, r in found], axis=1), np.argsort(distances, axis=1), 1
    )
    hits = [
        len(set(without(line, me)[:10]) & set(without(best, me)[:10]))
        for line, best, me in zip(rows, truth, own, strict=True)
    ]
    assert summary["recall"]["10"] == pytest.approx(np.mean(hits[1::2]) / 10, abs=1e-4)


def without(rows: np.ndarray, own: int) -> list[int]:
    return [row for row in rows.tolist() if row != own]


def test_a_changed_object_remakes_one_shard(disk_config):
    files = write_table(f"{disk_config.vectors}")
    build_index(disk_config)
    before = {s.number: s.index for s in shards_of(disk_config)}
    files["005.jsonl"] = rows_table(
        clustered(200, DIM, seed=5), [f"n{i}" for i in range(200)], {"lang": ["fr"] * 200}
    )
    write_vectors(disk_config.vectors, files)
    summary = build_index(disk_config)
    assert (summary["generation"], summary["shards_made"], summary["shards_reused"]) == (2, 1, 3)
    after = {s.number: s.index for s in shards_of(disk_config)}
    assert sum(before[number] != after[number] for number in before) == 1
    assert len(rows_of_shards(disk_config.output)) == ROWS - ROWS // FILES + 200


def shards_of(config: BuildIndexConfig) -> list:
    table = open_table(config.output)
    return stored_shards(table.storage, table.generation)


def test_deleted_shards_are_remade_exactly(disk_config):
    build_index(disk_config)
    storage = Storage(disk_config.output)
    victim = shards_of(disk_config)[2]
    paths = [o.path for o in storage.iter_objects("shards")]
    storage.delete(victim.ids["path"])
    for o in list(storage.iter_objects("manifests")):
        storage.delete(o.path)  # as if the job had died before publishing
    summary = build_index(disk_config)
    assert (summary["shards_made"], summary["shards_reused"]) == (1, 3)
    assert [o.path for o in storage.iter_objects("shards")] == paths


def test_a_damaged_unpublished_shard_is_remade(disk_config, caplog):
    build_index(disk_config)
    storage = Storage(disk_config.output)
    victim = shards_of(disk_config)[1].index["path"]
    storage.write(victim, storage.read(victim)[:-5])
    for o in list(storage.iter_objects("manifests")):
        storage.delete(o.path)
    assert build_index(disk_config)["shards_made"] == 1
    assert len(rows_of_shards(disk_config.output)) == ROWS


def test_auto_says_why_and_few_vectors_are_exact(disk_config):
    summary = build_index(replace(disk_config, factory="auto", num_shards=None))
    assert (summary["factory"], summary["num_shards"]) == ("Flat", 1)
    assert "exact" in summary["reason"]
    assert summary["recall"] == {"1": 1.0, "10": 1.0, "100": 1.0}
    assert summary["search"] == {}


def test_too_little_recall_publishes_nothing_but_keeps_the_work(disk_config):
    config = replace(disk_config, factory="IVF16,PQ4x4", target_recall=0.99)
    with pytest.raises(QualityGateError, match=r"below --target-recall=0\.99"):
        build_index(config)
    assert latest_generation(Storage(config.output)) is None
    summary = build_index(replace(config, target_recall=0.05))
    assert summary["generation"] == 1


def test_impossible_plans_are_refused_before_work(disk_config):
    with pytest.raises(ConfigError, match=r"the index needs .* --memory-budget-gib allows 0\.00"):
        build_index(replace(disk_config, memory_budget_gib=1e-4))
    with pytest.raises(ConfigError, match="refused: training its rotation"):
        build_index(replace(disk_config, factory="OPQ8,IVF16,PQ8"))
    with pytest.raises(ConfigError, match=r"has 1048576 lists, but there are only 3000"):
        build_index(replace(disk_config, factory="IVF1048576,Flat"))
    with pytest.raises(ConfigError, match="no column of 7 components"):
        build_index(replace(disk_config, dim=7))
    assert latest_generation(Storage(disk_config.output)) is None


def test_a_missing_or_empty_table_is_no_input(tmp_path):
    with pytest.raises(NoInputError, match="no published generation"):
        build_index(config_for(str(tmp_path)))
    write_vectors(f"{tmp_path}/vectors", {"a": rows_table(VECTORS, DOC_IDS).slice(0, 0)})
    with pytest.raises(NoInputError, match="no vectors in"):
        build_index(config_for(str(tmp_path)))


def test_another_embedding_makes_another_index(disk_config):
    build_index(disk_config)
    files = split_files(rows_table(VECTORS, DOC_IDS, {"lang": ["en"] * ROWS}), FILES)
    other = FINGERPRINT | {"dims": [DIM], "weights_sha256": "other"}
    write_vectors(disk_config.vectors, files, fingerprint=other)
    summary = build_index(disk_config)
    assert (summary["generation"], summary["shards_reused"]) == (2, 0)


def test_a_dry_run_plans_and_writes_nothing(disk_config):
    plan = build_index(replace(disk_config, dry_run=True, factory="auto"))
    assert plan["factory"] == "Flat"
    assert plan["ntotal"] == ROWS
    assert plan["index_gib"] < plan["shard_task_gib"]
    assert list(Storage(disk_config.output).iter_objects()) == []


def test_anyone_can_read_a_shard_with_faiss_and_parquet(disk_config):
    """The five lines of README."""
    build_index(disk_config)
    root = disk_config.output
    shard = shards_of(disk_config)[0]
    index = faiss.read_index(f"{root}/{shard.index['path']}")
    ids = pq.read_table(f"{root}/{shard.ids['path']}")
    _, rows = index.search(VECTORS[:3], 5)
    assert len(ids["doc_id"].take(rows[0])) == 5
    assert open_vectors(disk_config.vectors).num_rows == ROWS
