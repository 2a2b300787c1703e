"""Real descriptions in eight shards: recall against exact search, and one FAISS index beside it.

The vectors stay in the cache of assets, where the embed job finds its finished units again.
"""

import json
import random
from pathlib import Path

import faiss
import numpy as np
import pytest

from qbatch.index.columns import VectorColumn
from qbatch.index.stored import stored_shards
from qbatch.index.training import Template
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from qbatch.quickstart.assets import cache_dir
from qbatch.tables import open_table, open_vectors
from tests import assets
from tests.tiny_models import write_tiny_encoder
from tests.vector_tables import rows_table, split_files, write_vectors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("ray_cluster"),
]

NUM_MINILM, NUM_QUERIES, NUM_SHARDS = 60_000, 1000, 8
FIRST_CHARACTERS = 60
"""Of a description's body, for the model that reads characters."""


def descriptions(*, with_body: bool) -> list[dict]:
    """Return distinct descriptions in random order: languages are mixed in all files.

    MiniLM gets the one-line form: sixty thousand of those take minutes, with bodies half an hour.
    """
    rows = {}
    for line in assets.debian_descriptions().open(encoding="utf-8"):
        row = json.loads(line)
        text = f"{row['synopsis']}. {row['body'][:FIRST_CHARACTERS]}"
        text = text if with_body else row["synopsis"]
        rows[text] = {"doc_id": row["id"], "text": text, "lang": row["lang"]}
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    return shuffled


def vectors_of(name: str, model: Path, num_rows: int | None) -> str:
    """Return the vectors table of some descriptions, embedding what is missing."""
    root = cache_dir() / "test-tables" / name
    corpus = root / "corpus"
    if not corpus.exists():
        staged = root / "staged"
        staged.mkdir(parents=True, exist_ok=True)
        rows = descriptions(with_body=num_rows is None)[:num_rows]
        for i in range(0, len(rows), 2000):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[i : i + 2000]]
            (staged / f"{i // 2000:03d}.jsonl").write_text("".join(lines), encoding="utf-8")
        staged.rename(corpus)
    config = EmbedCorpusConfig(
        input=str(corpus),
        output=str(root / "vectors"),
        model=str(model),
        keep_columns=("lang",),
        dtype="float32",
        unit_bytes=2**19,
    )
    embed_corpus(config)
    return config.output


def everything(vectors_uri: str, index_uri: str) -> tuple[np.ndarray, list[str]]:
    """Return all vectors and ids in the order of the index's rows."""
    index, table = open_table(index_uri), open_vectors(vectors_uri)
    column = VectorColumn.of(table.generation.fingerprint)
    parts = [p for s in stored_shards(index.storage, index.generation) for p in s.parts]
    tables = [table.read_file(part, ["doc_id", column.name]) for part in parts]
    ids = [doc_id for t in tables for doc_id in t["doc_id"].to_pylist()]
    return np.concatenate([column.matrix(t) for t in tables]), ids


def held_out(vectors: np.ndarray) -> np.ndarray:
    """Return queries that are no document: half way between two random ones."""
    rng = np.random.default_rng(0)
    pairs = rng.choice(len(vectors), (2, NUM_QUERIES), replace=False)
    middle = vectors[pairs[0]] + 0.6 * vectors[pairs[1]]
    return middle / np.linalg.norm(middle, axis=1, keepdims=True)


def search(tmp_path: Path, index_uri: str, queries: np.ndarray) -> tuple[list, np.ndarray]:
    """Return ids and scores of the job's run, in query order."""
    uri = f"{tmp_path}/queries-{Path(index_uri).name}"
    ids = [f"{i:06d}" for i in range(len(queries))]
    fingerprint = dict(open_table(index_uri).generation.fingerprint["embedding"])
    write_vectors(uri, split_files(rows_table(queries, ids), 3), fingerprint=fingerprint)
    run = f"{tmp_path}/run-{Path(index_uri).name}"
    search_index(SearchIndexConfig(index=index_uri, queries=uri, output=run))
    table = open_table(run).to_table().sort_by([("query_id", "ascending"), ("rank", "ascending")])
    shape = (len(queries), 10)
    return (
        np.array(table["doc_id"].to_pylist(), object).reshape(shape),
        table["score"].to_numpy().reshape(shape),
    )


def test_auto_reaches_its_recall_on_sixty_thousand_minilm_vectors(tmp_path):
    vectors_uri = vectors_of("minilm-60000", assets.minilm(), NUM_MINILM)
    config = BuildIndexConfig(
        vectors=vectors_uri, output=f"{tmp_path}/auto", num_shards=NUM_SHARDS, target_recall=0.95
    )
    summary = build_index(config)
    print(json.dumps(summary))
    assert summary["ntotal"] >= NUM_MINILM
    assert summary["num_shards"] == NUM_SHARDS
    assert summary["recall"]["10"] >= 0.95
    vectors, ids = everything(vectors_uri, config.output)
    queries = held_out(vectors)
    found, _ = search(tmp_path, config.output, queries)
    _, truth = faiss.knn(queries, vectors, 10, faiss.METRIC_INNER_PRODUCT)
    shared = [len(set(a) & {ids[r] for r in b}) for a, b in zip(found, truth.tolist(), strict=True)]
    print("recall@10 of other queries", np.mean(shared) / 10)
    assert np.mean(shared) / 10 >= 0.93  # of queries that did not choose the effort


@pytest.fixture(scope="module")
def all_vectors(ray_cluster, tmp_path_factory) -> str:
    model = cache_dir() / "test-tables" / "tiny-model"
    if not model.exists():
        write_tiny_encoder(tmp_path_factory.mktemp("tiny") / "model").rename(model)
    return vectors_of("tiny-all", model, None)


@pytest.mark.parametrize("factory", ["Flat", "IVF1024,Flat", "IVF1024,SQ8"])
def test_shards_find_what_one_faiss_index_finds(all_vectors, factory, tmp_path):
    config = BuildIndexConfig(
        vectors=all_vectors,
        output=f"{tmp_path}/{factory.replace(',', '-')}",
        factory=factory,
        num_shards=NUM_SHARDS,
        target_recall=0.5,
    )
    summary = build_index(config)
    print(json.dumps(summary))
    assert (summary["num_shards"], summary["ntotal"] > 200_000) == (NUM_SHARDS, True)
    vectors, ids = everything(all_vectors, config.output)
    index = open_table(config.output)
    template = index.generation.details["training"]["template"]
    whole = Template(index.storage.read(template["path"])).copy()
    whole.add(vectors)
    queries = held_out(vectors)
    if nprobe := index.generation.details["search"].get("nprobe"):
        whole.nprobe = nprobe
    distances, rows = whole.search(queries, 10)
    found, scores = search(tmp_path, config.output, queries)
    np.testing.assert_allclose(scores, 1 - distances / 2, atol=1e-5)
    wanted = np.array([[ids[r] for r in line] for line in rows.tolist()], object)
    # Places may only be exchanged among scores that are equal to float32's rounding.
    for query, place in np.argwhere(found != wanted):
        ties = np.abs(scores[query] - scores[query, place]) < 2e-6
        assert found[query, place] in wanted[query, ties] or ties[-1]
