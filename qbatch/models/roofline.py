"""How many tokens a second a GPU could embed: the roofline of a model, and how it is computed.

The bound of a forward pass is the slower of two: its arithmetic at the GPU's peak for dense
bfloat16, and its traffic at the GPU's memory bandwidth (Williams et al., 2009). Nothing is
measured; a real engine reaches a part of it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qbatch.errors import ConfigError
from qbatch.models.hub import resolve_model
from qbatch.models.loading import load_spec, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What its data sheet says."""

    bf16_tflops: float
    """Dense, without sparsity."""
    bandwidth_gb_s: float


GPUS = {
    "l4": Gpu(bf16_tflops=121, bandwidth_gb_s=300),
    "a10g": Gpu(bf16_tflops=70, bandwidth_gb_s=600),
    "l40s": Gpu(bf16_tflops=362, bandwidth_gb_s=864),
    "a100": Gpu(bf16_tflops=312, bandwidth_gb_s=2039),
    "h100": Gpu(bf16_tflops=989, bandwidth_gb_s=3350),
    "h200": Gpu(bf16_tflops=989, bandwidth_gb_s=4800),
}

_BYTES = 2
"""Of a bfloat16 number."""

_ACTIVATION_PASSES = 20
"""How often a layer reads or writes a token's hidden state: norms, residuals, projections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineConfig:
    """Predict the tokens a second of a GPU."""

    model: str
    """Model directory or hub id."""
    revision: str | None = None
    """Commit of a hub id."""
    gpu: str = "h100"
    """One of l4, a10g, l40s, a100, h100, h200."""
    tokens_per_text: int = 256
    """Mean length of the texts."""
    token_budget: int = 32_768
    """Tokens in one forward pass."""
    efficiency: float = 0.5
    """Share of the bound that an engine reaches; measure yours and give it."""
    hourly_price: float | None = None
    """Of the GPU, for the cost of a million texts."""


def roofline(config: RooflineConfig) -> dict[str, Any]:
    """Return the bound of both kinds, the prediction, and the figures they come from.

    Raises:
        ConfigError: The GPU is unknown, or the model cannot be read.
    """
    gpu = GPUS.get(config.gpu)
    if gpu is None:
        raise ConfigError(f"gpu is {config.gpu!r}; give one of {', '.join(GPUS)}")
    spec = load_spec(resolve_model(config.model, config.revision))
    shape = read_config(spec.path)
    weights = _weights_in_layers(shape)
    flops = flops_per_token(shape, config.tokens_per_text)
    passes = _ACTIVATION_PASSES * shape.num_hidden_layers * shape.hidden_size
    traffic = _BYTES * (weights / config.token_budget + passes)
    compute_bound = gpu.bf16_tflops * 1e12 / flops
    memory_bound = gpu.bandwidth_gb_s * 1e9 / traffic
    tokens_per_s = config.efficiency * min(compute_bound, memory_bound)
    texts_per_hour = 3600 * tokens_per_s / config.tokens_per_text
    price = config.hourly_price
    return {
        "gpu": config.gpu,
        "weights_in_layers": weights,
        "flops_per_token": flops,
        "bytes_per_token": round(traffic),
        "tokens_per_s_compute_bound": round(compute_bound),
        "tokens_per_s_memory_bound": round(memory_bound),
        "bound_by": "compute" if compute_bound < memory_bound else "memory",
        "tokens_per_s_predicted": round(tokens_per_s),
        "gpu_hours_per_million_texts": round(1e6 / texts_per_hour, 4),
        "cost_per_million_texts": None if price is None else round(price * 1e6 / texts_per_hour, 4),
        "how": "2 * weights of all layers + attention, at the data sheet's dense bfloat16 peak; "
        "weights once a pass and 20 passes over each layer's hidden state, at its bandwidth; the "
        f"slower of both, times an efficiency of {config.efficiency:g}",
    }


def flops_per_token(shape: "PreTrainedConfig", tokens_per_text: int) -> int:
    """Return the operations of all layers for a token: a multiplication and an addition a weight.

    Args:
        shape: Of the model.
        tokens_per_text: Mean length, on which attention depends.
    """
    return 2 * _weights_in_layers(shape) + attention_flops(shape, tokens_per_text)


def _weights_in_layers(shape: "PreTrainedConfig") -> int:
    return layer_weights(shape) * int(shape.num_hidden_layers)


def layer_weights(shape: "PreTrainedConfig") -> int:
    """Return the weights of one layer's matrix products, of a transformers config."""
    heads = shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    attention = shape.hidden_size * _head_dim(shape) * (2 * heads + 2 * kv_heads)
    # Gated MLPs (SwiGLU) have three matrices, plain ones two.
    num_matrices = 3 if getattr(shape, "hidden_act", "") == "silu" else 2
    mlp: int = num_matrices * shape.hidden_size * shape.intermediate_size
    return int(attention) + mlp


def attention_flops(shape: "PreTrainedConfig", tokens_per_text: int) -> int:
    """Return what scores and weighted sums of all layers cost a token, half where it is causal."""
    is_causal = shape.model_type == "qwen3"
    width = shape.num_attention_heads * _head_dim(shape)
    cost = 4 * width * tokens_per_text * shape.num_hidden_layers
    return int(cost // 2 if is_causal else cost)


def _head_dim(shape: "PreTrainedConfig") -> int:
    given = getattr(shape, "head_dim", None)
    return int(given or shape.hidden_size // shape.num_attention_heads)
