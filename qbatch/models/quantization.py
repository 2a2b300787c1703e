"""Linear layers with int8 weights, for processors: oneDNN's integer kernels in a stock model.

Each row of a weight has one scale, found once; each token has its own in every layer, so that one
with a very large component, as decoders have them, does not cost the others of its pack their bits,
and a vector does not depend on what shares its pack beyond the rounding of float32.

torch.ao.quantization.quantize_dynamic (torch 2.13, deprecated) has one scale a pack, of seven bits:
MiniLM's vectors of 60 package descriptions kept a cosine of 0.973 (mean) to float32 (here 0.997),
and up to 0.042 of it depended on the pack (here 2e-7), at 1.2 times the speed.
"""

from typing import Any

import torch
from torch import nn

_LARGEST_WEIGHT = 127
"""Of int8, used on both sides of zero."""

_TINY = 1e-30
"""Keeps a token of zeros from being divided by zero."""

_EXACT_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Instructions of x86 that add up products of eight bits; older ones overflow beyond seven."""


def quantize_linears(model: nn.Module) -> None:
    """Give every linear layer int8 weights, in place; embeddings, norms and attention stay float32.

    Args:
        model: In float32 on the CPU.
    """
    children = [(m, name, child) for m in model.modules() for name, child in m.named_children()]
    for parent, name, child in children:
        if isinstance(child, nn.Linear):
            setattr(parent, name, _Int8Linear(child))


class _Int8Linear(nn.Module):
    """Stands in for a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self._scales = weight.abs().amax(1).clamp_min(_TINY) / _LARGEST_WEIGHT
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._packed: Any = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._largest_state = _largest_state()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return what the layer would, of float32 of shape (..., inputs), within rounding."""
        largest, zero = self._largest_state, self._largest_state + 1
        # vector_norm(inf) is not vectorised: 3.4 ms for 1,024 x 1,024 on one core, this 0.34 ms.
        below = states.amin(-1, keepdim=True).neg_()
        range_ = torch.maximum(states.amax(-1, keepdim=True), below).clamp_min_(_TINY)
        # To unsigned with zero in the middle; the half makes cutting off round to the nearest.
        rounded = (states * (largest / range_)).add_(zero + 0.5).to(torch.uint8)
        output: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rounded, 1 / largest, zero),
            *(self._packed, self._scales, self._zeros, None),
            *(1.0, 0, torch.float32),  # no scale and zero of the output: it is not rounded
            *("none", [], ""),
        )
        output.mul_(range_)
        return output if self._bias is None else output.add_(self._bias)


def _largest_state() -> int:
    """Return the largest rounded activation: eight bits where the processor adds them exactly."""
    features = torch.cpu.get_capabilities()
    return 127 if any(features.get(name) for name in _EXACT_SUMS) else 63
