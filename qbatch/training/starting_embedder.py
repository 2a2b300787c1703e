"""The weights that the bundled embedder starts from: a bag of words, written as a Qwen3 layer.

A text's vector is the mean of its tokens' random vectors, weighted by the tokens' rarity: TF-IDF
through a random projection. It finds equal words before any training. The last two components of a
token's vector say how rare it is; the end token, whose state is the text's vector, attends to every
token by them. Training moves all weights from there.
"""

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from qbatch.models.loading import read_config
from qbatch.models.tokenization import QWEN3_END
from qbatch.training.model_files import write_weights

_NOISE = 0.005
"""Standard deviation of what would be zero."""

_RARITY_LENGTH = 0.3
"""Of the two components that tell the rarity, in a token's vector of length 1."""

_VECTOR_RMS = 0.015
"""Of the components of token vectors; AdamW's steps are measured against it."""

_MOST_NATS = 7.2
"""Logit of the rarest token; of 8, which is the most that normalised queries and keys give."""

_TEXTS_AT_ONCE = 10_000


def log_rarity(tokenizer: Tokenizer, texts: Iterable[str], num_ids: int) -> np.ndarray:
    """Return for each token id ln(idf), idf = ln((texts + 1) / (texts with it + 1)).

    A token of all texts has the thousandth part of the largest idf, not 0.
    """
    counts, num_texts = np.zeros(num_ids), 0
    remaining = iter(texts)
    while batch := list(islice(remaining, _TEXTS_AT_ONCE)):
        num_texts += len(batch)
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            counts[np.unique(encoding.ids)] += 1
    idf = np.log((num_texts + 1) / (counts + 1))
    rarity: np.ndarray = np.log(np.maximum(idf, idf.max() / 1000))
    return rarity


def angles(log_weights: np.ndarray) -> torch.Tensor:
    """Return unit vectors, shape (tokens, 2), whose first component times 8 is the logit.

    Keys are normalised, so a logit is an angle: 8 nats are the most, the rarest token has 7.2.
    """
    sines = (log_weights - log_weights.max() + _MOST_NATS) / 8
    sines = np.clip(sines, -1, 1)
    return torch.from_numpy(np.stack([sines, np.sqrt(1 - sines**2)], axis=1)).float()


def write_bag_of_words(folder: Path, texts: Iterable[str]) -> None:
    """Write weights beside the config.json and tokenizer.json of a Qwen3 of one layer.

    Args:
        folder: Its config has heads of 64 components, as many for keys as for queries, that are
            together as wide as the model.
        texts: Queries with their prompt, and documents, from which the rarity is taken.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = read_config(folder)
    model = Qwen3Model(cast("Qwen3Config", config))
    overwrite(model, tokenizer, log_rarity(tokenizer, texts, config.vocab_size))
    write_weights(folder, model.state_dict(), torch.float32, is_tied=False)


@torch.no_grad()
def overwrite(model: Qwen3Model, tokenizer: Tokenizer, log_weights: np.ndarray) -> None:
    """Make a model a bag of words, weighted by the exponentials of ``log_weights``."""
    torch.manual_seed(0)
    fill_with_noise(model, _NOISE)
    layer = first_layer(model)
    _write_tokens(model.embed_tokens.weight, tokenizer.token_to_id(QWEN3_END), log_weights)
    _write_attention(layer.self_attn)
    open_gates(layer.mlp)
    model.norm.weight[-2:] = 0


def fill_with_noise(model: torch.nn.Module, deviation: float) -> None:
    """Draw all matrices at random: equal weights would stay equal in training."""
    for weights in model.parameters():
        if weights.ndim > 1:
            weights.normal_(0, deviation)


def open_gates(mlp: Qwen3MLP) -> None:
    """Draw what goes into a feed-forward part at random, so that gradients pass through it."""
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight.normal_(0, projection.in_features**-0.5)


def first_layer(model: Qwen3Model) -> Qwen3DecoderLayer:
    """Return the first decoder layer of a model."""
    return cast("Qwen3DecoderLayer", model.layers[0])


def _write_tokens(table: torch.Tensor, end: int | None, log_weights: np.ndarray) -> None:
    hidden_dim = table.shape[1]
    table.normal_()
    table[:, -2:] = 0
    table *= math.sqrt(1 - _RARITY_LENGTH**2) / table.norm(dim=1, keepdim=True)
    table[:, -2:] = _RARITY_LENGTH * angles(log_weights)
    table *= _VECTOR_RMS * math.sqrt(hidden_dim)
    # The end token has no meaning of its own, only the question that all others answer: how rare?
    table[end] = 0
    table[end, -2] = -0.1 * table[:, -2].max()


def _write_attention(attention: Qwen3Attention) -> None:
    """Let every head attend by rarity and hand its share of the components through."""
    dim = attention.head_dim
    # The slowest pair of rotary embeddings hardly turns, so the logit hangs on no distance.
    slowest = dim // 2 - 1
    for first in range(0, attention.q_proj.out_features, dim):
        attention.q_proj.weight[first + slowest, -2] = -1
        attention.k_proj.weight[first + slowest, -2] = 1
        attention.k_proj.weight[first + slowest - 1, -1] = 1
    for projection in (attention.v_proj, attention.o_proj):
        projection.weight += torch.eye(len(projection.weight))
    attention.v_proj.weight[:, -2:] = 0
    attention.o_proj.weight[-2:] = 0
