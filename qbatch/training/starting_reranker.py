"""The weights that the bundled reranker starts from: half the embedder, and a look at equal words.

Three Qwen3 layers work on the prompt of a reranker, with the token states of the embedder:

1. Every token counts the marks before it, the turns and labels of the prompt, and so learns whether
   it stands in the query, in the document, or in neither.
2. Every token looks for its like before it. A word of the document finds itself, its earlier
   occurrences and those in the query; what part of that lies in the query is its match. The first
   occurrence of a word counts more than the second, as in BM25.
3. The last token takes means, each word weighted as the embedder does: of the query and of the
   document, like half of the embedder's heads, and of the matches. Its feed-forward part takes the
   product of the first two, about their cosine. The sum says how well the document answers.

So it begins about as good as the embedder, and knows besides which words are the same. Training
moves all weights from there.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from qbatch.models.loading import read_config, read_json
from qbatch.models.rerank_prompts import NO, YES
from qbatch.models.tokenization import QWEN3_END
from qbatch.training.model_files import copy_tokenizer, write_weights
from qbatch.training.starting_embedder import angles, fill_with_noise, first_layer, open_gates

_NOISE = 0.0005
"""Standard deviation of what would be zero."""

_HEADS = 3
"""Of the embedder's, whose means are taken of query and document each."""

_FLAGS = (
    *("constant", "mark", "sign", "start", "count", "query", "document", "match"),
    *(f"{side}{head}" for head in range(_HEADS) for side in ("rare", "common")),
    *("spare0", "spare1"),
)
"""Components after the embedder's; what each means is said where it is written. The spare ones make
the width a multiple of 16."""

_SCALE = 0.06
"""Of the components of token vectors: AdamW's steps are measured against it."""

_SINK, _USUAL_WORDS, _STARTS = 1.0, 60, 3
"""Weight on the starts of turns beside a document, the tokens of a usual one, turns in a prompt."""

_THRESHOLDS = (0.15, 0.19, 0.25, 0.29)
"""Of the count: from the first to the second begins the query, from the third on the document."""

_SHARPNESS = 12.0
"""Of the steps at the thresholds."""

_SLOWEST, _FIRST_SLOW = 31, 9
"""Rotary pairs of a head of 64 components: the slowest, and the first that hardly turns."""

_MEAN_LENGTHS = {"query": 2.5, "document": 4.5}
"""Of the means beside a token's state of 1. Their product is divided by the state's length three
times, in two norms, so with these it changes least where the document's length changes."""

_MATCH_SHARE = 2.5
"""Of the matches beside the cosine."""

_GAIN = 20.0
"""From both to log-odds; a cosine counts as if divided by a temperature of 0.05."""

CHANGES = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 3,
    "max_window_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2 * _HEADS * 64,
    # Slow rotary pairs hardly turn over a prompt, and words are compared by those.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
}


@dataclass(frozen=True, slots=True)
class Words:
    """What the embedder knows of the tokens; D components, H heads of 64."""

    states: torch.Tensor
    """Shape (tokens, D), of length about 1."""
    logits: torch.Tensor
    """Shape (tokens, H): with which the end token attends to them."""
    to_output: torch.Tensor
    """Shape (D, D): from states to what a token adds to a text's vector."""
    within_heads: list[torch.Tensor]
    """For each head shape (64, D): the part of ``to_output`` that no other head adds to."""

    @classmethod
    @torch.no_grad()
    def read(cls, embedder: Qwen3Model, end: int | None) -> "Words":
        """Read an embedder of one layer that began as ``starting_embedder`` says."""
        layer, norm = first_layer(embedder), embedder.norm.weight[:, None]
        attention, states = layer.self_attn, layer.input_layernorm(embedder.embed_tokens.weight)
        shape = -1, embedder.config.num_attention_heads, attention.head_dim
        keys = attention.k_norm(attention.k_proj(states).view(shape))
        queries = attention.q_norm(attention.q_proj(states[end]).view(shape))
        values, outputs = attention.v_proj.weight, attention.o_proj.weight
        length = math.sqrt(states.shape[1])
        starts = range(0, len(values), attention.head_dim)
        heads = [slice(start, start + attention.head_dim) for start in starts]
        return cls(
            states=states / length,
            logits=(queries * keys).sum(-1) * attention.scaling,
            to_output=norm * (outputs @ values) * length,
            within_heads=[norm[h] * (outputs[h, h] @ values[h]) * length for h in heads],
        )


@dataclass(frozen=True, slots=True)
class Places:
    """Where each meaning lies among the components of a state."""

    words: slice
    """The state of the token in the embedder; at the last token, the means."""
    flags: dict[str, int]
    unit: float
    """Length of the words' part of a state; the other parts are given as shares of it."""

    def __getitem__(self, flag: str) -> int:
        return self.flags[flag]

    def visible(self, squared_length: float) -> float:
        """Return what the norm before a layer makes of a component of 1 unit.

        Args:
            squared_length: Of all parts of the state, in units; the words' is 1.
        """
        return self.unit / _SCALE / math.sqrt(squared_length)


def write_matcher(embedder: Path, folder: Path) -> None:
    """Write model and tokenizer for an embedder that began as ``starting_embedder`` says."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(embedder / "tokenizer.json"))
    found = Qwen3Model.from_pretrained(embedder, dtype=torch.float32)
    config = {**read_json(embedder / "config.json"), **CHANGES, "dtype": "float32"}
    config["hidden_size"] += len(_FLAGS)
    config.pop("matryoshka_dimensions", None)  # the embedder's
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    model = Qwen3ForCausalLM(cast("Qwen3Config", read_config(folder)))
    overwrite(model, tokenizer, found)
    write_weights(folder, model.state_dict(), torch.float32, is_tied=True)
    copy_tokenizer(embedder, folder)


@torch.no_grad()
def overwrite(model: Qwen3ForCausalLM, tokenizer: Tokenizer, embedder: Qwen3Model) -> None:
    """Overwrite the weights of a causal Qwen3 of ``CHANGES``; its table of tokens is its head."""
    torch.manual_seed(0)
    words = Words.read(embedder, tokenizer.token_to_id(QWEN3_END))
    dim = words.states.shape[1]
    flags = {name: dim + i for i, name in enumerate(_FLAGS)}
    at = Places(slice(0, dim), flags, _SCALE * math.sqrt(model.config.hidden_size))
    fill_with_noise(model, _NOISE)
    layers = cast("list[Qwen3DecoderLayer]", list(model.model.layers))
    for layer in layers:
        open_gates(layer.mlp)
        layer.mlp.down_proj.weight *= 0.1
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.fill_(math.sqrt(2))  # logits reach 16 nats, not 8
    _write_tokens(model.model.embed_tokens.weight, tokenizer, words, at)
    count, match, compare = layers
    _write_count(count.self_attn, at)
    _write_places(count.mlp, at)
    _write_match(match.self_attn, words, at)
    _write_means(compare.self_attn, words, at)
    _write_product(compare.mlp, at)
    model.model.norm.weight[at["match"]] = _GAIN


def _write_tokens(table: torch.Tensor, tokenizer: Tokenizer, words: Words, at: Places) -> None:
    names = ("<", "<|im_start|>", "<|im_end|>", YES, NO, "</think>")
    sign, start, end, yes, no, last = (tokenizer.token_to_id(name) for name in names)
    table.zero_()
    table[:, at.words] = words.states
    table[:, at["constant"]] = 0.3
    for head in range(_HEADS):
        logits = words.logits[:, head].clone()
        logits[start] = words.logits[:, head].exp().mean().log()
        logits[start] += math.log(_SINK * _USUAL_WORDS / _STARTS)
        pair = slice(at[f"rare{head}"], at[f"common{head}"] + 1)
        table[:, pair] = 0.3 * angles(logits.numpy())
    table[[sign, start, end], at["mark"]] = 0.5
    table[[sign, end], at["sign"]] = torch.tensor([0.5, -0.5])
    table[start, at["start"]] = 0.5
    table[no] = table[yes]
    table[[yes, no], at["match"]] = torch.tensor([0.1, -0.1])
    table[last, at.words] = 0  # the means are put there
    table *= at.unit


def _write_count(attention: Qwen3Attention, at: Places) -> None:
    """Let count be (signs - ends of turns) / marks: 0, 1/5 in the query, 1/3 in the document, 1/8.

    Marks are signs, which begin labels, and starts and ends of turns.
    """
    attention.q_proj.weight[_SLOWEST, at["constant"]] = 1
    attention.k_proj.weight[_SLOWEST, at["mark"]] = 4
    attention.k_proj.weight[_SLOWEST - 1, at["constant"]] = 1
    attention.v_proj.weight[0, at["sign"]] = 2 / at.visible(1.86)
    attention.o_proj.weight[at["count"], 0] = at.unit


def _write_places(mlp: Qwen3MLP, at: Places) -> None:
    """Let query be 1/2 where count is near 1/5, and document 1/2 where it is above."""
    seen = at.visible(1.43)
    for unit, threshold in enumerate(_THRESHOLDS):
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[unit] = 0
        mlp.gate_proj.weight[unit, at["count"]] = _SHARPNESS
        mlp.gate_proj.weight[unit, at["constant"]] = -_SHARPNESS * threshold / 0.3
        mlp.up_proj.weight[unit, at["constant"]] = 1 / (0.3 * seen)
    step = at.unit / 2 / (_SHARPNESS * seen * (_THRESHOLDS[1] - _THRESHOLDS[0]))
    mlp.down_proj.weight[at["query"], :4] = step * torch.tensor([1.0, -1, -1, 1])
    mlp.down_proj.weight[at["document"], :4] = step * torch.tensor([0.0, 0, 1, -1])


def _write_match(attention: Qwen3Attention, words: Words, at: Places) -> None:
    """Let match be half the attention that a token's likes in the query get.

    Every second head also lets words match that are only alike.
    """
    dim = attention.head_dim
    num_heads = attention.q_proj.out_features // dim
    slow = [i for i in range(dim) if _FIRST_SLOW <= i % (dim // 2) < _SLOWEST]
    outputs = words.states @ words.to_output.T
    length = float(outputs.norm(dim=1).mean())
    for head in range(num_heads):
        rows = torch.tensor([head * dim + i for i in slow])
        some = torch.linalg.qr(torch.randn(at.words.stop, len(slow)))[0].T / length
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[rows, at.words] += some @ words.to_output
            projection.weight[rows, at["constant"]] -= some @ outputs.mean(0) / 0.3
        if head % 2:  # what is different for all takes half of a vector's length
            same = math.sqrt(len(slow) / at.words.stop) / 0.3
            attention.q_proj.weight[head * dim + _SLOWEST, at["constant"]] = same
            attention.k_proj.weight[head * dim + _SLOWEST + dim // 2, at["constant"]] = same
        attention.v_proj.weight[head * dim, at["query"]] = 2 / at.visible(1.76)
        attention.o_proj.weight[at["match"], head * dim] = at.unit / 2 / num_heads


def _write_means(attention: Qwen3Attention, words: Words, at: Places) -> None:
    """Put the means of query and document where words were, and add that of matches to match."""
    dim = attention.head_dim
    seen = at.visible(1.76)
    for number, (side, mean_length) in enumerate(_MEAN_LENGTHS.items()):
        for head in range(_HEADS):
            place = (number * _HEADS + head) * dim
            _attend_within(attention, place, at, side, head)
            output = words.within_heads[head]
            length = _usual_length(words, head) * math.sqrt(_HEADS) * seen
            attention.v_proj.weight[place : place + dim, at.words] += output / length
            rows = torch.arange(place, place + dim)
            attention.o_proj.weight[rows, rows] += mean_length * at.unit
    place = 2 * _HEADS * dim
    _attend_within(attention, place, at, "document", 0)
    # The starts of turns take some weight, or short documents were preferred without limit.
    attention.k_proj.weight[place + _SLOWEST - 2, at["start"]] = 4
    attention.v_proj.weight[place, at["match"]] = 2 / seen
    attention.o_proj.weight[at["match"], place] = _MATCH_SHARE * at.unit


def _attend_within(attention: Qwen3Attention, place: int, at: Places, side: str, head: int) -> None:
    """Attend to the tokens of one side by the embedder's logits, 16 nats above all others."""
    attention.q_proj.weight[[place + _SLOWEST, place + _SLOWEST - 2], at["constant"]] = 1
    attention.k_proj.weight[place + _SLOWEST, at[f"rare{head}"]] = 1 / 0.3
    attention.k_proj.weight[place + _SLOWEST - 1, at[f"common{head}"]] = 1 / 0.3
    attention.k_proj.weight[place + _SLOWEST - 2, at[side]] = 4
    attention.k_proj.weight[place + _SLOWEST - 2, at["constant"]] = -1 / 0.3


def _usual_length(words: Words, head: int) -> float:
    """Return how long a mean of a head's outputs is: about that of ten words drawn at random."""
    weights = words.logits[:, head].softmax(0)
    chosen = torch.multinomial(torch.ones(len(weights)), 10_000, replacement=True)
    shares = weights[chosen].view(1000, 10, 1)
    outputs = (words.states[chosen] @ words.within_heads[head].T).view(1000, 10, -1)
    means = (shares * outputs).sum(1) / shares.sum(1)
    return float(means.norm(dim=1).mean())


def _write_product(mlp: Qwen3MLP, at: Places) -> None:
    """Add the product of both means, close to their cosine, to match: silu(x) - silu(-x) is x."""
    num_pairs = mlp.gate_proj.out_features // 2
    mlp.gate_proj.weight.zero_()
    mlp.up_proj.weight.zero_()
    for i in range(num_pairs):
        mlp.gate_proj.weight[[2 * i, 2 * i + 1], i] = torch.tensor([1.0, -1.0])
        mlp.up_proj.weight[[2 * i, 2 * i + 1], num_pairs + i] = 1
    # Both means have half the squared length of a state, which the norm makes its components.
    share = 2 * at.unit / mlp.gate_proj.in_features
    mlp.down_proj.weight[at["match"]] = share * torch.tensor([1.0, -1.0]).repeat(num_pairs)
