"""Two engines of one model may share an index, two models may not."""

from dataclasses import replace

import numpy as np
import pytest

from qbatch.errors import ConfigError, QualityGateError
from qbatch.pipelines.parity import ParityConfig, compare, parity
from tests.candidate_tables import write_lines
from tests.embedding_server import embedding_server
from tests.tiny_models import write_tiny_encoder


@pytest.fixture
def config(tmp_path, tiny_model) -> ParityConfig:
    rows = [{"text": f"text number {i} {'of many ' * (i % 5)}"} for i in range(80)]
    write_lines(f"{tmp_path}/texts.jsonl", rows)
    return ParityConfig(
        input=f"{tmp_path}/texts.jsonl", model=tiny_model, dtype="float32", other_dtype="bfloat16"
    )


def test_a_server_of_the_same_model_may_share_an_index(config):
    with embedding_server(config.model) as (endpoint, state):
        found = parity(replace(config, other_dtype=None, endpoint=endpoint, served_model="m"))
    assert found["texts"] == 80
    assert found["may_share_an_index"]
    assert found["cosine_min"] >= 0.99999
    assert found["overlap"] == 1.0
    assert state.statuses[200] > 0


def test_a_server_of_another_model_may_not(config, tmp_path):
    other = write_tiny_encoder(tmp_path / "other", seed=1)
    with (
        embedding_server(str(other)) as (endpoint, _),
        pytest.raises(QualityGateError, match="must not share an index: the smallest cosine is"),
    ):
        parity(replace(config, other_dtype=None, endpoint=endpoint))


def test_bfloat16_is_close_and_measured(config):
    found = parity(replace(config, min_overlap=0.5))
    assert 0.999 <= found["cosine_min"] < 1


def test_a_text_without_a_number_fails():
    vectors = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    broken = vectors.copy()
    broken[3] = np.nan
    assert compare(vectors, vectors) == {"cosine_min": 1.0, "cosine_mean": 1.0, "overlap": 1.0}
    assert compare(vectors, broken)["cosine_min"] == -1.0


def test_one_other_engine_is_asked_for(config):
    with pytest.raises(ConfigError, match="give one of them"):
        replace(config, endpoint="http://x")
    with pytest.raises(ConfigError, match="give one of them"):
        replace(config, other_dtype=None)
