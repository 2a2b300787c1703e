"""Killed anywhere and run again, an index is whole and equal, and no finished shard is remade."""

import random
import time
from pathlib import Path

import pytest

from qbatch.index.stored import stored_shards
from qbatch.storage import Storage
from qbatch.tables import open_table
from tests.processes import Job, wait_until
from tests.vector_tables import clustered, rows_table, split_files, write_vectors

pytestmark = [pytest.mark.ray]

ROWS, DIM, SHARDS = 40_000, 64, 6


@pytest.fixture(scope="module")
def vectors_uri(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("vectors"))
    table = rows_table(clustered(ROWS, DIM), [f"d{i}" for i in range(ROWS)])
    write_vectors(uri, split_files(table, 24))
    return uri


def flags_for(vectors_uri: str, output: object) -> dict[str, object]:
    return {
        "vectors": vectors_uri,
        "output": output,
        "factory": "IVF64,Flat",
        "num_shards": SHARDS,
        "num_probes": 400,
        "target_recall": 0.5,
    }


@pytest.fixture(scope="module")
def undisturbed_uri(vectors_uri, tmp_path_factory) -> str:
    """An index that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, summary = Job("build_index.py", flags_for(vectors_uri, folder), folder / "log").wait()
    assert code == 0, (folder / "log").read_text()
    assert summary["shards_made"] == SHARDS
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(undisturbed_uri) -> list[str]:
    """Hashes of its shards."""
    return hashes(undisturbed_uri)


def hashes(uri: str) -> list[str]:
    """Return the hash of every published shard, after checking that all files are there."""
    table = open_table(uri)
    shards = stored_shards(table.storage, table.generation)
    assert sum(shard.rows for shard in shards) == table.generation.counts["ntotal"] == ROWS
    for entry in table.generation.files.to_pylist():
        assert table.storage.info(entry["path"]).size == entry["bytes"]
    return [shard.index["sha256"] for shard in shards]


def num_stored(uri: str, directory: str) -> int:
    return sum(1 for _ in Storage(uri).iter_objects(directory))


@pytest.mark.parametrize(
    ("stage", "directory", "number"),
    [("training", "probes", 1), ("adding", "ids", 2), ("measuring", "ids", SHARDS)],
)
@pytest.mark.slow
def test_a_killed_build_goes_on(vectors_uri, undisturbed, tmp_path, stage, directory, number):
    uri = str(tmp_path / "index")
    flags = flags_for(vectors_uri, uri)
    job = Job("build_index.py", flags, tmp_path / "killed.log")
    wait_until(lambda: num_stored(uri, directory) >= number, job)
    job.kill()
    finished = num_stored(uri, "ids")
    assert stage != "training" or finished == 0
    assert finished >= (0 if stage == "training" else number)
    code, summary = Job("build_index.py", flags, tmp_path / "again.log").wait()
    assert code == 0, (tmp_path / "again.log").read_text()
    assert summary["shards_reused"] >= finished
    assert hashes(uri) == undisturbed


def kill_often(vectors_uri, undisturbed, tmp_path, *, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    uri = str(tmp_path / "index")
    flags = flags_for(vectors_uri, uri)
    for i in range(num_kills):
        job = Job("build_index.py", flags, tmp_path / f"killed-{i}.log")
        time.sleep(rng.uniform(0, 12))
        job.kill()
    code, _ = Job("build_index.py", flags, tmp_path / "last.log").wait()
    assert code == 0, (tmp_path / "last.log").read_text()
    assert hashes(uri) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_build_killed_at_random_moments_goes_on(vectors_uri, undisturbed, tmp_path):
    kill_often(vectors_uri, undisturbed, tmp_path, num_kills=10, seed=1)


@pytest.mark.slow
def test_killed_builders_are_replaced(vectors_uri, undisturbed, tmp_path):
    uri = str(tmp_path / "index")
    job = Job("build_index.py", flags_for(vectors_uri, uri), tmp_path / "log")
    kills = 0
    while kills < 2 and job.process.poll() is None:
        kills += job.kill_worker("ray::build_shard")
        time.sleep(0.05)
    code, _ = job.wait()
    assert kills > 0
    assert code == 0, job.log()[-3000:]
    assert hashes(uri) == undisturbed


@pytest.mark.slow
def test_of_two_builds_one_publishes_and_the_other_exits_5(vectors_uri, undisturbed, tmp_path):
    uri = str(tmp_path / "index")
    flags = flags_for(vectors_uri, uri)
    jobs = [Job("build_index.py", flags, tmp_path / f"race-{i}.log") for i in range(2)]
    codes = sorted(job.wait()[0] for job in jobs)
    assert codes in ([0, 5], [0, 0]), [job.log()[-2000:] for job in jobs]  # the second finds it
    assert len(list(Path(uri, "manifests").iterdir())) == 1
    assert hashes(uri) == undisturbed


NUM_QUERIES = 12_000


@pytest.fixture
def search_flags(undisturbed_uri, tmp_path) -> dict[str, object]:
    queries = str(tmp_path / "queries")
    table = rows_table(clustered(NUM_QUERIES, DIM, seed=1), [f"q{i}" for i in range(NUM_QUERIES)])
    write_vectors(queries, split_files(table, 12))
    return {"index": undisturbed_uri, "queries": queries, "output": tmp_path / "run"}


def run_rows(uri: str) -> list[tuple]:
    table = open_table(uri).to_table().sort_by([("query_id", "ascending"), ("rank", "ascending")])
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


@pytest.mark.slow
def test_a_killed_search_answers_every_query_once(search_flags, tmp_path):
    flags, uri = search_flags, str(search_flags["output"])
    job = Job("search_index.py", flags, tmp_path / "killed.log")
    wait_until(lambda: num_stored(uri, "data") >= 3, job)
    job.kill()
    finished = {o.path for o in Storage(uri).iter_objects("data")}
    assert finished
    job = Job("search_index.py", flags, tmp_path / "again.log")
    while not job.kill_worker("ray::SearchActor") and job.process.poll() is None:
        time.sleep(0.05)
    code, summary = job.wait()
    assert code == 0, job.log()[-3000:]
    assert (summary["queries"], summary["rows"]) == (NUM_QUERIES, 10 * NUM_QUERIES)
    assert finished <= {o.path for o in Storage(uri).iter_objects("data")}
    rows = run_rows(uri)
    assert len({(row[0], row[3]) for row in rows}) == len(rows) == 10 * NUM_QUERIES
    undisturbed = flags | {"output": tmp_path / "undisturbed"}
    assert Job("search_index.py", undisturbed, tmp_path / "other.log").wait()[0] == 0
    assert run_rows(str(undisturbed["output"])) == rows
