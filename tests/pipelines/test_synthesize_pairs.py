"""The synthesis job: against a real server that misbehaves, and with a tiny model in process."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from qbatch.errors import BadInputError, ConfigError, StalledError
from qbatch.pipelines.synthesis_units import (
    FURTHER,
    Language,
    SynthesisTask,
    SynthesisUnit,
    plan_pairs,
)
from qbatch.pipelines.synthesize_pairs import (
    SynthesizePairsConfig,
    parse_languages,
    synthesis_units,
    synthesize_pairs,
)
from qbatch.schema import TRAINING_PAIRS
from qbatch.storage import Storage
from qbatch.tables import open_table
from tests import assets
from tests.chat_server import chat_server, query_for
from tests.pair_tables import embed_one_by_one, random_words, write_json_lines
from tests.processes import Job, wait_until

uses_ray = pytest.mark.usefixtures("ray_cluster")

NUM_FILES, ROWS = 4, 15


def make_rows() -> list[dict]:
    rng = np.random.default_rng(0)
    rows = [
        {"doc_id": f"d{i}", "title": f"title {i}", "text": random_words(rng, 20)}
        for i in range(NUM_FILES * ROWS)
    ]
    rows[7]["text"] += " hopeless"
    rows[20]["text"] += " refused"
    rows[33]["text"] += " invented"
    rows[40].update(text="", title="")
    return rows


def write_corpus(uri: str, rows: list[dict]) -> None:
    for i in range(NUM_FILES):
        write_json_lines(f"{uri}/corpus", f"{i}.jsonl", rows[i * ROWS : (i + 1) * ROWS])


def make_config(uri: str, **settings) -> SynthesizePairsConfig:
    return SynthesizePairsConfig(
        **{
            "input": f"{uri}/corpus",
            "output": f"{uri}/pairs",
            "model": "m",
            "title_column": "title",
            "unit_bytes": 1000,
            **settings,
        }
    )


def make_task(**settings) -> SynthesisTask:
    config = SynthesizePairsConfig(
        input="i", output="o", model="m", endpoint="http://x", **settings
    )
    return config.make_task(None)


@pytest.mark.ray
@uses_ray
def test_every_document_becomes_a_pair_or_a_reject_with_its_reason(s3_bucket):
    rows = make_rows()
    write_corpus(s3_bucket, rows)
    with chat_server() as (endpoint, state):
        config = make_config(s3_bucket, endpoint=endpoint, languages=("English:1",))
        summary = synthesize_pairs(config)
        asked = sum(state.seen.values())
        again = synthesize_pairs(config)
        assert sum(state.seen.values()) == asked
    assert summary["rows_in"] == len(rows)
    assert summary["rows_out"] == summary["pairs"] == len(rows) - 4
    assert summary["rejected"] == {
        "empty_text": 1,
        "malformed_response": 1,
        "request_refused": 1,
        "wrong_fields": 1,
    }
    assert summary["retries"] > 4  # broken answers, and three of the hopeless
    assert (again["generation"], again["units_made"]) == (1, 0)

    table = open_table(config.output)
    pairs = table.to_table()
    assert pairs.schema.names == [*TRAINING_PAIRS.names, *FURTHER.names]
    assert pairs.select(TRAINING_PAIRS.names).schema == TRAINING_PAIRS
    found = {row["doc_id"]: row for row in pairs.to_pylist()}
    assert len(found) == len(pairs)
    for row in rows:
        if row["doc_id"] not in ("d7", "d20", "d33", "d40"):
            pair = found[row["doc_id"]]
            assert pair["document"] == f"{row['title']} {row['text']}"
            assert pair["query"] == query_for(pair["document"])
            assert pair["query_id"] == f"{row['doc_id']}#q0"
            assert (pair["task"], pair["instruction"]) == ("retrieval", None)
            assert (pair["question_type"], pair["language"]) == ("summary", "English")
    rejects = {row["doc_id"]: row for row in table.rejects().to_pylist()}
    assert "(3 answers)" in rejects["d7"]["detail"]
    assert rejects["d7"]["raw"].startswith(b"I would rather")
    assert "not allowed" in rejects["d20"]["detail"]
    assert json.loads(Storage(config.output).read("report.json"))["generation"] == 1


@pytest.mark.slow
@pytest.mark.ray
@uses_ray
def test_other_kinds_languages_quotas_and_samples(tmp_path):
    rows = make_rows()
    write_corpus(str(tmp_path), rows)
    with chat_server(misbehaves=False) as (endpoint, _):
        config = make_config(
            str(tmp_path),
            endpoint=endpoint,
            task="bitext",
            languages=("German:3", "French:1:5"),
            pairs_per_document=2,
            fraction=0.5,
            output=str(tmp_path / "bitext"),
        )
        summary = synthesize_pairs(config)
        pairs = open_table(config.output).to_table().to_pylist()
        plain = make_config(
            str(tmp_path), endpoint=endpoint, response="plain", output=str(tmp_path / "plain")
        )
        plain_summary = synthesize_pairs(replace(plain, instruction="Find it"))
    assert summary["pairs"] == len(pairs)
    assert summary["rows_in"] == len(rows)
    assert 15 < summary["dropped"]["not_sampled"] < 45
    counts = Counter(pair["language"] for pair in pairs)
    assert 0 < counts["French"] <= 5
    assert counts["German"] > 20
    for pair in pairs:
        assert pair["document"] == pair["query"][::-1]
        assert pair["instruction"] == pair["document_instruction"]
        assert pair["question_type"] is None
    assert plain_summary["requests"] >= len(rows) - 1
    assert "malformed_response" not in plain_summary["rejected"]
    one = open_table(plain.output).to_table().to_pylist()[0]
    assert one["query"] == query_for(one["document"])
    assert one["instruction"] == "Find it"


@pytest.mark.slow
@pytest.mark.ray
@uses_ray
def test_a_server_that_is_down_keeps_what_is_finished(tmp_path):
    write_corpus(str(tmp_path), make_rows())
    with chat_server(misbehaves=False) as (endpoint, state):
        config = make_config(str(tmp_path), endpoint=endpoint, max_retries=1)
        state.is_down = True
        with pytest.raises(StalledError, match="answered none of 2 requests"):
            synthesize_pairs(config)
        state.is_down = False
        assert synthesize_pairs(config)["pairs"] == NUM_FILES * ROWS - 4


@pytest.mark.ray
@uses_ray
def test_too_many_failures_publish_nothing(tmp_path):
    rows = [{"doc_id": f"d{i}", "text": f"hopeless {i}"} for i in range(5)]
    write_json_lines(f"{tmp_path}/corpus", "a.jsonl", rows)
    with chat_server(misbehaves=False) as (endpoint, _):
        config = make_config(str(tmp_path), endpoint=endpoint, title_column=None)
        with pytest.raises(BadInputError, match="5 bad documents among 5"):
            synthesize_pairs(config)
    assert not Storage(config.output).exists("manifests/00000001.json")


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_job_goes_on_and_asks_for_each_document_once(tmp_path):
    rows = make_rows()
    write_corpus(str(tmp_path), rows)
    with chat_server(misbehaves=False, delay_s=0.2) as (endpoint, state):
        flags = {
            "input": f"{tmp_path}/corpus",
            "output": f"{tmp_path}/pairs",
            "model": "m",
            "title_column": "title",
            "unit_bytes": 1000,
            "endpoint": endpoint,
            "concurrency": 2,
        }
        killed = Job("synthesize_pairs.py", flags, tmp_path / "killed.log")
        data = Path(tmp_path, "pairs", "data")
        assert wait_until(lambda: data.exists() and any(data.iterdir()), killed), killed.log()
        killed.kill()
        finished = len(list(data.iterdir()))
        assert not Path(tmp_path, "pairs", "manifests").exists()
        state.delay_s = 0
        last = Job("synthesize_pairs.py", flags, tmp_path / "last.log")
        code, summary = last.wait()
    assert code == 0, last.log()[-3000:]
    assert summary["units_reused"] == finished > 0
    pairs = open_table(f"{tmp_path}/pairs").to_table()
    wanted = {row["doc_id"] for row in rows} - {"d7", "d20", "d33", "d40"}
    assert sorted(pairs["doc_id"].to_pylist()) == sorted(wanted)


@pytest.mark.ray
@uses_ray
@pytest.mark.slow
def test_a_model_in_process_and_people_by_an_embedder(tmp_path, tiny_judge, tiny_model):
    """A random model writes nonsense, but the same nonsense again; an eighth of its tokens end."""
    model = copytree(tiny_judge, tmp_path / "model")
    ends = {"eos_token_id": list(range(0, 200, 8))}
    (model / "generation_config.json").write_text(json.dumps(ends))
    rng = np.random.default_rng(1)
    rows = [{"doc_id": f"d{i}", "text": random_words(rng, 6)} for i in range(6)]
    write_json_lines(f"{tmp_path}/corpus", "a.jsonl", rows)
    people = [random_words(rng, 3) for _ in range(9)]
    (tmp_path / "people.txt").write_text("\n".join(people))
    made = []
    for name in ("one", "two"):
        config = make_config(
            str(tmp_path),
            output=str(tmp_path / name),
            model=str(model),
            response="plain",
            title_column=None,
            personas=str(tmp_path / "people.txt"),
            persona_model=tiny_model,
            dtype="float32",
            max_answer_tokens=100,
            max_bad_fraction=1,
        )
        summary = synthesize_pairs(config)
        assert summary["rows_in"] == 6
        made.append(open_table(config.output).to_table().to_pylist())
    assert made[0] == made[1]
    assert len(made[0]) > 2
    vectors = embed_one_by_one(tiny_model, people)
    for pair in made[0]:
        scores = vectors @ embed_one_by_one(tiny_model, [pair["document"]])[0]
        assert pair["character"] in {people[i] for i in np.argsort(-scores)[:5]}


def test_languages_follow_weights_and_quotas_document_by_document():
    task = make_task(languages=("German:3", "French:1:40"), pairs_per_document=2)
    dropped = Counter()
    drafts = plan_pairs(400, "k", (None, 40), task, dropped).to_pylist()
    assert drafts == plan_pairs(400, "k", (None, 40), task, dropped).to_pylist()
    assert drafts != plan_pairs(400, "other", (None, 40), task, dropped).to_pylist()
    assert Counter(row["language"] for row in drafts) == {"German": 760, "French": 40}
    free = plan_pairs(400, "k", (None, None), task, dropped).to_pylist()
    assert 150 < Counter(row["language"] for row in free)["French"] < 250
    assert not dropped
    few = plan_pairs(400, "k", (7, 4), task, dropped).to_pylist()
    assert len(few) == 11
    assert dropped["quota"] == 400 - len({row["document"] for row in few})


def test_quotas_are_shared_out_whole(tmp_path):
    write_corpus(str(tmp_path), make_rows())
    task = make_task(languages=("German:3", "French:1:7"))
    task = replace(task, corpus=make_config(str(tmp_path)).corpus())
    units = list(synthesis_units(task))
    assert len(units) > 3
    assert sum(unit.quotas[1] for unit in units) == 7
    assert {unit.quotas[0] for unit in units} == {None}
    for unit in units:
        assert SynthesisUnit.from_json(unit.to_json()) == unit
    free = [replace(unit, quotas=(None, None)) for unit in units]
    assert free[0].key("f") == units[0].unit.key("f") != units[0].key("f")


def test_languages_are_parsed():
    assert parse_languages(("German:0.5:10", "Serbian:2")) == (
        Language(name="German", weight=0.5, quota=10),
        Language(name="Serbian", weight=2.0),
    )
    assert parse_languages(()) == (Language(name="", weight=1.0),)


@pytest.mark.parametrize("item", ["German", "German:0", "German:x", ":1", "German:1:0", "a:1:2:3"])
def test_wrong_languages_are_refused(item):
    with pytest.raises(ConfigError, match="give NAME:WEIGHT or NAME:WEIGHT:QUOTA"):
        parse_languages((item,))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fraction": 0}, "fraction is 0; give above 0, at most 1"),
        ({"pairs_per_document": 0}, "pairs_per_document is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"task": "bitext"}, "bitext without --languages"),
        ({"endpoint": "ftp://x"}, "endpoint is 'ftp://x'"),
        ({"max_bad_fraction": 2}, "max_bad_fraction is 2"),
    ],
)
def test_bad_settings_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        SynthesizePairsConfig(input="i", output="o", model="m", **flags)


def test_dry_run_shows_plan_and_prompts(tmp_path):
    rows = make_rows()
    write_corpus(str(tmp_path), rows)
    config = make_config(str(tmp_path), dry_run=True, pairs_per_document=2)
    summary = synthesize_pairs(config)
    assert summary["units"] >= 4
    assert 30 < summary["documents_estimated"] < 90
    assert len(summary["prompts"]) == 2
    assert any(f"{row['title']}\n{row['text']}" in summary["prompts"][0] for row in rows)
    assert not (tmp_path / "pairs").exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
@uses_ray
def test_queries_of_smollm2_find_their_passage_well_above_chance(tmp_path):
    model, embedder = assets.smollm2(), assets.minilm()
    lines = assets.debian_descriptions().read_text().splitlines()
    english = [row for row in map(json.loads, lines) if row["lang"] == "en"]
    rows = [row for row in english if 150 < len(row["body"]) < 600][::400][:50]
    write_json_lines(f"{tmp_path}/corpus", "a.jsonl", rows)
    config = make_config(
        str(tmp_path),
        model=str(model),
        response="plain",
        id_column="id",
        text_column="body",
        title_column=None,
        max_answer_tokens=40,
        temperature=0.3,
        unit_bytes=2**20,
    )
    summary = synthesize_pairs(config)
    assert summary["rows_in"] == 50
    pairs = open_table(config.output).to_table().to_pylist()
    assert len(pairs) > 40
    documents = embed_one_by_one(str(embedder), [row["body"] for row in rows])
    queries = embed_one_by_one(str(embedder), [pair["query"] for pair in pairs])
    places = {row["id"]: i for i, row in enumerate(rows)}
    own = [places[pair["doc_id"]] for pair in pairs]
    hits = np.argmax(queries @ documents.T, axis=1) == own
    print(f"top 1: {hits.mean():.3f}", [pair["query"] for pair in pairs[:8]])
    assert hits.mean() > 0.5  # chance is 0.02
