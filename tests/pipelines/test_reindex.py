"""The night in this process: what it makes, keeps, refuses and takes back, with a tiny model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qbatch.cli import parse
from qbatch.errors import ConfigError, LeaseHeldError, NoInputError, QualityGateError
from qbatch.lease import hold_lease
from qbatch.pipelines.reindex import AnswersStep, PublishStep, ReindexConfig, reindex
from qbatch.pipelines.rollback import RollbackConfig, rollback
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from qbatch.pipelines.status import StatusConfig, status
from qbatch.pipelines.vacuum import VacuumConfig, vacuum
from qbatch.release import open_release, release_numbers
from qbatch.storage import Storage
from qbatch.tables import open_table
from tests.nights import Corpus, content_of, night_config, served, text_of, write_queries
from tests.tiny_models import write_tiny_encoder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parents[2]
DOCUMENTS, QUERIES = 60, 12


@pytest.fixture(scope="module")
def place(ray_cluster, tmp_path_factory) -> str:
    """Where the nights of this module happen, one after the other."""
    uri = str(tmp_path_factory.mktemp("night"))
    write_queries(f"{uri}/queries.jsonl", QUERIES)
    return uri


@pytest.fixture(scope="module")
def corpus(place) -> Corpus:
    made = Corpus(f"{place}/corpus")
    made.write()
    return made


@pytest.fixture(scope="module")
def config(place, corpus, tiny_model) -> ReindexConfig:
    return night_config(place, tiny_model)


@pytest.fixture(scope="module")
def first(config) -> dict:
    return reindex(config)


def objects(uri: str, part: str) -> dict[str, str]:
    return {o.path: o.version for o in Storage(uri).iter_objects() if part in o.path}


def test_a_night_releases_tables_that_belong_together(first, config, corpus):
    assert (first["release"], first["released"], first["compared_with"]) == (1, True, None)
    assert first["vectors"]["units_made"] > 3
    release = open_release(config.output)
    assert set(release.tables) == {"vectors", "index", "answers", "related"}
    assert len({ref.path.partition("/")[0] for ref in release.tables.values()}) == 1
    content = content_of(release)
    assert content["vectors"].keys() == content["related"].keys() == corpus.documents.keys()
    assert content["answers"].keys() == {f"q{i}" for i in range(QUERIES)}
    assert all(len(items) == 5 for items in content["answers"].values())
    assert content["answers"]["q1"][0][0] == "d3"  # which has the text of the query
    gates = release.generation.details["gates"]
    assert {gate["verdict"] for gate in gates} == {"pass"}
    report = json.loads(Storage(config.output).read("report.json"))
    (shown,) = report.pop("details")["releases"]
    assert report == first
    assert (shown["release"], shown["documents"]) == (1, first["vectors"]["rows_in"])
    assert b"recall@10 of the index" in Storage(config.output).read("report.html")


def test_a_night_without_change_makes_and_publishes_nothing(first, config):
    before = objects(config.output, "model-")
    again = reindex(config)
    assert (again["release"], again["released"]) == (1, False)
    assert (again["vectors"]["units_made"], again["index"]["shards_made"]) == (0, 0)
    assert (again["answers"]["partitions_made"], again["related"]["partitions_made"]) == (0, 0)
    after = objects(config.output, "model-")
    assert after.keys() == before.keys()
    changed = {path for path in after if after[path] != before[path]}
    assert not [path for path in changed if "/report." not in path and "plans/" not in path]
    assert release_numbers(Storage(config.output)) == [1]


def test_a_failing_gate_leaves_the_old_release_and_the_next_night_goes_on(first, config, corpus):
    before = served(config.output.removesuffix("/night"))
    corpus.files["001.jsonl"]["d10"] = text_of(10, version=1)
    del corpus.files["002.jsonl"]["d20"]
    corpus.write()
    strict = replace(config, gates=replace(config.gates, max_document_loss=0.0))
    with pytest.raises(QualityGateError, match=r"1 of \d+ gates failed \(documents lost") as caught:
        reindex(strict)
    assert "release 1 stays" in str(caught.value)
    assert re.search(
        r"documents lost since the last release +0\.016667 +at most 0 +FAIL", str(caught.value)
    )
    assert open_release(config.output).number == 1
    assert served(config.output.removesuffix("/night")) == before
    report = json.loads(Storage(config.output).read("report.json"))
    assert report["released"] is False
    assert "gates failed" in report["error"]
    assert [gate["name"] for gate in report["gates"] if gate["verdict"] == "FAIL"] == [
        "documents lost since the last release"
    ]
    assert 0 < report["vectors"]["units_made"] < first["vectors"]["units_made"]

    second = reindex(config)
    assert (second["release"], second["released"], second["compared_with"]) == (2, True, 1)
    assert (second["vectors"]["units_made"], second["index"]["shards_made"]) == (0, 0)
    now = served(config.output.removesuffix("/night"))
    assert now["vectors"].keys() == corpus.documents.keys()
    assert now["vectors"]["d10"] != before["vectors"]["d10"]
    assert {d: v for d, v in now["vectors"].items() if d != "d10"} == {
        d: v for d, v in before["vectors"].items() if d not in ("d10", "d20")
    }
    everywhere = json.dumps([now["answers"], now["related"]])
    assert '"d20"' not in everywhere


@pytest.mark.slow
def test_what_was_rolled_back_is_not_released_again_until_something_changes(config, corpus):
    """After release 2 of the test before."""
    assert open_release(config.output).number == 2
    old = content_of(open_release(config.output, 1))
    made = rollback(RollbackConfig(output=config.output, release=1))
    assert made["release"] == 3
    assert content_of(open_release(config.output)) == old
    night = reindex(config)
    assert (night["release"], night["released"]) == (3, False)
    assert content_of(open_release(config.output)) == old

    shown = status(StatusConfig(output=config.output))
    assert (shown["serving"], shown["working"]) == (3, None)
    assert [r["release"] for r in shown["releases"]] == [1, 2, 3]
    assert [r["rolled_back"] for r in shown["releases"]] == [False, False, True]
    assert shown["releases"][1]["counts"]["vectors"]["rows_embedded"] == DOCUMENTS - 1

    corpus.files["003.jsonl"]["new"] = text_of(99)
    corpus.write()
    night = reindex(config)
    assert (night["release"], night["released"], night["compared_with"]) == (4, True, 3)
    assert open_release(config.output).withdrawn == []
    assert "new" in content_of(open_release(config.output))["vectors"]


@pytest.mark.slow
def test_another_model_is_tried_beside_the_one_that_serves(
    first, config, place, corpus, tmp_path_factory
):
    model = str(write_tiny_encoder(tmp_path_factory.mktemp("other-model"), seed=1))
    qrels = Path(place, "qrels.tsv")
    judged = [f"q{i}\td{3 * i}\t1\n" for i in range(QUERIES)]
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    served_before = open_release(config.output)
    trial = replace(
        config,
        embed=replace(config.embed, model=model),
        gates=replace(config.gates, qrels=str(qrels), max_ndcg_drop=1.0),
        publish=PublishStep(release=False),
        compare_to=1,
    )
    tried = reindex(trial)
    assert (tried["release"], tried["released"]) == (served_before.number, False)
    assert tried["compared_with"] == 1
    assert set(tried["evaluation"]["comparison"]) == {"ndcg@10", "recall@10", "mrr@10"}
    assert tried["evaluation"]["compared_to"]["ndcg@10"] > 0.5
    assert not [gate for gate in tried["gates"] if "drift" in gate["name"]]
    assert open_release(config.output).tables == served_before.tables

    switched = reindex(replace(trial, publish=PublishStep(), compare_to=None))
    assert switched["released"]
    assert (switched["vectors"]["units_made"], switched["index"]["shards_made"]) == (0, 0)
    paths = {ref.path for ref in open_release(config.output).tables.values()}
    assert not paths & {ref.path for ref in served_before.tables.values()}
    assert content_of(open_release(config.output, served_before.number)) is not None
    with pytest.raises(NoInputError, match="no release 99"):
        reindex(replace(config, compare_to=99))


@pytest.mark.slow
def test_after_a_vacuum_every_kept_release_reads_and_searches_as_before(
    first, config, place, corpus, tmp_path
):
    """On top of whatever the tests before left: generations that failed, rollbacks, two models."""
    corpus.files["004.jsonl"]["d40"] = text_of(40, version=2)
    corpus.write()
    newest = reindex(config)["release"]
    kept = release_numbers(Storage(config.output))[-2:]
    assert kept[-1] == newest
    before = {number: content_of(open_release(config.output, number)) for number in kept}
    found = {n: searched(config, place, n, f"{tmp_path}/before{n}") for n in kept}
    opened = open_release(config.output, kept[0])
    summary = vacuum(VacuumConfig(output=config.output, keep=2, min_age_hours=0))
    assert (summary["releases"], summary["objects"] > 0) == (kept, True)
    for number in kept:
        assert content_of(open_release(config.output, number)) == before[number]
        assert searched(config, place, number, f"{tmp_path}/after{number}") == found[number]
    assert content_of(opened) == before[kept[0]]
    again = reindex(config)
    assert (again["released"], again["vectors"]["units_made"]) == (False, 0)


def searched(config: ReindexConfig, place: str, number: int, output: str) -> list[dict]:
    """Search the index of a release for its own documents, with exact scores."""
    release = open_release(config.output, number)
    vectors, index = release.tables["vectors"], release.tables["index"]
    search_index(
        SearchIndexConfig(
            index=f"{config.output}/{index.path}",
            index_generation=index.generation,
            queries=f"{config.output}/{vectors.path}",
            queries_generation=vectors.generation,
            output=output,
            top_k=3,
            rescore=2,
        )
    )
    return sorted(open_table(output).to_table().to_pylist(), key=str)


def test_a_second_night_leaves_with_code_5(config):
    storage = Storage(config.output)
    with (
        hold_lease(storage, holder="the other", lease_s=60),
        pytest.raises(LeaseHeldError, match="the other works in") as caught,
    ):
        reindex(config)
    assert caught.value.exit_code == 5


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, tiny_model):
    Corpus(f"{tmp_path}/corpus").write()
    plan = reindex(replace(night_config(str(tmp_path), tiny_model), dry_run=True))
    assert plan["steps"] == ["embed", "index", "answers", "related", "gates"]
    assert (plan["release"], plan["is_new_model"]) == (None, True)
    assert plan["embed"]["dry_run"]
    assert not Path(tmp_path, "night").exists()


def test_the_example_config_and_its_flags(tmp_path):
    flags = ["--config", str(ROOT / "jobs/configs/night.toml"), "--embed.model=m", "--gates.seed=3"]
    config = parse(ReindexConfig, flags)
    assert config.precomputed == ["answers", "related"]
    assert (config.embed.model, config.gates.seed, config.related.mode) == ("m", 3, "items")
    assert config.answers.num_partitions == 4


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--answers.index=x", "Unrecognized options: --answers.index=x"),
        ("--embed.output=x", "Unrecognized options: --embed.output=x"),
        ("--related.diversity=2", "diversity is 2.0; give 0"),
        ("--answers.rerank-k=0", "rerank_k is 0; give 1 or more"),
        ("--publish.wait-s=-1", "wait_s=-1.0"),
    ],
)
def test_derived_settings_are_no_flags_and_wrong_ones_are_refused_early(flag, message, capsys):
    flags = ["--config", str(ROOT / "jobs/configs/night.toml"), "--embed.model=m", flag]
    with pytest.raises(SystemExit) as caught:
        parse(ReindexConfig, flags)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_judgements_need_answers(config):
    with pytest.raises(ConfigError, match=r"gates.qrels is 'x' without answers.queries"):
        replace(config, answers=AnswersStep(), gates=replace(config.gates, qrels="x"))
