"""The weights that the bundled reranker starts from: which words has the document of the query?

Three Qwen3 layers count, match and add up, with the token vectors of the embedder:

1. Every token counts the signs ``<`` before it, which begin the labels of the prompt, and so learns
   whether it stands in the query, in the document, or in neither.
2. Every token looks for its like before it. A word of the document finds itself, its earlier
   occurrences and those in the query; what part of that lies in the query is its match. The first
   occurrence of a word counts more than the second, as in BM25.
3. The last token averages the matches of the document, weighted by the rarity of the words. Some
   weight lies on tokens of the prompt, so that short documents are not preferred without limit.

Words match whose vectors are alike, in whatever language. Training moves all weights from there.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch.nn.functional import normalize
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from qbatch.models.loading import read_config, read_json
from qbatch.models.rerank_prompts import NO, YES
from qbatch.models.tokenization import QWEN3_END
from qbatch.training.model_files import copy_tokenizer, write_weights
from qbatch.training.starting_embedder import angles, first_layer

_NOISE = 0.0005
"""Standard deviation of what would be zero."""

_FLAGS = ("constant", "sign", "start", "count", "query", "document", "match", "rare", "common")
"""Components after those of the embedder; what each means is said where it is written."""

_SPARE = 16 - len(_FLAGS)

_SCALE = 0.06
"""Of token vectors, as in the embedder."""

_SINK = 1.5
"""Weight on the prompt beside that of a document of usual length."""

_USUAL_WORDS = 60
"""Tokens of such a document."""

_STARTS = 3
"""Turns in the prompt of a reranker."""

_THRESHOLDS = (0.42, 0.46, 0.53, 0.57)
"""Of the count: from the first to the second begins the query, from the third on the document."""

_SHARPNESS = 12.0
"""Of the steps at the thresholds."""

_SLOWEST, _FIRST_SLOW = 31, 9
"""Rotary pairs of a head of 64 components: the slowest, and the first that hardly turns."""

_GAIN = 30.0
"""From the sum of matches to log-odds."""

CHANGES = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 3,
    "max_window_layers": 3,
    "intermediate_size": 128,
    # Slow rotary pairs hardly turn over a prompt, and words are compared by those.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
}


@dataclass(frozen=True, slots=True)
class Places:
    """Where each meaning lies among the components of a state."""

    words: slice
    """The token vector of the embedder."""
    flags: dict[str, int]
    unit: float
    """Length of the words' part of a state; the other parts are given as shares of it."""

    def __getitem__(self, flag: str) -> int:
        return self.flags[flag]


@torch.no_grad()
def overwrite(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, vectors: torch.Tensor, log_weights: torch.Tensor
) -> None:
    """Overwrite the weights of a causal Qwen3 of three layers.

    Args:
        model: Its heads have 64 components; the embedding table is its head.
        tokenizer: Of the model, and of the embedder.
        vectors: Of the tokens in the embedder, shape (tokens, components).
        log_weights: Of each token id in a mean, natural logarithm.
    """
    torch.manual_seed(0)
    dim = vectors.shape[1]
    flags = {name: dim + i for i, name in enumerate(_FLAGS)}
    at = Places(slice(0, dim), flags, _SCALE * math.sqrt(model.config.hidden_size))
    for weights in model.parameters():
        if weights.ndim > 1:
            weights.normal_(0, _NOISE)
    layers = cast("list[Qwen3DecoderLayer]", list(model.model.layers))
    for layer in layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.normal_(0, projection.in_features**-0.5)
        layer.mlp.down_proj.weight *= 0.1
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.fill_(math.sqrt(2))  # logits reach 16 nats, not 8
    _write_tokens(model.model.embed_tokens.weight, tokenizer, vectors, log_weights, at)
    count, match, add_up = layers
    _write_count(count.self_attn, at)
    _write_places(count.mlp, at)
    _write_match(match.self_attn, at)
    _write_sum(add_up.self_attn, at)
    model.model.norm.weight[at["match"]] = _GAIN


def _write_tokens(
    table: torch.Tensor,
    tokenizer: Tokenizer,
    vectors: torch.Tensor,
    log_weights: torch.Tensor,
    at: Places,
) -> None:
    sign, start, yes, no = (tokenizer.token_to_id(x) for x in ("<", "<|im_start|>", YES, NO))
    log_weights = log_weights.clone()
    typical = log_weights.exp().mean()
    log_weights[start] = torch.log(typical * _SINK * _USUAL_WORDS / _STARTS)
    table.zero_()
    table[:, at.words] = normalize(vectors - vectors.mean(dim=0), dim=1)
    table[:, at["constant"]] = 0.3
    table[:, at["rare"] : at["common"] + 1] = 0.3 * angles(log_weights.numpy())
    table[sign, at["sign"]] = table[start, at["start"]] = 0.5
    table[no] = table[yes]
    table[yes, at["match"]], table[no, at["match"]] = 0.1, -0.1
    # The last token is in the query by its count, and finds itself there.
    table[tokenizer.token_to_id("</think>"), at["match"]] = -0.41
    table *= at.unit


def _write_count(attention: Qwen3Attention, at: Places) -> None:
    """Let count be signs / (signs + starts): 1/3 before the query, 1/2 in it, 3/5 after it."""
    attention.q_proj.weight[_SLOWEST, at["constant"]] = 1
    attention.k_proj.weight[_SLOWEST, [at["sign"], at["start"]]] = 4
    attention.k_proj.weight[_SLOWEST - 1, at["constant"]] = 1
    attention.v_proj.weight[0, at["sign"]] = 2 / _visible(at, 1.43)
    attention.o_proj.weight[at["count"], 0] = at.unit


def _write_places(mlp: Qwen3MLP, at: Places) -> None:
    """Let query be 1/2 where count is near 1/2, and document 1/2 where it is above."""
    seen = _visible(at, 1.45)
    for unit, threshold in enumerate(_THRESHOLDS):
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[unit] = 0
        mlp.gate_proj.weight[unit, at["count"]] = _SHARPNESS
        mlp.gate_proj.weight[unit, at["constant"]] = -_SHARPNESS * threshold / 0.3
        mlp.up_proj.weight[unit, at["constant"]] = 1 / (0.3 * seen)
    step = at.unit / 2 / (_SHARPNESS * seen * (_THRESHOLDS[1] - _THRESHOLDS[0]))
    mlp.down_proj.weight[at["query"], :4] = step * torch.tensor([1.0, -1, -1, 1])
    mlp.down_proj.weight[at["document"], :4] = step * torch.tensor([0.0, 0, 1, -1])


def _write_match(attention: Qwen3Attention, at: Places) -> None:
    """Let match be half the attention that a token's likes in the query get.

    Every second head also lets words match that are only alike.
    """
    dim = attention.head_dim
    num_heads = attention.q_proj.out_features // dim
    slow = [i for i in range(dim) if _FIRST_SLOW <= i % (dim // 2) < _SLOWEST]
    length = math.sqrt(len(slow) / at.words.stop)
    for head in range(num_heads):
        rows = [head * dim + i for i in slow]
        like = torch.linalg.qr(torch.randn(at.words.stop, len(slow)))[0].T
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[rows, at.words] += like
        if (
            head % 2
        ):  # half of what is compared is different for all: words that are alike match too
            attention.q_proj.weight[head * dim + _SLOWEST, at["constant"]] = length / 0.3
            attention.k_proj.weight[head * dim + _SLOWEST + dim // 2, at["constant"]] = length / 0.3
        attention.v_proj.weight[head * dim, at["query"]] = 2 / _visible(at, 1.73)
        attention.o_proj.weight[at["match"], head * dim] = at.unit / 2 / num_heads


def _write_sum(attention: Qwen3Attention, at: Places) -> None:
    """Add to match the mean over the document, by rarity; the starts of turns take some weight."""
    attention.q_proj.weight[[_SLOWEST, _SLOWEST - 2], at["constant"]] = 1
    attention.k_proj.weight[_SLOWEST, at["rare"]] = 1 / 0.3
    attention.k_proj.weight[_SLOWEST - 1, at["common"]] = 1 / 0.3
    attention.k_proj.weight[_SLOWEST - 2, [at["document"], at["start"]]] = 4
    attention.k_proj.weight[_SLOWEST - 2, at["constant"]] = -1 / 0.3
    attention.v_proj.weight[0, at["match"]] = 2 / _visible(at, 1.73)
    # The last start stands after the document, where the count is that of the query.
    attention.v_proj.weight[0, at["start"]] = -1.5 / _visible(at, 1.73) / _STARTS**2
    attention.o_proj.weight[at["match"], 0] = at.unit


def _visible(at: Places, squared_length: float) -> float:
    """Return what the norm before a layer makes of a component of 1 unit.

    Args:
        at: Of the state.
        squared_length: Of all parts of the state, in units; the words' is 1.
    """
    return at.unit / _SCALE / math.sqrt(squared_length)


def write_matcher(embedder: Path, folder: Path) -> None:
    """Write model and tokenizer for an embedder that began as ``starting_embedder`` says."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(embedder / "tokenizer.json"))
    found = Qwen3Model.from_pretrained(embedder, dtype=torch.float32)
    config = {**read_json(embedder / "config.json"), **CHANGES, "dtype": "float32"}
    config["hidden_size"] += _SPARE + len(_FLAGS)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    model = Qwen3ForCausalLM(cast("Qwen3Config", read_config(folder)))
    vectors = contributions(found)
    overwrite(model, tokenizer, vectors, attention_logits(found, tokenizer))
    write_weights(folder, model.state_dict(), torch.float32, is_tied=True)
    copy_tokenizer(embedder, folder)


@torch.no_grad()
def contributions(embedder: Qwen3Model) -> torch.Tensor:
    """Return what each token adds to a text's vector, but for weight and feed-forward part."""
    layer = first_layer(embedder)
    values = layer.self_attn.v_proj(layer.input_layernorm(embedder.embed_tokens.weight))
    vectors: torch.Tensor = layer.self_attn.o_proj(values) * embedder.norm.weight
    return vectors


@torch.no_grad()
def attention_logits(embedder: Qwen3Model, tokenizer: Tokenizer) -> torch.Tensor:
    """Return with which logit the end token attends to each token, in the mean of all heads."""
    layer = first_layer(embedder)
    attention, states = layer.self_attn, layer.input_layernorm(embedder.embed_tokens.weight)
    shape = -1, embedder.config.num_attention_heads, attention.head_dim
    keys = attention.k_norm(attention.k_proj(states).view(shape))
    end = states[tokenizer.token_to_id(QWEN3_END)]
    queries = attention.q_norm(attention.q_proj(end).view(shape))
    logits: torch.Tensor = (queries * keys).sum(-1).mean(1) * attention.scaling
    return logits
