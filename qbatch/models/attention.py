"""Attention over packed texts, run inside the stock model through transformers' own interface.

A pack is one row of tokens, text after text, without padding. Each text attends to itself only.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from qbatch.models.packing import equal_runs

PACKED_ATTENTION = "qbatch_packed"


class UnsupportedAttentionError(NotImplementedError):
    """The model asks for more than plain attention; the packed path would be wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackLayout:
    """Where each text of a pack lies; built once a pack, read by every layer."""

    runs: list[tuple[int, int]]
    """(length, count) of neighbouring texts of equal length, in pack order."""
    cu_lengths: torch.Tensor
    """int32, shape (texts + 1,): first token of each text, then the number of tokens."""
    max_length: int

    @classmethod
    def from_lengths(cls, lengths: np.ndarray, device: torch.device) -> "PackLayout":
        """Lay out texts of these lengths one after the other."""
        cu_lengths = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(
            runs=equal_runs(lengths),
            cu_lengths=torch.from_numpy(cu_lengths).to(device, non_blocking=True),
            max_length=int(lengths.max()),
        )


def register_packed_attention() -> None:
    """Make ``PACKED_ATTENTION`` known to transformers; repeating it is harmless.

    No mask function goes with it, and transformers then builds no mask (masking_utils, 5.23).
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pack: PackLayout | None = None,
    scaling: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Return each text's attention over itself, shape (1, tokens, heads, head_dim), and no weights.

    Args:
        module: The model's attention layer; says whether it is causal.
        query: Shape (1, heads, tokens, head_dim).
        key: As ``query``, possibly with fewer heads.
        value: As ``key``.
        attention_mask: None; the layout replaces it.
        pack: What was given to the model's forward, which hands it through.
        scaling: Factor of the scores; None means 1 / sqrt(head_dim).
        options: What else the layer asks for.

    Raises:
        UnsupportedAttentionError: The layout did not arrive, or the layer asks for more than plain
            attention.
    """
    extras = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if pack is None or attention_mask is not None or extras:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} passes no layout, or a mask, or {extras}"
        )
    is_causal = bool(module.is_causal) and getattr(module.config, "is_causal", True)
    # (1, heads, tokens, dim) -> (tokens, heads, dim), as the projections wrote it: no copy.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    attend = _attend_varlen if _has_varlen_kernel(query) else _attend_runs
    return attend(query, key, value, pack, is_causal=is_causal, scale=scaling)[None], None


_UNSUPPORTED = ("sliding_window", "softcap", "position_bias", "s_aux")


def _attend_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: PackLayout,
    *,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """One call per run of equal lengths: such texts are a batch without padding or copying."""
    enable_gqa = query.shape[1] != key.shape[1]
    sizes = [length * count for length, count in pack.runs]
    outputs = []
    for (length, count), *run in zip(
        pack.runs, *(torch.split(x, sizes) for x in (query, key, value)), strict=True
    ):
        q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in run)
        output = scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _has_varlen_kernel(query: torch.Tensor) -> bool:
    """Return whether torch's variable-length kernel takes this tensor (flash-attention 2 rules)."""
    if not query.is_cuda or query.dtype not in {torch.bfloat16, torch.float16}:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: PackLayout,
    *,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """One call for the whole pack."""
    output = varlen_attn(
        query,
        key,
        value,
        pack.cu_lengths,
        pack.cu_lengths,
        pack.max_length,
        pack.max_length,
        scale=scale,
        window_size=(-1, 0) if is_causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast("torch.Tensor", output)
