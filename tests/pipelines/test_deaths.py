"""Rows that kill or hang their process, on a real Ray: they are found, and all else is made."""

import json

import pyarrow as pa
import pytest

from qbatch.errors import QbatchError
from qbatch.pipelines.cluster import PoolPlan, ray_session
from qbatch.pipelines.deaths import DeathRecord
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.rerank import RerankCandidatesConfig, rerank_candidates
from qbatch.pipelines.unit_stream import Stages, run_stages
from qbatch.tables import open_table, open_vectors
from tests.candidate_tables import make_candidates, write_lines, write_run
from tests.deadly_actors import DEADLY, DeadlyEmbedActor, DeadlyRerankActor
from tests.deadly_stages import (
    HANGS,
    KILLS,
    KILLS_READER,
    UNIT_ROWS,
    Doubler,
    Mortal,
    read,
    read_carefully,
    write,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

POOL = PoolPlan(
    min_actors=1,
    max_actors=1,
    gpus_per_actor=0.0,
    cpus_per_actor=0.5,
    threads_per_actor=1,
    cpus_per_task=1.0,
)


def run(
    units: list[list[int]], units_a_block: int, stall_timeout_s: float = 40.0, **stages: object
) -> dict[str, dict]:
    """Return what is told of each unit; a row that hangs for an eighth of the limit is found."""
    keys = [f"unit-{i}" for i in range(len(units))]
    plan = pa.table({"unit_key": keys, "spans": [json.dumps(unit) for unit in units]})
    blocks = [plan.slice(i, units_a_block) for i in range(0, len(plan), units_a_block)]
    settings = {"read": read, "read_carefully": read_carefully, "actor": Doubler}
    settings |= {"actor_arguments": {}, "write": write}
    with ray_session(stall_timeout_s=stall_timeout_s):
        told = list(run_stages(blocks, Stages(**settings | stages), POOL))
    assert len(told) == len({row["unit_key"] for row in told})
    return {row["unit_key"]: row for row in told}


def numbered(num_units: int) -> list[list[int]]:
    return [list(range(UNIT_ROWS * i, UNIT_ROWS * (i + 1))) for i in range(num_units)]


def test_rows_that_kill_or_hang_are_left_out_and_the_rest_is_made():
    units = numbered(6)
    units[1][5], units[4][0], units[4][3] = KILLS, KILLS, HANGS
    made = run(units, units_a_block=3)
    for i, unit in enumerate(units):
        row = made[f"unit-{i}"]
        assert row["doubled"] == [2 * number for number in unit if number >= 0]
        assert row["killers"] == [j for j, number in enumerate(unit) if number < 0]


@pytest.mark.slow
def test_parts_that_kill_their_reader_are_left_out():
    units = numbered(3)
    units[1][2] = KILLS_READER
    made = run(units, units_a_block=3)
    assert made["unit-1"]["doubled"] == [2 * n for n in units[1] if n >= 0]
    assert made["unit-2"]["doubled"] == [2 * n for n in units[2]]


@pytest.mark.slow
def test_a_unit_that_always_kills_ends_the_job():
    with pytest.raises(QbatchError, match=r"20 processes died over unit unit-0 \(computing\)"):
        run(numbered(1), units_a_block=1, stall_timeout_s=300.0, actor=Mortal)


@pytest.mark.slow
def test_the_embed_job_publishes_all_but_the_deadly_document(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("qbatch.pipelines.embed.EmbedActor", DeadlyEmbedActor)
    rows = [{"doc_id": f"d{i}", "text": f"text number {i}"} for i in range(300)]
    rows[123]["text"] = f"text {DEADLY}"
    write_lines(f"{tmp_path}/corpus/a.jsonl", rows)
    config = EmbedCorpusConfig(
        input=f"{tmp_path}/corpus",
        output=f"{tmp_path}/vectors",
        model=tiny_model,
        dtype="float32",
        max_bad_fraction=0.01,
    )
    summary = embed_corpus(config)
    assert (summary["passages"], summary["rejected"]) == (299, {"killed_process": 1})
    table = open_vectors(config.output)
    assert table.rejects()["doc_id"].to_pylist() == ["d123"]
    assert table.to_table(["doc_id"])["doc_id"].to_pylist() == [
        row["doc_id"] for row in rows if row["doc_id"] != "d123"
    ]


@pytest.mark.slow
def test_the_rerank_job_publishes_all_but_the_deadly_pairs(tmp_path, tiny_reranker, monkeypatch):
    monkeypatch.setattr("qbatch.pipelines.rerank.RerankActor", DeadlyRerankActor)
    made = make_candidates(num_queries=6, num_candidates=10, num_documents=30)
    deadly_document = made.of("q2")[4]
    made.documents[deadly_document] += DEADLY
    config = RerankCandidatesConfig(
        **write_run(str(tmp_path), made),
        output=f"{tmp_path}/out",
        model=tiny_reranker,
        dtype="float32",
        unit_pairs=1000,
        max_bad_fraction=0.2,
    )
    summary = rerank_candidates(config)
    num_deadly = sum(document == deadly_document for _, document, _, _ in made.rows)
    assert summary["rejected"] == {"killed_process": num_deadly}
    assert summary["ranked"] == len(made.rows) - num_deadly
    ranked = open_table(config.output).to_table(["query_id", "doc_id"]).to_pylist()
    assert {(row["query_id"], row["doc_id"]) for row in ranked} == {
        (query, document) for query, document, _, _ in made.rows if document != deadly_document
    }


def test_a_process_that_goes_on_did_not_die_over_what_it_was_at():
    record = DeathRecord()
    assert record.begin("first process", "a") == {}
    assert record.begin("first process", "b") == {}
    assert record.begin("second process", "a") == {}
    record.enter("b", "3 rows from 0")
    assert record.begin("third process", "b") == {"3 rows from 0": 1}
    assert record.begin("third process", "b") == {"3 rows from 0": 1}
    assert record.begin("fourth process", "b") == {"3 rows from 0": 1, "": 1}
