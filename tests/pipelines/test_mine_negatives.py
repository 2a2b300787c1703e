"""The mining job in this process against plain loops over all documents."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from qbatch.errors import ConfigError
from qbatch.models.rerank_tokens import CandidateGroup, scores_from_keys
from qbatch.models.reranker import RerankerConfig
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.mine_negatives import MineNegativesConfig, mine_negatives
from qbatch.schema import TRAINING_PAIRS
from qbatch.storage import Storage
from qbatch.tables import open_table
from tests.pair_tables import embed_one_by_one, random_words, write_json_lines

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_DOCUMENTS, NUM_PAIRS = 60, 24
WINDOW = (3, 30)


def make_texts() -> tuple[list[dict], list[dict]]:
    rng = np.random.default_rng(0)
    documents = [{"doc_id": f"d{i}", "text": random_words(rng, 12)} for i in range(NUM_DOCUMENTS)]
    documents[50]["text"] = documents[1]["text"].upper()  # the positive of pair 1 once more
    pairs = [
        {
            "query": random_words(rng, 4),
            "doc_id": f"d{i}",
            "document": documents[i]["text"],
            "source": "made",
        }
        for i in range(NUM_PAIRS)
    ]
    pairs[7]["query"] = pairs[6]["query"]  # two answers to one question
    pairs[8].update(negatives=["a given one"], negative_ids=["g1"])
    pairs[9]["query"] = ""
    return documents, pairs


@pytest.fixture(scope="module")
def texts() -> tuple[list[dict], list[dict]]:
    return make_texts()


@pytest.fixture(scope="module")
def index_uri(ray_cluster, tmp_path_factory, tiny_model, texts) -> str:
    uri = str(tmp_path_factory.mktemp("mining"))
    documents, pairs = texts
    write_json_lines(f"{uri}/corpus", "a.jsonl", documents[:20])
    write_json_lines(f"{uri}/corpus", "b.jsonl", documents[20:])
    write_json_lines(f"{uri}/pairs", "a.jsonl", pairs[:15])
    write_json_lines(f"{uri}/pairs", "b.jsonl", pairs[15:])
    write_json_lines(f"{uri}/pairs", "c.jsonl", [{"query": None, "document": "x"}])
    embed_corpus(
        EmbedCorpusConfig(
            input=f"{uri}/corpus", output=f"{uri}/vectors", model=tiny_model, dtype="float32"
        )
    )
    build_index(BuildIndexConfig(vectors=f"{uri}/vectors", output=f"{uri}/index", factory="Flat"))
    return uri


def make_config(uri: str, output: object, **settings) -> MineNegativesConfig:
    return MineNegativesConfig(
        pairs=f"{uri}/pairs",
        index=f"{uri}/index",
        corpus=f"{uri}/corpus",
        output=str(output),
        keep_columns=("source",),
        unit_bytes=400,
        max_bad_fraction=0.2,
        **{
            "first_rank": WINDOW[0],
            "last_rank": WINDOW[1],
            "max_ratio": 0.995,
            "num_negatives": 3,
            "sampling": "top",
            **settings,
        },
    )


def eligible(texts, model: str, config: MineNegativesConfig) -> dict[str, list[str]]:
    """Documents that may become negatives of each pair, best first, by loops."""
    documents, pairs = texts
    vectors = embed_one_by_one(model, [d["text"] for d in documents])
    found = {}
    for pair in pairs:
        if not pair["query"]:
            continue
        query, positive = embed_one_by_one(model, [pair["query"], pair["document"]])
        scores = vectors @ query
        order = np.argsort(-scores, kind="stable")[config.first_rank - 1 : config.last_rank]
        answers = [p["doc_id"] for p in pairs if p["query"] == pair["query"]]
        answer_texts = {p["document"].lower() for p in pairs if p["query"] == pair["query"]}
        found[pair["doc_id"]] = [
            documents[i]["doc_id"]
            for i in order
            if documents[i]["doc_id"] not in answers
            and documents[i]["text"].lower() not in answer_texts
            and (config.max_ratio is None or scores[i] < config.max_ratio * (query @ positive))
            and (config.margin is None or scores[i] < query @ positive - config.margin)
        ]
    return found


def mined(uri: str, texts) -> dict[str, list[str]]:
    """Ids of negatives by pair, after checking that texts are those of the ids."""
    documents = {d["doc_id"]: d["text"] for d in texts[0]} | {"g1": "a given one"}
    table = open_table(uri).to_table()
    assert table.select(TRAINING_PAIRS.names).schema == TRAINING_PAIRS
    assert table["source"].to_pylist() == ["made"] * len(table)
    found = {}
    for row in table.to_pylist():
        assert [documents[i] for i in row["negative_ids"]] == row["negatives"]
        found[row["doc_id"]] = row["negative_ids"]
    return found


def test_negatives_are_those_of_a_loop_and_a_second_run_makes_nothing(
    index_uri, tmp_path, tiny_model, texts
):
    config = make_config(index_uri, tmp_path / "mined")
    summary = mine_negatives(config)
    wanted = eligible(texts, tiny_model, config)
    given = {"d8": ["g1"]}
    found = mined(config.output, texts)
    assert found == {pair: given.get(pair, []) + ids[:3] for pair, ids in wanted.items()}
    assert sum(map(len, found.values())) > 20
    assert "d50" not in found["d1"]
    assert summary["dropped_candidates"]["positive"] >= 1
    assert summary["rows_in"] == NUM_PAIRS + 1
    assert summary["rejected"] == {"missing_query": 2}
    assert summary["negatives"] == sum(map(len, found.values())) - 1
    assert summary["without_negatives"] == sum(not ids for ids in wanted.values())
    before = [(o.path, o.version) for o in Storage(config.output).iter_objects("data")]
    again = mine_negatives(config)
    assert (again["generation"], again["units_made"]) == (1, 0)
    assert [(o.path, o.version) for o in Storage(config.output).iter_objects("data")] == before


def positive_rank(texts, model: str, pair: dict) -> int:
    """The rank of a pair's document among all that do not answer the same query."""
    documents, pairs = texts
    answers = [p["doc_id"] for p in pairs if p["query"] == pair["query"]]
    others = [d["text"] for d in documents if d["doc_id"] not in answers]
    query, positive, *vectors = embed_one_by_one(model, [pair["query"], pair["document"], *others])
    return 1 + sum(vector @ query > positive @ query for vector in vectors)


def test_pairs_whose_query_finds_other_documents_first_are_dropped(
    index_uri, tmp_path, tiny_model, texts
):
    config = make_config(index_uri, tmp_path / "consistent")
    ranks = {p["doc_id"]: positive_rank(texts, tiny_model, p) for p in texts[1] if p["query"]}
    limit = int(np.median(list(ranks.values())))
    config = replace(config, last_rank=limit + 10, max_positive_rank=limit)
    summary = mine_negatives(config)
    wanted = {pair for pair, rank in ranks.items() if rank <= limit}
    assert 3 < len(wanted) < len(ranks) - 3
    assert set(mined(config.output, texts)) == wanted
    assert summary["rejected"] == {"low_rank": len(ranks) - len(wanted), "missing_query": 2}
    rejects = open_table(config.output).rejects().to_pylist()
    told = {row["doc_id"]: row["detail"] for row in rejects if row["reason"] == "low_rank"}
    for pair, detail in told.items():
        if ranks[pair] < config.last_rank:
            assert detail.startswith(f"at least {ranks[pair] - 1} documents score above")


@pytest.mark.slow
def test_other_rules_search_nothing_again_and_each_seed_draws_its_own(
    index_uri, tmp_path, tiny_model, texts
):
    config = make_config(index_uri, tmp_path / "mined")
    mine_negatives(config)
    drawn = []
    for seed in (1, 1, 2):
        random = replace(config, sampling="random", max_ratio=None, margin=0.001, seed=seed)
        mine_negatives(random)
        drawn.append(mined(config.output, texts))
        allowed = eligible(texts, tiny_model, random)
        for pair, ids in drawn[-1].items():
            own = [i for i in ids if i != "g1"]
            assert set(own) <= set(allowed[pair])
            assert len(own) == min(3, len(allowed[pair]))
    assert drawn[0] == drawn[1] != drawn[2]
    assert Storage(f"{config.output}/run").exists("manifests/00000001.json")
    assert not Storage(f"{config.output}/run").exists("manifests/00000002.json")


@pytest.mark.slow
def test_a_judge_drops_what_it_finds_relevant(index_uri, tmp_path, tiny_model, tiny_judge, texts):
    config = make_config(
        index_uri, tmp_path / "judged", judge=tiny_judge, dtype="float32", max_ratio=None
    )
    documents = {d["doc_id"]: d["text"] for d in texts[0]}
    reranker = RerankerConfig(model_path=Path(tiny_judge), dtype="float32").build()
    judged = {}
    for pair in texts[1]:
        ids = eligible([texts[0], [pair]], tiny_model, config).get(pair["doc_id"], [])
        group = CandidateGroup(query=pair["query"] or "-", documents=[documents[i] for i in ids])
        scores = scores_from_keys(reranker.score([group])[0], "yes-no")
        judged[pair["doc_id"]] = dict(zip(ids, scores.tolist(), strict=True))
    limit = float(np.median([s for scores in judged.values() for s in scores.values()]))
    summary = mine_negatives(replace(config, max_judge_score=limit))
    found = mined(config.output, texts)
    assert summary["dropped_candidates"]["judge"] > 10
    for pair, ids in found.items():
        own = [i for i in ids if i != "g1"]
        assert all(judged[pair][i] < limit + 1e-5 for i in own if i in judged[pair])
    assert sum(map(len, found.values())) > 20


@pytest.mark.slow
def test_documents_that_are_gone_are_left_out(index_uri, tmp_path, texts):
    documents, _ = texts
    write_json_lines(f"{tmp_path}/corpus", "a.jsonl", documents[:40])
    config = replace(
        make_config(index_uri, tmp_path / "out"), corpus=f"{tmp_path}/corpus", max_ratio=None
    )
    summary = mine_negatives(config)
    assert summary["dropped_candidates"]["missing_document"] > 0
    gone = {d["doc_id"] for d in documents[40:]}
    ids = pc.list_flatten(open_table(config.output).to_table()["negative_ids"]).to_pylist()
    assert not gone & set(ids)


def test_a_model_that_is_not_the_index_s_is_refused(index_uri, tmp_path, tmp_path_factory):
    from tests.tiny_models import write_tiny_encoder  # noqa: PLC0415 - imports torch

    other = write_tiny_encoder(tmp_path_factory.mktemp("other"), seed=1)
    with pytest.raises(ConfigError, match="come from different models"):
        mine_negatives(make_config(index_uri, tmp_path / "out", model=str(other)))


def test_dry_run_searches_nothing(index_uri, tmp_path):
    summary = mine_negatives(make_config(index_uri, tmp_path / "out", dry_run=True))
    assert (summary["dry_run"], summary["indexed"]) == (True, NUM_DOCUMENTS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_judge_score": 2}, "max_judge_score is 2; give 0 to 1"),
        ({"stall_timeout_s": 0}, "stall_timeout_s is 0"),
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"max_positive_rank": 101}, "max_positive_rank is 101; give 1 to last_rank, here 100"),
    ],
)
def test_bad_settings_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        MineNegativesConfig(pairs="p", index="i", corpus="c", output="o", **flags)
