"""Tables embedded by a model with int8 weights, and the queries that meet them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qbatch
from qbatch.errors import ConfigError
from qbatch.index.columns import check_same_space
from qbatch.manifest import Generation
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus, planned_fingerprint
from qbatch.pipelines.negative_search import IndexModel, scoring_task
from qbatch.pipelines.pair_source import pair_source
from qbatch.pipelines.parity import ParityConfig, parity
from qbatch.pipelines.search_index import SearchIndexConfig, embed_config
from qbatch.schema import FILES, Weights
from qbatch.storage import Storage
from tests.tiny_models import write_tiny_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Weights large enough that rounding them can be seen."""
    folder = tmp_path_factory.mktemp("model")
    return str(write_tiny_encoder(folder, initializer_range=0.5))


@pytest.fixture
def config(tmp_path, model) -> EmbedCorpusConfig:
    lines = [json.dumps({"doc_id": f"d{i}", "text": f"number {i} of many"}) for i in range(60)]
    Storage(f"{tmp_path}/corpus").write("a.jsonl", "\n".join(lines).encode())
    return EmbedCorpusConfig(
        input=f"{tmp_path}/corpus",
        output=f"{tmp_path}/vectors",
        model=model,
        dtype="float32",
    )


def test_int8_has_a_fingerprint_of_its_own_and_leaves_the_others_alone(config):
    before = planned_fingerprint(config)
    assert "weights" not in before
    rounded = planned_fingerprint(replace(config, weights="int8", dtype="auto"))
    assert rounded == {**before, "weights": "int8"}
    check_same_space(before, before)
    with pytest.raises(ConfigError, match=r"different models, they differ in \['weights'\]"):
        check_same_space(before, rounded)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dtype": "bfloat16"}, "with dtype 'bfloat16'"),
        ({"gpus_per_actor": 1.0}, "allowed is 0, int8 weights compute on CPUs"),
        ({"engine": "http", "endpoint": "http://x"}, "allowed is --engine=local"),
    ],
)
def test_what_cannot_compute_in_int8_is_refused(config, settings, match):
    with pytest.raises(ConfigError, match=match):
        replace(config, weights="int8", **settings)


def test_queries_are_embedded_as_the_index_was(config, tmp_path):
    for weights in ("float", "int8"):
        embedding = planned_fingerprint(replace(config, weights=weights))
        details = {"embedding": {"model": config.model, "revision": None}}
        index = Generation(
            kind="index",
            fingerprint={"embedding": embedding, "dim": 32},
            config={},
            counts={},
            files=FILES.empty_table(),
            rejects=FILES.empty_table(),
            details=details,
        )
        search = SearchIndexConfig(index="i", queries="q.jsonl", output=f"{tmp_path}/run")
        assert embed_config(search, index).weights == weights
        model = IndexModel(model=config.model, revision=None, embedding=embedding, dim=32)
        source = pair_source(config.input, file_format="auto", keep_columns=(), unit_bytes=1024)
        assert scoring_task(source, model, "out", None)[0].embed.weights == weights


def test_parity_tells_what_int8_costs(config):
    settings = ParityConfig(
        input=config.input, model=config.model, other_weights="int8", min_cosine=0, min_overlap=0
    )
    assert 0.98 < parity(settings)["cosine_min"] < 0.999999


@pytest.mark.ray
def test_an_index_answers_texts_with_its_own_weights(ray_cluster, config, tmp_path):
    embed_corpus(replace(config, weights="int8"))
    index = f"{tmp_path}/index"
    build_index(
        BuildIndexConfig(
            vectors=config.output, output=index, factory="Flat", num_shards=1, num_probes=5
        )
    )
    matrix = qbatch.open_vectors(config.output).to_matrix()
    asked = ["number 7 of", "many"]
    found = qbatch.open_index(index).search(asked, top_k=1)["score"].to_numpy()
    expected, others = (
        np.max(vectors(config.model, asked, weights) @ matrix.T, axis=1)
        for weights in ("int8", "float")
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - others).max() > 1e-5


def vectors(model: str, texts: list[str], weights: Weights) -> np.ndarray:
    embedder = EmbedderConfig(model_path=Path(model), dtype="float32", weights=weights).build()
    batch = TextTokenizer.load(embedder.spec.path).encode(texts)
    return embedder.embed(batch.ids, batch.lengths)
