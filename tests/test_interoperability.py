"""What was published, in the hands of tools that know nothing of qbatch."""

import lance
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer, util

import qbatch
from tests.published_tables import publish_texts
from tests.tiny_models import write_tiny_encoder

pytestmark = pytest.mark.ray

TEXTS = [f"{word} {i}" for i, word in enumerate(["lamp", "river", "stone", "cloud"] * 20)]


@pytest.fixture(scope="module")
def published(ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interoperability")
    model = write_tiny_encoder(folder / "model")
    publish_texts(folder, model, TEXTS)
    return folder


@pytest.fixture(scope="module")
def questions(published) -> np.ndarray:
    model = SentenceTransformer(f"{published}/model", device="cpu")
    return model.encode(["a lamp", "some cloud", "stone 30"])


def expected(published, questions) -> list[list[str]]:
    hits = qbatch.open_index(f"{published}/index").search(questions, top_k=5)
    return [hits["doc_id"].to_pylist()[5 * i : 5 * i + 5] for i in range(len(questions))]


def test_sentence_transformers_searches_our_vectors_with_its_own_queries(published, questions):
    table = qbatch.open_vectors(f"{published}/vectors")
    hits = util.semantic_search(questions, table.to_matrix(), top_k=5)
    ids = table.to_table(["doc_id"])["doc_id"].to_pylist()
    found = [[ids[hit["corpus_id"]] for hit in own] for own in hits]
    assert found == expected(published, questions)


def test_lance_takes_the_vectors_table_and_finds_the_same(published, questions, tmp_path):
    table = qbatch.open_vectors(f"{published}/vectors").to_table()
    lance.write_dataset(table, tmp_path / "vectors.lance")
    dataset = lance.dataset(tmp_path / "vectors.lance")
    assert dataset.count_rows() == len(TEXTS)
    found = [
        dataset.to_table(
            columns=["doc_id", "_distance"],
            nearest={"column": "vector", "q": question, "k": 5, "metric": "cosine"},
        )["doc_id"].to_pylist()
        for question in questions
    ]
    assert found == expected(published, questions)
