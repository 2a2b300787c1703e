"""The search job in this process: texts, vectors and documents as queries, against brute force."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.errors import ConfigError, IntegrityError, NoInputError
from qbatch.index.stored import stored_shards
from qbatch.manifest import latest_generation
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.prompts import query_prompt
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines import search_index as search_module
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from qbatch.pipelines.search_schedule import plan_search
from qbatch.schema import RUN, vector_matrix
from qbatch.storage import Storage
from qbatch.tables import open_table, open_vectors
from tests.tiny_models import write_tiny_encoder
from tests.vector_tables import FINGERPRINT, clustered, rows_table, split_files, write_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROWS, DIM, QUERIES = 2000, 32, 300
VECTORS = clustered(ROWS, DIM)
DOC_IDS = [f"d{i // 2}" for i in range(ROWS)]
LANGS = ["en", "de", "fr", "en"] * (ROWS // 4)
ASKED = clustered(QUERIES, DIM, seed=1)
QUERY_IDS = [f"q{i}" for i in range(QUERIES)]


def build(uri: str, factory: str, num_shards: int = 3) -> str:
    files = split_files(rows_table(VECTORS, DOC_IDS, {"lang": LANGS}), 10)
    write_vectors(f"{uri}/vectors", files)
    config = BuildIndexConfig(
        vectors=f"{uri}/vectors",
        output=f"{uri}/index",
        factory=factory,
        num_shards=num_shards,
        num_probes=50,
        target_recall=0.05,
    )
    build_index(config)
    return config.output


@pytest.fixture(scope="module")
def index_uri(ray_cluster, tmp_path_factory) -> str:
    return build(str(tmp_path_factory.mktemp("flat")), "Flat")


@pytest.fixture
def config(index_uri, tmp_path) -> SearchIndexConfig:
    write_vectors(f"{tmp_path}/queries", split_files(rows_table(ASKED, QUERY_IDS), 3))
    return SearchIndexConfig(
        index=index_uri, queries=f"{tmp_path}/queries", output=f"{tmp_path}/run", top_k=5
    )


def run_of(uri: str) -> dict[str, list[tuple]]:
    """Return (rank, doc_id, score) of each query, after checking what holds for every run."""
    table = open_table(uri).to_table()
    assert table.schema.equals(RUN)
    found: dict[str, list[tuple]] = {}
    for row in table.to_pylist():
        found.setdefault(row["query_id"], []).append((row["rank"], row["doc_id"], row["score"]))
    for hits in found.values():
        assert [rank for rank, _, _ in hits] == list(range(1, len(hits) + 1))
        assert len({doc_id for _, doc_id, _ in hits}) == len(hits)
        assert [s for _, _, s in hits] == sorted((s for _, _, s in hits), reverse=True)
    return found


def best(scores: np.ndarray, top_k: int, allowed=None) -> list[str]:
    """Documents by their best passage."""
    documents: list[str] = []
    for row in np.argsort(-scores, kind="stable").tolist():
        if (allowed is None or allowed(row)) and DOC_IDS[row] not in documents:
            documents.append(DOC_IDS[row])
    return documents[:top_k]


def assert_exact(uri: str, allowed=None) -> None:
    found = run_of(uri)
    assert found.keys() == set(QUERY_IDS)
    for i, query_id in enumerate(QUERY_IDS):
        scores = VECTORS @ ASKED[i]
        wanted = best(scores, 5, allowed)
        assert [doc_id for _, doc_id, _ in found[query_id]] == wanted
        assert found[query_id][0][2] == pytest.approx(
            max(s for row, s in enumerate(scores) if DOC_IDS[row] == wanted[0]), abs=1e-5
        )


def test_a_run_holds_the_best_documents_and_a_second_run_makes_nothing(config):
    summary = search_index(config)
    assert (summary["generation"], summary["queries"], summary["rows"]) == (1, 300, 1500)
    assert summary["rejected"] == {}
    assert_exact(config.output)
    report = json.loads(Storage(config.output).read("report.json"))
    details = report.pop("details")
    assert report == summary
    assert sum(details["best_scores"]["counts"]) == 300
    assert b"Score by rank" in Storage(config.output).read("report.html")
    before = [o.path for o in Storage(config.output).iter_objects("data")]
    again = search_index(config)
    assert (again["generation"], again["rows"]) == (1, 1500)
    assert [o.path for o in Storage(config.output).iter_objects("data")] == before


@pytest.mark.slow
def test_it_works_over_s3(s3_bucket):
    index = build(s3_bucket, "IVF8,Flat")
    write_vectors(f"{s3_bucket}/queries", {"a": rows_table(ASKED, QUERY_IDS)})
    config = SearchIndexConfig(
        index=index, queries=f"{s3_bucket}/queries", output=f"{s3_bucket}/run", top_k=5, nprobe=8
    )
    search_index(config)
    assert_exact(config.output)


def test_shards_in_several_groups_give_the_same_and_resume_by_shard(config, monkeypatch):
    """As on a cluster whose actors hold one shard at a time; then one partial result is lost."""
    search_index(config)
    whole = open_table(config.output).to_table()

    def one_shard_a_group(shards, node, num_blocks):
        pool = plan_search(shards, node, num_blocks)
        return replace(pool, groups=[[shard] for shard in shards])

    monkeypatch.setattr(search_module, "plan_search", one_shard_a_group)
    config = replace(config, output=f"{config.output}-grouped")
    search_index(config)
    assert open_table(config.output).to_table().equals(whole)
    storage = Storage(config.output)
    partials = [o.path for o in storage.iter_objects("partials")]
    assert len(partials) == 3 * 3
    for o in list(storage.iter_objects()):
        if o.path == partials[4] or not o.path.startswith("partials/"):
            storage.delete(o.path)
    monkeypatch.setattr(search_module, "search_blocks", counted := CountedSearch())
    search_index(config)
    assert counted.calls == [1]
    assert open_table(config.output).to_table().equals(whole)


class CountedSearch:
    """The real thing, with a count of the (block, shard) pairs it is asked for."""

    def __init__(self):
        self.calls = []
        self.real = search_module.search_blocks

    def __call__(self, task, pool, work, **options):
        self.calls.append(sum(len(shards) for calls in work.values() for _, shards in calls))
        return self.real(task, pool, work, **options)


def test_filters_and_tombstones_leave_documents_out(config, tmp_path):
    search_index(replace(config, filter='lang in ["de", "fr"] and doc_id != "d7"'))
    assert_exact(
        config.output, allowed=lambda row: LANGS[row] in {"de", "fr"} and DOC_IDS[row] != "d7"
    )
    dead = {f"d{i}" for i in range(0, 1000, 3)}
    Path(tmp_path, "dead").mkdir()
    pq.write_table(pa.table({"doc_id": sorted(dead)}), f"{tmp_path}/dead/a.parquet")
    search_index(replace(config, output=f"{config.output}-2", tombstones=f"{tmp_path}/dead"))
    assert_exact(f"{config.output}-2", allowed=lambda row: DOC_IDS[row] not in dead)


def test_a_filter_must_fit_the_index(config):
    with pytest.raises(ConfigError, match=r"--filter looks at \['year'\]"):
        search_index(replace(config, filter="year == 1"))
    with pytest.raises(ConfigError, match="does not fit the kept columns"):
        search_index(replace(config, filter="lang > 5"))


def test_documents_do_not_find_themselves(config, index_uri):
    vectors = index_uri.replace("/index", "/vectors")
    search_index(replace(config, queries=vectors, exclude_self=True))
    found = run_of(config.output)
    assert found.keys() == set(DOC_IDS)
    for document in (0, 5, 999):
        first_passage = VECTORS[2 * document]
        wanted = best(VECTORS @ first_passage, 5, lambda row, d=document: row // 2 != d)
        assert [doc_id for _, doc_id, _ in found[f"d{document}"]] == wanted


def test_vectors_from_bare_parquet_and_what_cannot_be_searched(config, tmp_path):
    vectors = [v.tolist() for v in ASKED]
    vectors[3] = None
    vectors[4] = [float("nan")] * DIM
    vectors[5] = [0.0] * DIM
    vectors[6] = (10 * ASKED[6]).tolist()
    folder = Path(tmp_path, "bare")
    folder.mkdir()
    pq.write_table(pa.table({"id": range(QUERIES), "v": vectors}), folder / "a.parquet")
    summary = search_index(replace(config, queries=str(folder), id_column="id", vector_column="v"))
    assert summary["rejected"] == {"non_finite_vector": 1, "null_vector": 1, "zero_vector": 1}
    assert summary["queries"] == QUERIES
    found = run_of(config.output)
    assert found.keys() == {str(i) for i in range(QUERIES)} - {"3", "4", "5"}
    assert [d for _, d, _ in found["6"]] == best(VECTORS @ ASKED[6], 5)
    rejects = open_table(config.output).rejects()
    assert sorted(rejects["row"].to_pylist()) == [3, 4, 5]
    wrong = pa.table({"id": ["a"], "v": [[1.0, 2.0]]})
    pq.write_table(wrong, folder / "a.parquet")
    with pytest.raises(ConfigError, match="lists of another length"):
        search_index(replace(config, queries=str(folder), id_column="id", vector_column="v"))


@pytest.mark.slow
def test_rescoring_makes_scores_exact(config, tmp_path):
    index = build(f"{tmp_path}/rough", "PQ8x4")
    rough = replace(config, index=index)
    search_index(rough)
    search_index(replace(rough, output=f"{config.output}-exact", rescore=40))
    exact = run_of(f"{config.output}-exact")

    def recall(found) -> float:
        hits = [
            len({d for _, d, _ in found[q]} & set(best(VECTORS @ ASKED[i], 5)))
            for i, q in enumerate(QUERY_IDS)
        ]
        return float(np.mean(hits)) / 5

    assert recall(exact) > recall(run_of(config.output)) + 0.2
    for i in (0, 7):
        _, document, score = exact[f"q{i}"][0]
        own = [row for row in range(ROWS) if DOC_IDS[row] == document]
        assert any(score == pytest.approx(float(VECTORS[r] @ ASKED[i]), abs=1e-5) for r in own)


def test_queries_of_another_model_are_refused_with_both_fingerprints(config):
    other = FINGERPRINT | {"dims": [DIM], "weights_sha256": "other"}
    write_vectors(config.queries, {"a": rows_table(ASKED, QUERY_IDS)}, fingerprint=other)
    with pytest.raises(ConfigError, match=r"different models.*'w'.*'other'"):
        search_index(config)
    narrow = FINGERPRINT | {"dims": [8]}
    write_vectors(config.queries, {"a": rows_table(ASKED[:, :8], QUERY_IDS)}, fingerprint=narrow)
    with pytest.raises(ConfigError, match="no column of 32 components"):
        search_index(config)


def test_what_is_no_index_is_refused(config):
    with pytest.raises(ConfigError, match="holds vectors, not an index"):
        search_index(replace(config, index=config.queries))
    with pytest.raises(NoInputError, match="no published generation"):
        search_index(replace(config, index=f"{config.output}/nothing"))
    with pytest.raises(ConfigError, match="holds index; give texts, vectors"):
        search_index(replace(config, queries=config.index))


def test_a_damaged_shard_is_a_typed_error(config, tmp_path):
    index = build(f"{tmp_path}/damaged", "Flat")
    table = open_table(index)
    shard = stored_shards(table.storage, table.generation)[1]
    data = bytearray(table.storage.read(shard.index["path"]))
    data[1000] ^= 1
    table.storage.write(shard.index["path"], bytes(data))
    with pytest.raises(IntegrityError, match="damaged or replaced"):
        search_index(replace(config, index=index))
    assert latest_generation(Storage(config.output)) is None


def test_a_dry_run_plans_and_writes_nothing(config):
    plan = search_index(replace(config, dry_run=True))
    assert (plan["queries"], plan["shards"], plan["groups"]) == (QUERIES, 3, 1)
    assert list(Storage(config.output).iter_objects()) == []


@pytest.fixture(scope="module")
def text_index(ray_cluster, tmp_path_factory, tiny_model) -> str:
    root = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"doc_id": f"d{i}", "text": f"number {i} of many"}) for i in range(200)]
    Storage(str(root)).write("corpus/a.jsonl", "\n".join(lines).encode())
    embed_corpus(
        EmbedCorpusConfig(
            input=f"{root}/corpus", output=f"{root}/vectors", model=tiny_model, dtype="float32"
        )
    )
    build_index(BuildIndexConfig(vectors=f"{root}/vectors", output=f"{root}/index", num_probes=20))
    return f"{root}/index"


def text_config(text_index: str, tmp_path: Path, **changes) -> SearchIndexConfig:
    lines = [json.dumps({"query_id": f"q{i}", "text": f"number {i} of"}) for i in range(30)]
    Storage(str(tmp_path)).write("queries.jsonl", "\n".join(lines).encode())
    return SearchIndexConfig(
        index=text_index,
        queries=f"{tmp_path}/queries.jsonl",
        output=f"{tmp_path}/run",
        top_k=3,
        **changes,
    )


def test_text_queries_are_embedded_as_alone(text_index, tmp_path, tiny_model):
    config = text_config(text_index, tmp_path)
    summary = search_index(config)
    assert (summary["queries"], summary["rows"]) == (30, 90)
    embedder = EmbedderConfig(model_path=Path(tiny_model), dtype="float32").build()
    prompt = query_prompt(embedder.spec.prompts, architecture=embedder.spec.architecture)
    tokens = TextTokenizer.load(Path(tiny_model)).encode(
        [f"{prompt}number {i} of" for i in range(30)]
    )
    alone = embedder.embed(tokens.ids, tokens.lengths)
    stored = open_vectors(f"{config.output}/query-vectors").to_table(["doc_id", "vector"])
    order = np.argsort([int(name[1:]) for name in stored["doc_id"].to_pylist()])
    cosines = (vector_matrix(stored["vector"].combine_chunks())[order] * alone).sum(axis=1)
    assert cosines.min() >= 0.99999
    corpus = open_vectors(text_index.replace("/index", "/vectors")).to_table(["doc_id", "vector"])
    scores = alone @ vector_matrix(corpus["vector"].combine_chunks()).T
    ids = corpus["doc_id"].to_pylist()
    found = run_of(config.output)
    for i in range(30):
        top = np.sort(scores[i])[::-1][:3]
        np.testing.assert_allclose([s for _, _, s in found[f"q{i}"]], top, atol=1e-5)
        assert found[f"q{i}"][0][1] in {ids[r] for r in np.flatnonzero(scores[i] > top[0] - 1e-5)}


def test_another_model_or_a_missing_one_is_refused_before_embedding(text_index, tmp_path):
    other = write_tiny_encoder(tmp_path / "other", seed=7)
    config = text_config(text_index, tmp_path, model=str(other))
    with pytest.raises(ConfigError, match=r"different models, they differ in \['weights_sha256'\]"):
        search_index(config)
    with pytest.raises(ConfigError, match="No model directory"):
        search_index(replace(config, model="no/such-model"))
    assert not Path(config.output, "query-vectors").exists()


def test_a_dry_run_of_texts_estimates_their_embedding(text_index, tmp_path):
    plan = search_index(text_config(text_index, tmp_path, dry_run=True))
    assert plan["embed_queries"]["rows_estimated"] == 30
