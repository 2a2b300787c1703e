"""Decoder layers of the Llama family in fewer passes over memory, the last for last tokens only.

What surrounds the matrix products (norms, rotary positions, residual sums) only moves memory, and
transformers writes each step of it out. The layer's own modules, weights and products stay.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qbatch.models.attention import PackLayout, packed_attention


def streamline(layers: torch.nn.ModuleList) -> Callable[[], None]:
    """Replace how packs run through these layers; return what takes it back.

    Calls without a pack run as before. Whether a model's layers are of the family, only comparing
    its states before and after can tell.
    """
    own = [layer.forward for layer in layers]
    for layer, forward in zip(layers, own, strict=True):
        layer.forward = partial(_forward, layer, forward, is_last=layer is layers[-1])

    def restore() -> None:
        for layer, forward in zip(layers, own, strict=True):
            layer.forward = forward

    return restore


def _forward(
    layer: torch.nn.Module,
    own: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    *,
    is_last: bool,
    pack: PackLayout | None = None,
    **options: Any,  # noqa: ANN401 - the layer's own, handed through
) -> torch.Tensor:
    """Run a layer that normalises before each part.

    Args:
        layer: With ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and ``mlp``.
        own: Its own forward.
        hidden_states: Shape (1, tokens, hidden_dim).
        is_last: Whether it is the layer that may end early.
        pack: None in a stock call of the model.
        options: What the model hands to its layers.

    Returns:
        As ``hidden_states``; of each segment's last token only where the pack ends early.
    """
    if pack is None:
        return own(hidden_states, **options)
    parts: Any = layer
    last_only = is_last and pack.ends_early
    normed = _normalise(parts.input_layernorm, hidden_states)
    states = _attend(parts.self_attn, normed, pack, options["position_embeddings"], last_only)
    states += hidden_states[:, pack.last_tokens] if last_only else hidden_states
    output: torch.Tensor = parts.mlp(_normalise(parts.post_attention_layernorm, states))
    output += states
    return output


def _attend(
    attention: Any,  # noqa: ANN401 - of the Llama family, which has no common class
    hidden_states: torch.Tensor,
    pack: PackLayout,
    rotary: tuple[torch.Tensor, torch.Tensor],
    last_only: bool,
) -> torch.Tensor:
    """Return the attention of all tokens, or of each segment's last: (1, tokens, hidden_dim).

    Args:
        attention: Projections, head_dim, perhaps norms of queries and keys.
        hidden_states: Normalised, shape (1, tokens, hidden_dim).
        pack: Where segments lie.
        rotary: Cosine and sine of each token's position, shape (1, tokens, head_dim).
        last_only: Whether only last tokens ask.
    """

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.view(*projected.shape[:2], -1, attention.head_dim)

    asking = hidden_states[:, pack.last_tokens] if last_only else hidden_states
    query, key = heads(attention.q_proj(asking)), heads(attention.k_proj(hidden_states))
    value = heads(attention.v_proj(hidden_states))
    cos, sin = (x[:, :, None] for x in rotary)
    turns = (cos[:, pack.last_tokens], sin[:, pack.last_tokens]) if last_only else (cos, sin)
    query = _rotate(query, *turns, getattr(attention, "q_norm", None))
    key = _rotate(key, cos, sin, getattr(attention, "k_norm", None))
    attended, _ = packed_attention(
        attention,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        pack=pack,
        scaling=attention.scaling,
    )
    output: torch.Tensor = attention.o_proj(attended.flatten(2))
    return output


def _rotate(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: Any | None,  # noqa: ANN401 - RMSNorm, a class of each model
) -> torch.Tensor:
    """Return heads normalised, if there is a norm, and turned by their positions (RoPE).

    Args:
        heads: Shape (1, tokens, heads, head_dim).
        cos: Of each token's position, shape (1, tokens, 1, head_dim).
        sin: As ``cos``.
        norm: Over head_dim. Its weight goes into the tables, which all heads share.
    """
    half = heads.shape[-1] // 2
    if norm is not None:
        heads = _scaled(heads, norm)
        swapped = torch.cat([norm.weight[half:], norm.weight[:half]])
        cos, sin = cos * norm.weight, sin * swapped
    first, second = heads[..., :half], heads[..., half:]
    turned = heads * cos
    turned[..., :half].addcmul_(second, sin[..., :half], value=-1)
    turned[..., half:].addcmul_(first, sin[..., half:])
    return turned


def _normalise(norm: Any, states: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - see above
    """Return what an RMSNorm returns: x / sqrt(mean(x^2) + eps) * weight."""
    output: torch.Tensor = _scaled(states, norm) * norm.weight
    return output


def _scaled(states: torch.Tensor, norm: Any) -> torch.Tensor:  # noqa: ANN401 - see above
    """Return x / sqrt(mean(x^2) + eps), its length taken in float32 in one pass."""
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = torch.rsqrt(length.square() / states.shape[-1] + norm.variance_epsilon)
    return (states * inverse).to(states.dtype)
