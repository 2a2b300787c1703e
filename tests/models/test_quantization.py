"""Linear layers with int8 weights beside the float32 layers they stand in for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qbatch.errors import ConfigError
from qbatch.models.embedder import Embedder, EmbedderConfig
from qbatch.models.quantization import quantize_linears
from qbatch.models.tokenization import TextTokenizer, TokenBatch
from tests import assets
from tests.models.test_embedder import embed, join, split, worst_cosine


def build(path: Path, **settings) -> Embedder:
    return EmbedderConfig(model_path=path, **settings).build()


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_large_token_does_not_cost_the_others_their_bits(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 96, bias=bias))
    states = torch.randn(1, 40, 256)
    states[0, 3] *= 10_000
    states[0, 5] = 0
    expected = model(states)
    quantize_linears(model)
    found = model(states)
    assert found.dtype == torch.float32
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-9)
    assert errors.max() < 0.02
    assert torch.allclose(model(states[:, 7:8]), found[:, 7:8], atol=1e-5)


@pytest.fixture(scope="module")
def questions() -> TokenBatch:
    rows = [json.loads(line) for line in assets.perlfaq().read_text("utf-8").splitlines()[:40]]
    texts = [f"{row['question']} {row['answer'][:200]}" for row in rows]
    return TextTokenizer.load(assets.minilm(), 64).encode(texts)


def test_vectors_of_a_real_model_stay_close(questions):
    exact = embed(build(assets.minilm(), dtype="float32"), questions)
    rounded = build(assets.minilm(), weights="int8")
    vectors = embed(rounded, questions)
    assert rounded.is_packed
    assert 0.99 < worst_cosine(vectors, exact) < 0.99999
    alone = np.concatenate([embed(rounded, join([ids])) for ids in split(questions)[:5]])
    assert worst_cosine(alone, vectors[:5]) > 0.9999


def test_a_decoder_ends_early_and_shares_beginnings_as_before(qwen3_dir):
    texts = [np.append(np.arange(1_000, 1_019), tail) for tail in range(5, 25)]
    batch = join([np.append(text, 151_643) for text in texts])
    exact, rounded = build(qwen3_dir, dtype="float32"), build(qwen3_dir, weights="int8")
    assert worst_cosine(embed(rounded, batch), embed(exact, batch)) > 0.98
    assert rounded.stats.num_computed == exact.stats.num_computed < rounded.stats.num_tokens


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"device": "cuda"}])
def test_other_dtypes_and_gpus_are_refused(qwen3_dir, settings):
    with pytest.raises(ConfigError, match="allowed are dtype 'float32' or 'auto' and the CPU"):
        EmbedderConfig(model_path=qwen3_dir, weights="int8", **settings)
