"""Killed at any moment and run again, the embed job loses no row and repeats none."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from qbatch.storage import Storage
from qbatch.tables import open_vectors
from tests.processes import Job, wait_until

pytestmark = [pytest.mark.ray]

NUM_FILES, ROWS_PER_FILE = 40, 50


@pytest.fixture
def flags(tmp_path, tiny_model) -> dict[str, object]:
    corpus = Storage(str(tmp_path / "corpus"))
    for i in range(NUM_FILES):
        lines = [
            json.dumps({"doc_id": None, "text": f"row {j} of {i}"}) for j in range(ROWS_PER_FILE)
        ]
        lines[7] = "{broken"
        corpus.write(f"{i:03d}.jsonl", "\n".join(lines).encode())
    return {
        "input": corpus.uri,
        "output": str(tmp_path / "vectors"),
        "model": tiny_model,
        "dtype": "float32",
        "unit_bytes": 700,
        "max_bad_fraction": 0.05,
    }


def assert_whole(uri: str) -> None:
    """The one oracle: published (object, row) pairs are corpus minus rejects, once each."""
    table = open_vectors(uri)
    rows = table.to_table(["object_uri", "row", "passage_index"])
    seen = Counter(zip(*(column.to_pylist() for column in rows.columns), strict=True))
    assert set(seen.values()) == {1}
    rejects = table.rejects()
    rejected = set(zip(rejects["object_uri"].to_pylist(), rejects["row"].to_pylist(), strict=True))
    assert len(rejected) == len(rejects) == NUM_FILES
    corpus = Path(table.generation.config["input"])
    expected = Counter()
    for file in corpus.iterdir():
        offset = 0
        for line in file.read_bytes().splitlines(keepends=True):
            if (str(file), offset) not in rejected:
                expected[(str(file), offset, 0)] += 1
            offset += len(line)
    assert seen == expected


def num_finished(uri: str) -> int:
    return len(list(Path(uri, "data").glob("*.parquet"))) if Path(uri, "data").exists() else 0


def is_published(uri: str) -> bool:
    return Path(uri, "manifests").exists()


def kill_driver_repeatedly(flags, tmp_path, *, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    uri = str(flags["output"])
    for i in range(num_kills):
        job = Job("embed_corpus.py", flags, tmp_path / f"killed-{i}.log")
        done_before = num_finished(uri)
        if rng.random() < 0.7:
            target = done_before + rng.randrange(1, 8)
            wait_until(lambda target=target: num_finished(uri) >= target, job)
            time.sleep(rng.random() / 10)
        else:
            time.sleep(rng.uniform(0, 8))
        job.kill()
        if is_published(uri):
            assert_whole(uri)
    code, summary = Job("embed_corpus.py", flags, tmp_path / "last.log").wait()
    assert code == 0, (tmp_path / "last.log").read_text()
    assert summary["units_reused"] > 0
    assert summary["rows_in"] == NUM_FILES * ROWS_PER_FILE
    assert_whole(uri)


def test_killed_drivers_lose_and_repeat_nothing(flags, tmp_path):
    kill_driver_repeatedly(flags, tmp_path, num_kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_killed_drivers_lose_and_repeat_nothing(flags, tmp_path):
    kill_driver_repeatedly(flags, tmp_path, num_kills=10, seed=2)


def kill_actors(flags, tmp_path, *, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    job = Job("embed_corpus.py", flags, tmp_path / "actors.log")
    kills = 0
    while kills < num_kills and job.process.poll() is None:
        kills += job.kill_actor()
        time.sleep(rng.uniform(0.0, 1.0) if kills else 0.05)
    code, summary = job.wait()
    assert kills > 0
    if code:  # more deaths over one piece of work than the job allows: it says so and goes on
        assert "processes died over unit" in job.log()
        code, summary = Job("embed_corpus.py", flags, tmp_path / "again.log").wait()
    assert code == 0, job.log()[-3000:]
    assert summary["rows_in"] == NUM_FILES * ROWS_PER_FILE
    assert_whole(str(flags["output"]))


@pytest.mark.slow
def test_killed_actors_lose_and_repeat_nothing(flags, tmp_path):
    kill_actors(flags, tmp_path, num_kills=2, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_killed_actors_lose_and_repeat_nothing(flags, tmp_path):
    kill_actors(flags, tmp_path, num_kills=10, seed=4)


@pytest.mark.slow
def test_of_two_drivers_one_publishes_and_the_other_exits_5(flags, tmp_path):
    jobs = [Job("embed_corpus.py", flags, tmp_path / f"race-{i}.log") for i in range(2)]
    results = [job.wait() for job in jobs]
    assert sorted(code for code, _ in results) == [0, 5], [job.log()[-2000:] for job in jobs]
    loser = next(job for job, (code, _) in zip(jobs, results, strict=True) if code == 5)
    assert "was published by another writer" in loser.log()
    assert len(list(Path(str(flags["output"]), "manifests").iterdir())) == 1
    assert_whole(str(flags["output"]))
