"""An embedding server gives what the model in this process gives, through all its troubles."""

import numpy as np
import pytest

from qbatch.errors import ConfigError, StalledError
from qbatch.models.remote_embedder import RemoteEmbedder
from qbatch.models.server import ServerConfig
from tests.embedding_server import EmbeddingState, embedding_server

DIM = 32


def texts(num_texts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random token ids, some texts repeated."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(5, 60, rng.integers(1, 40)) for _ in range(num_texts)]
    rows[7] = rows[3]
    lengths = np.array([len(row) for row in rows], np.int32)
    return np.concatenate(rows).astype(np.int32), lengths


def remote(endpoint: str, **settings: object) -> RemoteEmbedder:
    server = {"model": "m", "concurrency": 4, "max_retries": 3}
    server |= {k: settings.pop(k) for k in list(settings) if k in ("model", "max_retries")}
    config = ServerConfig(endpoint=endpoint, **server)
    return RemoteEmbedder(config, **{"dim": DIM, "normalize": True, "token_budget": 90} | settings)


def ours(state: EmbeddingState, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return state.embedder.embed(ids, lengths)


def test_vectors_are_those_of_the_model_in_order_through_all_troubles(tiny_model):
    ids, lengths = texts(120)
    beats = []
    with embedding_server(tiny_model) as (endpoint, state):
        embedder = remote(endpoint)
        vectors = embedder.embed(ids, lengths, lambda: beats.append(1))
        np.testing.assert_allclose(vectors, ours(state, ids, lengths), atol=1e-6)
        assert state.statuses[429] > 0
        assert state.statuses[500] > 0
        assert sum(state.seen.values()) < 120
    assert embedder.stats.num_texts == 120
    assert embedder.stats.num_distinct == 119
    assert len(beats) > embedder.stats.num_packs


def test_no_texts_are_no_request(tiny_model):
    with embedding_server(tiny_model) as (endpoint, state):
        vectors = remote(endpoint).embed(np.empty(0, np.int32), np.empty(0, np.int32))
    assert vectors.shape == (0, DIM)
    assert not state.seen


def test_a_narrower_width_is_cut_and_scaled(tiny_model):
    ids, lengths = texts(20)
    with embedding_server(tiny_model, misbehaves=False) as (endpoint, state):
        vectors = remote(endpoint, dim=8).embed(ids, lengths)
        whole = ours(state, ids, lengths)[:, :8]
    np.testing.assert_allclose(
        vectors, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6
    )


def test_a_text_that_the_server_refuses_gets_no_vector_and_harms_no_other(tiny_model):
    ids, lengths = texts(60)
    ids[np.cumsum(lengths)[10]] = 61
    with embedding_server(tiny_model, misbehaves=False, refused=61) as (endpoint, state):
        vectors = remote(endpoint).embed(ids, lengths)
        expected = ours(state, ids, lengths)
    is_lost = np.isnan(vectors).any(axis=1)
    assert np.flatnonzero(is_lost).tolist() == [11]
    np.testing.assert_allclose(vectors[~is_lost], expected[~is_lost], atol=1e-6)


def test_what_cannot_work_ends_the_job(tiny_model):
    ids, lengths = texts(10)
    with embedding_server(tiny_model, misbehaves=False) as (endpoint, _):
        with pytest.raises(ConfigError, match="refuses model 'unknown': 404"):
            remote(endpoint, model="unknown").embed(ids, lengths)
        with pytest.raises(ConfigError, match="vectors of 32 components, --model has 64"):
            remote(endpoint, dim=64).embed(ids, lengths)
    with pytest.raises(StalledError, match="answered none of 1 requests"):
        remote(endpoint, max_retries=0).embed(ids, lengths)


def test_a_server_that_refuses_everything_ends_the_job(tiny_model):
    ids, lengths = texts(10)
    ids[np.cumsum(lengths) - 1] = 61
    with (
        embedding_server(tiny_model, misbehaves=False, refused=61) as (endpoint, _),
        pytest.raises(ConfigError, match="I do not take this"),
    ):
        remote(endpoint).embed(ids, lengths)
