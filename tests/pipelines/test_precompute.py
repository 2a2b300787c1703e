"""The precompute job in this process, against numpy over all documents."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.cli import parse
from qbatch.errors import ConfigError, IntegrityError
from qbatch.manifest import latest_generation
from qbatch.models.rerank_tokens import CandidateGroup
from qbatch.models.reranker import RerankerConfig
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.precompute import PrecomputeConfig, precompute
from qbatch.pipelines.precompute_slices import partitions_of
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from qbatch.quickstart.answers import read_related
from qbatch.schema import LOCATED_RUN, RECOMMENDATION_CHANGES, RECOMMENDATIONS, vector_matrix
from qbatch.storage import Storage
from qbatch.tables import PublishedTable, open_table, open_vectors
from tests.vector_tables import clustered, rows_table, split_files, write_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROWS, DIM, TOP_K, PARTITIONS = 600, 16, 5, 4
CATEGORIES = [["a", "b", None][i % 3] for i in range(ROWS)]


def near_copies(vectors: np.ndarray) -> np.ndarray:
    """Make every tenth vector nearly the one before it, and every 50th exactly that."""
    rng = np.random.default_rng(5)
    for i in range(1, len(vectors), 10):
        moved = vectors[i - 1] + 0.02 * rng.standard_normal(vectors.shape[1])
        vectors[i] = vectors[i - 1] if i % 50 == 1 else moved / np.linalg.norm(moved)
    return vectors


VECTORS = near_copies(clustered(ROWS, DIM))
DOC_IDS = [f"d{i}" for i in range(ROWS)]


def content_hashes(vectors: np.ndarray) -> pa.Array:
    return pa.array([v.tobytes()[:16] for v in vectors], pa.binary(16))


def write_corpus(uri: str, vectors: np.ndarray, doc_ids: list[str], categories=CATEGORIES) -> None:
    kept = {"category": categories, "content_hash": content_hashes(vectors)}
    write_vectors(f"{uri}/vectors", split_files(rows_table(vectors, doc_ids, kept), 6))
    config = BuildIndexConfig(
        vectors=f"{uri}/vectors",
        output=f"{uri}/index",
        factory="Flat",
        num_shards=2,
        num_probes=20,
    )
    build_index(config)


@pytest.fixture(scope="module")
def corpus_uri(ray_cluster, tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("corpus"))
    write_corpus(uri, VECTORS, DOC_IDS)
    return uri


def items_config(corpus_uri: str, output: str, **changes) -> PrecomputeConfig:
    return PrecomputeConfig(
        index=f"{corpus_uri}/index",
        output=output,
        mode="items",
        top_k=TOP_K,
        candidates_k=ROWS,
        num_partitions=PARTITIONS,
        **changes,
    )


@pytest.fixture
def config(corpus_uri, tmp_path) -> PrecomputeConfig:
    return items_config(corpus_uri, f"{tmp_path}/related")


def stored(uri: str) -> dict[str, list[tuple[str, float]]]:
    """Return the table as a key-value store, after checking what holds for every table."""
    table = open_table(uri)
    found = {}
    for number, rows in enumerate(partition_tables(table)):
        assert rows.schema.equals(RECOMMENDATIONS)
        keys = rows["key"].to_pylist()
        assert keys == sorted(set(keys))
        assert (partitions_of(rows["key"], PARTITIONS) == number).all()
        for row in rows.to_pylist():
            found[row["key"]] = [(item["doc_id"], item["score"]) for item in row["items"]]
    return found


def partition_tables(table: PublishedTable) -> list[pa.Table]:
    by_path = {entry["path"]: entry for entry in table.generation.files.to_pylist()}
    plan = pa.BufferReader(table.storage.read(table.generation.plan["path"]))
    rows = pq.read_table(plan).to_pylist()
    assert [json.loads(row["spans"])["partition"] for row in rows] == list(range(PARTITIONS))
    return [table.read_file(by_path[row["path"]]) for row in rows]


def expected(
    vectors: np.ndarray,
    doc_ids: list[str],
    *,
    max_similarity: float = 2.0,
    same=None,
    diversity: float = 0.0,
) -> dict[str, list[str]]:
    """The related documents of each, with plain loops."""
    scores = vectors @ vectors.T
    hashes = content_hashes(vectors).to_pylist()
    related = {}
    for i, key in enumerate(doc_ids):
        allowed = [
            j
            for j in np.argsort(-scores[i], kind="stable").tolist()
            if doc_ids[j] != key
            and hashes[j] != hashes[i]
            and scores[i, j] <= max_similarity
            and (same is None or (same[i] is not None and same[j] == same[i]))
        ]
        allowed = [j for j in allowed if all(k >= j for k in allowed if hashes[k] == hashes[j])]
        chosen: list[int] = []
        while allowed and len(chosen) < TOP_K:
            gains = [
                (1 - diversity) * scores[i, j]
                - (diversity * max(scores[j, k] for k in chosen) if chosen and diversity else 0)
                for j in allowed
            ]
            chosen.append(allowed.pop(int(np.argmax(gains))))
        related[key] = [doc_ids[j] for j in chosen]
    return related


def names(found: dict[str, list[tuple[str, float]]]) -> dict[str, list[str]]:
    return {key: [doc_id for doc_id, _ in items] for key, items in found.items()}


def assert_related(uri: str, **options) -> None:
    found = stored(uri)
    assert names(found) == expected(VECTORS, DOC_IDS, **options)
    for key in ("d0", "d1", "d599"):
        for doc_id, score in found[key]:
            product = VECTORS[int(key[1:])] @ VECTORS[int(doc_id[1:])]
            assert score == pytest.approx(float(product), abs=1e-5)


def test_every_document_has_its_nearest_others_and_a_second_run_makes_nothing(config):
    summary = precompute(config)
    assert (summary["generation"], summary["keys"], summary["items"]) == (1, ROWS, ROWS * TOP_K)
    assert (summary["partitions_made"], summary["partitions_reused"]) == (PARTITIONS, 0)
    assert (summary["changed_keys"], summary["removed_keys"]) == (ROWS, 0)
    assert_related(config.output)
    storage = Storage(config.output)
    assert json.loads(storage.read("report.json")) == summary
    shown = read_related(config.output, ["d5", "d7"])
    assert {key: [hit.doc_id for hit in hits] for key, hits in shown.items()} == {
        key: expected(VECTORS, DOC_IDS)[key] for key in ("d5", "d7")
    }
    assert open_table(f"{config.output}/run").to_table().schema.equals(LOCATED_RUN)
    before = {o.path: o.version for o in storage.iter_objects() if "manifests" not in o.path}
    again = precompute(config)
    assert (again["generation"], again["changed_keys"], again["partitions_made"]) == (1, 0, 0)
    written = {o.path for o in storage.iter_objects() if before.get(o.path, o.version) != o.version}
    assert not [path for path in written if "data/" in path or "partials/" in path]


@pytest.mark.slow
def test_near_duplicates_and_other_categories_are_left_out(config):
    precompute(replace(config, max_similarity=0.97))
    assert_related(config.output, max_similarity=0.97)
    assert names(stored(config.output)) != expected(VECTORS, DOC_IDS)
    summary = precompute(replace(config, max_similarity=0.97, same="category"))
    assert_related(config.output, max_similarity=0.97, same=CATEGORIES)
    without = sum(category is None for category in CATEGORIES)
    assert (summary["keys"], summary["keys_without_items"]) == (ROWS, without)


@pytest.mark.slow
def test_diversity_is_maximal_marginal_relevance(config):
    precompute(replace(config, diversity=0.5, candidates_k=20))
    deep = names(stored(config.output))
    precompute(replace(config, diversity=0.5))
    assert_related(config.output, diversity=0.5)
    assert deep != expected(VECTORS, DOC_IDS)


@pytest.mark.slow
def test_it_works_over_s3(s3_bucket):
    write_corpus(s3_bucket, VECTORS, DOC_IDS)
    config = items_config(s3_bucket, f"{s3_bucket}/related", diversity=0.3)
    precompute(config)
    assert_related(config.output, diversity=0.3)


def test_a_night_with_one_percent_of_change_lists_only_the_affected_keys(tmp_path):
    write_corpus(str(tmp_path), VECTORS, DOC_IDS)
    config = items_config(str(tmp_path), f"{tmp_path}/related")
    precompute(config)
    before = stored(config.output)
    vectors, doc_ids, categories = VECTORS[2:].copy(), DOC_IDS[2:], CATEGORIES[2:]
    vectors[100:104] = clustered(4, DIM, seed=9)
    write_corpus(str(tmp_path), vectors, [*doc_ids[:-1], "new"], categories)
    summary = precompute(config)
    after = stored(config.output)
    assert names(after) == expected(vectors, [*doc_ids[:-1], "new"])
    changed = {key for key in after if key not in before or not alike(after[key], before[key])}
    removed = before.keys() - after.keys()
    assert removed == {"d0", "d1", "d599"}
    assert 4 <= len(changed) < ROWS / 5
    assert (summary["changed_keys"], summary["removed_keys"]) == (len(changed), 3)
    put, deleted = read_delta(config.output)
    assert put == {key: after[key] for key in changed}
    assert deleted == removed
    # a store that held the generation before now holds this one
    loaded = {key: items for key, items in (before | put).items() if key not in deleted}
    assert names(loaded) == names(after)
    # until the index is built again, its own documents ask
    write_vectors(f"{tmp_path}/vectors", {"x": rows_table(VECTORS[:9], DOC_IDS[:9])})
    again = precompute(config)
    assert (again["generation"], again["changed_keys"], again["removed_keys"]) == (2, 0, 0)
    assert read_delta(config.output) == (put, deleted)


@pytest.mark.slow
def test_a_chain_of_jobs_stays_with_the_generations_it_began_with(tmp_path):
    """Between any two jobs of the chain another writer publishes."""
    write_corpus(str(tmp_path), VECTORS, DOC_IDS)
    others = clustered(200, DIM, seed=4)
    other_ids = [f"n{i}" for i in range(200)]
    kept = {"category": CATEGORIES[:200], "content_hash": content_hashes(others)}
    write_vectors(f"{tmp_path}/vectors", split_files(rows_table(others, other_ids, kept), 2))
    index = BuildIndexConfig(
        vectors=f"{tmp_path}/vectors",
        output=f"{tmp_path}/index",
        factory="Flat",
        num_probes=20,
    )
    pinned = build_index(replace(index, vectors_generation=1, num_shards=1))
    assert pinned["ntotal"] == ROWS
    details = open_table(index.output, pinned["generation"]).generation.details
    assert details["vectors"]["generation"] == 1
    assert build_index(index)["ntotal"] == 200

    write_vectors(f"{tmp_path}/queries", {"q": rows_table(VECTORS[:50], DOC_IDS[:50])})
    search = SearchIndexConfig(
        index=index.output,
        index_generation=pinned["generation"],
        queries=f"{tmp_path}/queries",
        output=f"{tmp_path}/run",
        top_k=1,
    )
    search_index(search)
    assert found_first(search.output) <= set(DOC_IDS)
    search_index(replace(search, index_generation=None))
    assert found_first(search.output) <= set(other_ids)

    config = items_config(str(tmp_path), f"{tmp_path}/related")
    precompute(replace(config, index_generation=pinned["generation"]))
    assert_related(config.output)
    assert precompute(config)["keys"] == 200


def found_first(uri: str) -> set[str]:
    return set(open_table(uri).to_table(["doc_id"])["doc_id"].to_pylist())


def alike(left, right) -> bool:
    return [d for d, _ in left] == [d for d, _ in right] and all(
        abs(a - b) <= 1e-5 for (_, a), (_, b) in zip(left, right, strict=True)
    )


def read_delta(uri: str) -> tuple[dict, set]:
    table = open_table(uri)
    delta = table.generation.details["delta"]
    assert delta["against"] == table.generation.number - 1
    put, deleted = {}, set()
    for entry in delta["files"]:
        rows = table.read_file(entry)
        assert rows.schema.equals(RECOMMENDATION_CHANGES)
        for row in rows.to_pylist():
            if row["deleted"]:
                assert row["items"] == []
                deleted.add(row["key"])
            else:
                put[row["key"]] = [(item["doc_id"], item["score"]) for item in row["items"]]
    return put, deleted


@pytest.mark.slow
def test_partitions_with_the_same_content_are_not_written_again(tmp_path):
    """Queries that are searched again, in other blocks, and one of them with another vector."""
    write_corpus(str(tmp_path), VECTORS, DOC_IDS)
    asked = clustered(200, DIM, seed=3)
    ids = [f"q{i}" for i in range(200)]
    config = replace(
        items_config(str(tmp_path), f"{tmp_path}/answers"),
        mode="queries",
        queries=f"{tmp_path}/queries",
        diversity=0.2,
        candidates_k=20,
    )
    write_vectors(config.queries, split_files(rows_table(asked, ids), 4))
    precompute(config)
    before = {e["path"] for e in open_table(config.output).generation.files.to_pylist()}
    asked[7] = -asked[7]
    write_vectors(config.queries, split_files(rows_table(asked, ids), 4))
    summary = precompute(config)
    assert (summary["partitions_made"], summary["changed_keys"]) == (1, 1)
    after = {e["path"] for e in open_table(config.output).generation.files.to_pylist()}
    assert len(before & after) == PARTITIONS - 1
    assert read_delta(config.output)[0].keys() == {"q7"}


@pytest.mark.slow
def test_what_is_lost_is_made_again_byte_for_byte(config):
    """A job killed anywhere leaves less than this: some files of each step, and no manifests."""
    config = replace(config, max_similarity=0.97, diversity=0.2)
    precompute(config)
    storage = Storage(config.output)
    outputs = [o.path for o in storage.iter_objects() if "/manifests/" not in f"/{o.path}"]
    whole = {path: storage.read(path) for path in outputs if "report." not in path}
    lost = sorted(whole)[::2] + [
        o.path for o in storage.iter_objects() if "/manifests/" in f"/{o.path}"
    ]
    for path in lost:
        storage.delete(path)
    summary = precompute(config)
    assert {path: storage.read(path) for path in whole} == whole
    assert (summary["generation"], summary["keys"]) == (1, ROWS)
    assert summary["partitions_reused"] > 0
    assert_related(config.output, max_similarity=0.97, diversity=0.2)


def test_a_damaged_slice_is_a_typed_error(config):
    precompute(config)
    storage = Storage(config.output)
    path = next(o.path for o in storage.iter_objects("partials") if o.size > 10_000)
    data = storage.read(path).replace(b"d10", b"d11")
    storage.write(path, data)
    for o in list(storage.iter_objects()):
        if o.path.startswith(("data/", "manifests/")):
            storage.delete(o.path)
    with pytest.raises(IntegrityError, match="is not what was written"):
        precompute(config)
    assert latest_generation(storage) is None


def test_every_query_has_a_row_and_of_a_repeated_one_the_best_list(corpus_uri, tmp_path):
    asked = clustered(50, DIM, seed=3)
    ids = [f"q{i % 40}" for i in range(50)]
    tables = {"a": rows_table(asked[:25], ids[:25]), "b": rows_table(asked[25:], ids[25:])}
    write_vectors(f"{tmp_path}/queries", tables)
    config = replace(
        items_config(corpus_uri, f"{tmp_path}/answers"),
        mode="queries",
        queries=f"{tmp_path}/queries",
    )
    summary = precompute(config)
    assert (summary["keys"], summary["repeated_keys"]) == (40, 10)
    found = stored(config.output)
    for i in range(40):
        asking = [asked[j] for j in range(i, 50, 40)]
        scores = max((VECTORS @ vector for vector in asking), key=max)
        ranked = np.sort(scores)[::-1][:TOP_K]
        np.testing.assert_allclose([s for _, s in found[f"q{i}"]], ranked, atol=1e-5)
        for doc_id, score in found[f"q{i}"]:
            assert score == pytest.approx(float(scores[int(doc_id[1:])]), abs=1e-5)
    nothing = precompute(replace(config, filter='category == "none such"'))
    assert (nothing["keys"], nothing["items"], nothing["keys_without_items"]) == (40, 0, 40)
    assert stored(config.output) == {f"q{i}": [] for i in range(40)}
    assert read_delta(config.output) == ({f"q{i}": [] for i in range(40)}, set())


@pytest.mark.slow
def test_text_queries_are_answered(ray_cluster, tiny_model, tmp_path):
    texts_uri(tmp_path, tiny_model)
    config = PrecomputeConfig(
        index=f"{tmp_path}/index",
        queries=f"{tmp_path}/log.jsonl",
        output=f"{tmp_path}/answers",
        top_k=3,
        num_partitions=PARTITIONS,
    )
    assert precompute(replace(config, dry_run=True))["steps"] == ["run", "recommendations"]
    precompute(config)
    found = stored(config.output)
    queries = open_vectors(f"{config.output}/run/query-vectors").to_table(["doc_id", "vector"])
    corpus = open_vectors(f"{tmp_path}/vectors").to_table(["doc_id", "vector"])
    scores = vector_matrix(queries["vector"]) @ vector_matrix(corpus["vector"]).T
    assert len(found) == 10
    for key, row in zip(queries["doc_id"].to_pylist(), scores, strict=True):
        np.testing.assert_allclose([s for _, s in found[key]], np.sort(row)[::-1][:3], atol=1e-5)


def texts_uri(tmp_path, tiny_model) -> str:
    """A hundred short texts, their vectors and index, and ten queries."""
    storage = Storage(str(tmp_path))
    rows = [{"doc_id": f"d{i}", "text": f"number {i} of many"} for i in range(100)]
    asked = [{"query_id": f"q{i}", "text": f"{i} of many number"} for i in range(10)]
    for name, lines in (("corpus/a.jsonl", rows), ("log.jsonl", asked)):
        storage.write(name, "\n".join(map(json.dumps, lines)).encode())
    vectors = EmbedCorpusConfig(
        input=f"{tmp_path}/corpus", output=f"{tmp_path}/vectors", model=tiny_model, dtype="float32"
    )
    embed_corpus(vectors)
    build_index(BuildIndexConfig(vectors=vectors.output, output=f"{tmp_path}/index", num_probes=20))
    return str(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["queries", "items"])
def test_a_reranker_puts_the_candidates_in_order(
    ray_cluster, mode, tmp_path, tiny_model, tiny_reranker
):
    uri = texts_uri(tmp_path, tiny_model)
    config = PrecomputeConfig(
        index=f"{uri}/index",
        mode=mode,
        queries=f"{uri}/log.jsonl" if mode == "queries" else None,
        output=f"{uri}/answers",
        top_k=3,
        reranker=tiny_reranker,
        rerank_k=8,
        corpus=f"{uri}/corpus",
        num_partitions=PARTITIONS,
    )
    made = ["candidates"] if mode == "items" else []
    steps = ["run", *made, "reranked", "recommendations"]
    assert precompute(replace(config, dry_run=True))["steps"] == steps
    precompute(config)
    texts = {f"d{i}": f"number {i} of many" for i in range(100)}
    asks = {f"q{i}": f"{i} of many number" for i in range(10)} if mode == "queries" else texts
    found = stored(config.output)
    assert found.keys() == asks.keys()
    retrieved = open_table(f"{config.output}/{(made or ['run'])[0]}").to_table()
    candidates: dict[str, list[str]] = {}
    for row in retrieved.to_pylist():
        candidates.setdefault(row["query_id"], []).append(row["doc_id"])
    reranker = RerankerConfig(model_path=Path(tiny_reranker), dtype="float32").build()
    for key in list(asks)[:10]:
        assert len(candidates[key]) == 8
        assert key not in candidates[key]
        documents = [texts[d] for d in candidates[key]]
        (log_odds,) = reranker.score([CandidateGroup(query=asks[key], documents=documents)])
        best = np.sort(1 / (1 + np.exp(-log_odds)))[::-1][:3]
        np.testing.assert_allclose([score for _, score in found[key]], best, atol=1e-4)
    again = precompute(config)
    assert (again["changed_keys"], again["removed_keys"]) == (0, 0)


def test_a_dry_run_plans_and_writes_nothing(config):
    plan = precompute(replace(config, dry_run=True))
    assert plan["search"]["queries"] == ROWS
    assert plan["steps"] == ["run", "candidates", "recommendations"]
    assert list(Storage(config.output).iter_objects()) == []


def test_the_example_config_is_a_config():
    parsed = parse(PrecomputeConfig, ["--config", "jobs/configs/quickstart-related.toml"])
    assert (parsed.mode, parsed.max_similarity, parsed.depth) == ("items", 0.98, 25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": "x"}, "the documents of the index ask; leave it out"),
        ({"mode": "queries"}, "--mode=queries needs --queries"),
        ({"mode": "queries", "queries": "x", "same": "lang"}, "same is 'lang' with --mode=queries"),
        ({"mode": "queries", "queries": "x", "max_similarity": 0.9}, "max_similarity is 0.9 with"),
        ({"max_similarity": 1.5}, "max_similarity is 1.5; give a cosine"),
        ({"diversity": -0.1}, r"diversity is -0.1; give 0 \(off\) to 1"),
        ({"candidates_k": 4}, "candidates_k is 4, less than top_k=5"),
        ({"num_partitions": 0}, "num_partitions is 0; give 1 or more"),
        ({"num_partitions": 10**6}, "num_partitions is 1000000; give 65536 or fewer"),
        ({"filter": "x +"}, "cannot read --filter"),
        ({"reranker": "m"}, "reranker is 'm' without --corpus"),
        ({"corpus": "c"}, "corpus is 'c' without --reranker"),
        ({"reranker": "m", "corpus": "c", "rerank_k": 4}, "rerank_k is 4, less than top_k=5"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(items_config("nowhere", "nowhere"), **changes)


def test_what_does_not_fit_the_index_or_the_output_is_refused(config):
    with pytest.raises(ConfigError, match=r"same is 'brand', the index keeps \['category'"):
        precompute(replace(config, same="brand"))
    with pytest.raises(ConfigError, match="holds index, not recommendations"):
        precompute(replace(config, output=config.index))
    precompute(config)
    with pytest.raises(ConfigError, match="has 4 partitions; their number stays"):
        precompute(replace(config, num_partitions=8))
