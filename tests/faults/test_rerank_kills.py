"""Killed at any moment and run again, the rerank job ranks every (query, document) once."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from qbatch.tables import open_table
from tests.candidate_tables import Candidates, make_candidates, write_run
from tests.processes import Job, wait_until

pytestmark = [pytest.mark.ray]

SCRIPT = "rerank_candidates.py"


def make_flags(path: Path, made: Candidates, model: str, **settings: object) -> dict[str, object]:
    inputs = write_run(str(path), made, num_files=5)
    defaults = {"dtype": "float32", "unit_pairs": 40, "num_partitions": 8, "top_k": 15}
    return {**inputs, "output": str(path / "out"), "model": model, **(defaults | settings)}


def assert_whole(uri: str, made: Candidates, top_k: int) -> None:
    """The one oracle: each query's pairs are candidates of its, once each, best first."""
    table = open_table(uri)
    rows = table.to_table().to_pylist()
    pairs = Counter((row["query_id"], row["doc_id"]) for row in rows)
    assert set(pairs.values()) == {1}
    assert pairs.keys() <= {(q, d) for q, d, _, _ in made.rows}
    ranks: dict[str, list[int]] = {}
    for row in rows:
        ranks.setdefault(row["query_id"], []).append(row["rank"])
    sizes = Counter(q for q, _, _, _ in made.rows)
    assert ranks == {q: list(range(1, min(n, top_k) + 1)) for q, n in sizes.items()}
    counts = table.generation.counts
    assert counts["pairs"] == len(made.rows)
    assert counts["ranked"] + counts["dropped"].get("top_k", 0) == len(made.rows)


def objects(uri: str, directory: str) -> int:
    return len([p for p in Path(uri, directory).rglob("*") if p.is_file()])


def kill_drivers(flags: dict, made: Candidates, tmp_path: Path, *, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    uri = str(flags["output"])
    for i in range(kills):
        job = Job(SCRIPT, flags, tmp_path / f"killed-{i}.log")
        directory = rng.choice(["join/documents", "join/units", "data"]) if i else "data"
        target = objects(uri, directory) + rng.randrange(1, 4)
        wait_until(lambda d=directory, t=target: objects(uri, d) >= t, job)
        time.sleep(rng.random() / 10)
        job.kill()
        if Path(uri, "manifests").exists():
            assert_whole(uri, made, int(flags["top_k"]))
    last = Job(SCRIPT, flags, tmp_path / "last.log")
    code, summary = last.wait()
    assert code == 0, last.log()[-3000:]
    assert summary["units_reused"] > 0
    assert_whole(uri, made, int(flags["top_k"]))


def kill_actors(flags: dict, made: Candidates, tmp_path: Path, *, kills: int) -> None:
    job = Job(SCRIPT, flags, tmp_path / "actors.log")
    killed = 0
    while killed < kills and job.process.poll() is None:
        killed += job.kill_actor("RerankActor")
        time.sleep(1.0 if killed else 0.02)
    code, summary = job.wait()
    assert killed > 0
    if code:  # more deaths over one piece of work than the job allows: it says so and goes on
        assert "processes died over unit" in job.log()
        code, summary = Job(SCRIPT, flags, tmp_path / "again.log").wait()
    assert code == 0, job.log()[-3000:]
    assert summary["pairs"] == len(made.rows)
    assert_whole(str(flags["output"]), made, int(flags["top_k"]))


@pytest.fixture(scope="module")
def made() -> Candidates:
    return make_candidates(num_queries=100, num_candidates=20, num_documents=400)


@pytest.mark.slow
def test_a_killed_driver_loses_and_repeats_nothing(tmp_path, tiny_reranker, made):
    kill_drivers(make_flags(tmp_path, made, tiny_reranker), made, tmp_path, kills=1, seed=1)


@pytest.mark.slow
def test_a_killed_actor_loses_and_repeats_nothing(tmp_path, tiny_reranker, made):
    kill_actors(make_flags(tmp_path, made, tiny_reranker), made, tmp_path, kills=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_thousand_pairs_survive_kills(tmp_path, tiny_reranker):
    made = make_candidates(num_queries=2000, num_candidates=100, num_documents=5000)
    flags = make_flags(tmp_path, made, tiny_reranker, unit_pairs=1024, top_k=100)
    kill_drivers(flags, made, tmp_path, kills=6, seed=2)
    again = {**flags, "output": str(tmp_path / "actors")}
    kill_actors(again, made, tmp_path, kills=4)


@pytest.mark.slow
def test_of_two_drivers_one_publishes_and_the_other_exits_5(tmp_path, tiny_reranker, made):
    flags = make_flags(tmp_path, made, tiny_reranker, unit_pairs=400)
    jobs = [Job(SCRIPT, flags, tmp_path / f"race-{i}.log") for i in range(2)]
    results = [job.wait() for job in jobs]
    assert sorted(code for code, _ in results) == [0, 5], [job.log()[-2000:] for job in jobs]
    loser = next(job for job, (code, _) in zip(jobs, results, strict=True) if code == 5)
    assert "was published by another writer" in loser.log()
    assert len(list(Path(str(flags["output"]), "manifests").iterdir())) == 1
    assert_whole(str(flags["output"]), made, int(flags["top_k"]))
