"""Attention over packed texts, run inside the stock model through transformers' own interface.

A pack is one row of tokens, text after text, without padding. Each text attends to itself only, or
causally to itself and to the segments it continues: what many texts begin with is then computed
once, and its keys and values serve all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
class SharedKeys:
    """Which tokens every segment of a pack attends to, where segments continue others."""

    prefixes: list[list[tuple[int, slice]]]
    """For each run, the runs and rows in them that its segments continue, in text order."""
    rows: torch.Tensor
    """int64, shape (keys,): of each segment in turn, the rows it continues and its own."""
    cu_keys: torch.Tensor
    """int32, shape (segments + 1,): first key of each segment, then the number of keys."""
    max_keys: int
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """Filled by ``mask``; the variable-length kernel needs none."""

    def mask(self, length: int, num_keys: int) -> torch.Tensor:
        """Return bool of shape (length, num_keys): causal, counted from the last key."""
        shape = length, num_keys
        if shape not in self.masks:
            mask = torch.ones(shape, dtype=torch.bool, device=self.rows.device)
            self.masks[shape] = mask.tril(num_keys - length)
        return self.masks[shape]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackLayout:
    """Where each segment of a pack lies; built once a pack, read by every layer."""

    runs: list[tuple[int, int]]
    """(length, count) of neighbours of equal length and equal parent, in pack order."""
    cu_lengths: torch.Tensor
    """int32, shape (segments + 1,): first token of each segment, then the number of tokens."""
    max_length: int
    shared: SharedKeys | None
    """None where every segment is a whole text."""
    ends_early: bool = False
    """Whether the last layer returns the state of each segment's last token only."""

    @property
    def last_tokens(self) -> torch.Tensor:
        """Return the place of each segment's last token in the pack: int64, (segments,)."""
        return self.cu_lengths[1:].long() - 1

    @classmethod
    def from_lengths(
        cls, lengths: np.ndarray, device: torch.device, parents: np.ndarray | None = None
    ) -> "PackLayout":
        """Lay out segments of these lengths one after the other.

        Args:
            lengths: Tokens of each segment.
            device: Where the model computes.
            parents: For each segment the earlier one that it continues, or -1; None means that each
                is a whole text.
        """
        cu_lengths = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        runs = equal_runs(lengths, parents)
        return cls(
            runs=runs,
            cu_lengths=_upload(cu_lengths, device),
            max_length=int(lengths.max()),
            shared=None if parents is None else _share_keys(cu_lengths, parents, runs, device),
        )


def _share_keys(
    cu_lengths: np.ndarray, parents: np.ndarray, runs: list[tuple[int, int]], device: torch.device
) -> SharedKeys:
    chains = _chains(cu_lengths, parents)
    heads = np.cumsum([0, *(count for _, count in runs[:-1])])
    starts = cu_lengths[heads]
    prefixes = [[_in_run(rows, starts) for rows in chains[head][:-1]] for head in heads]
    rows = [np.arange(part.start, part.stop) for chain in chains for part in chain]
    num_keys = [sum(part.stop - part.start for part in chain) for chain in chains]
    return SharedKeys(
        prefixes=prefixes,
        rows=_upload(np.concatenate(rows), device),
        cu_keys=_upload(np.concatenate([[0], np.cumsum(num_keys)]).astype(np.int32), device),
        max_keys=max(num_keys),
    )


def _in_run(rows: slice, starts: np.ndarray) -> tuple[int, slice]:
    """Return which run holds rows of the pack, and where in it; runs start at ``starts``."""
    run = int(np.searchsorted(starts, rows.start, side="right")) - 1
    start = int(starts[run])
    return run, slice(rows.start - start, rows.stop - start)


def _chains(cu_lengths: np.ndarray, parents: np.ndarray) -> list[list[slice]]:
    """Return for each segment the rows of its ancestors, oldest first, and its own."""
    bounds = cu_lengths.tolist()
    chains: list[list[slice]] = []
    for segment, parent in enumerate(parents.tolist()):
        own = slice(bounds[segment], bounds[segment + 1])
        chains.append([*chains[parent], own] if parent >= 0 else [own])
    return chains


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


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
    """Return each segment's attention, shape (1, queries, heads, head_dim), and no weights.

    Args:
        module: The model's attention layer; says whether it is causal.
        query: Shape (1, heads, queries, head_dim): of all tokens, or of each segment's last.
        key: Of all tokens, possibly with fewer heads.
        value: As ``key``.
        attention_mask: None; the layout replaces it.
        pack: What was given to the model's forward, which hands it through.
        scaling: Factor of the scores; None means 1 / sqrt(head_dim).
        options: What else the layer asks for.

    Raises:
        UnsupportedAttentionError: The layout did not arrive, or the layer asks for more than plain
            attention, or segments continue others in a model that sees the future.
    """
    extras = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if pack is None or attention_mask is not None or extras:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} passes no layout, or a mask, or {extras}"
        )
    is_causal = bool(module.is_causal) and getattr(module.config, "is_causal", True)
    if pack.shared is not None and not is_causal:
        raise UnsupportedAttentionError(f"{type(module).__name__} is not causal")
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
    """One call per run of equal lengths: such texts are a batch without padding.

    Where each segment has one query, its last token's, that sees all keys: no mask is needed.
    Nothing is copied but the keys and values of what a run continues. Attending to those apart and
    joining the two parts by their log-sum-exp was slower (AVX2, two cores, 28 texts of 70 tokens).
    """
    enable_gqa = query.shape[1] != key.shape[1]
    last_only = len(query) < len(key)
    sizes = [length * count for length, count in pack.runs]
    num_queries = [count for _, count in pack.runs] if last_only else sizes
    # Split, not sliced: the gradient of a slice is as large as what it was cut from.
    queries, keys, values = (
        torch.split(x, sizes) for x, sizes in ((query, num_queries), (key, sizes), (value, sizes))
    )
    outputs = []
    for i, (_, count) in enumerate(pack.runs):
        q, k, v = (x[i].view(count, -1, *x[i].shape[1:]) for x in (queries, keys, values))
        mask = None
        if pack.shared and (prefix := pack.shared.prefixes[i]):
            k, v = _prepend(keys, prefix, k), _prepend(values, prefix, v)
            mask = None if last_only else pack.shared.mask(q.shape[1], k.shape[1])
        output = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=is_causal and mask is None and not last_only,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _prepend(
    runs: Sequence[torch.Tensor], prefix: list[tuple[int, slice]], own: torch.Tensor
) -> torch.Tensor:
    """Return ``own``, (count, length, heads, dim), with the rows of ``prefix`` before each."""
    parts = [runs[run][rows].expand(len(own), -1, -1, -1) for run, rows in prefix]
    return torch.cat([*parts, own], dim=1)


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
    """One call for the whole pack; causal counts from the last key, as flash-attention 2 does."""
    cu_queries, max_queries = pack.cu_lengths, pack.max_length
    if len(query) < len(key):
        cu_queries, max_queries = torch.arange(len(query) + 1, device=query.device).int(), 1
    cu_keys, max_keys = pack.cu_lengths, pack.max_length
    if pack.shared:
        key, value = key[pack.shared.rows], value[pack.shared.rows]
        cu_keys, max_keys = pack.shared.cu_keys, pack.shared.max_keys
    output = varlen_attn(
        query,
        key,
        value,
        cu_queries,
        cu_keys,
        max_queries,
        max_keys,
        scale=scale,
        window_size=(-1, 0) if is_causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast("torch.Tensor", output)
