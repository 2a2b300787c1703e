"""Opening what was published, without Ray."""

import subprocess
import sys

import numpy as np
import pytest

import qbatch
from qbatch.errors import ConfigError, NoInputError
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.schema import vector_matrix
from tests.published_tables import publish_texts
from tests.tiny_models import write_tiny_encoder

TEXTS = [f"text number {i} about {'cats' if i % 2 else 'dogs'}" for i in range(60)]


@pytest.fixture(scope="module")
def published(ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    model = write_tiny_encoder(folder / "model")
    publish_texts(folder, model, TEXTS)
    return folder


@pytest.mark.ray
def test_an_index_answers_vectors_and_texts(published):
    index = qbatch.open_index(f"{published}/index")
    vectors = qbatch.open_vectors(f"{published}/vectors").to_table()
    matrix = qbatch.open_vectors(f"{published}/vectors").to_matrix()
    assert np.array_equal(matrix, vector_matrix(vectors["vector"]))
    hits = index.search(matrix[:5], top_k=3)
    assert hits["rank"].to_pylist() == [1, 2, 3] * 5
    best = np.sort(matrix[:5] @ matrix.T, axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(hits["score"].to_numpy().reshape(5, 3), best, atol=1e-5)
    assert hits["doc_id"].to_pylist()[::3] == vectors["doc_id"].to_pylist()[:5]

    asked = ["something about cats", "dogs number 7"]
    embedder = EmbedderConfig(model_path=published / "model", dtype="float32").build()
    batch = TextTokenizer.load(embedder.spec.path).encode(asked)
    expected = np.sort(embedder.embed(batch.ids, batch.lengths) @ matrix.T, axis=1)[:, -1]
    found = index.search(asked, top_k=1)
    np.testing.assert_allclose(found["score"].to_numpy(), expected, atol=1e-5)


@pytest.mark.ray
def test_what_does_not_fit_is_refused(published, tmp_path):
    index = qbatch.open_index(f"{published}/index")
    with pytest.raises(ConfigError, match=r"queries have the shape \(2, 3\), the index takes"):
        index.search(np.zeros((2, 3), np.float32))
    other = write_tiny_encoder(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="come from different models"):
        index.search(["cats"], model=str(other))
    with pytest.raises(ConfigError, match="holds index, not run"):
        qbatch.open_run(f"{published}/index")
    with pytest.raises(NoInputError):
        qbatch.open_index(f"{published}/nothing")


@pytest.mark.ray
def test_the_command_lists_jobs_and_tells_what_was_published(published):
    def say(*arguments: str) -> str:
        command = [sys.executable, "-m", "qbatch", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "python jobs/embed_corpus.py" in say()
    said = say(f"{published}/index")
    assert "index generation 1" in said
    assert f"ntotal: {len(TEXTS)}" in said
    assert "nothing was published" in say(f"{published}/nothing")
