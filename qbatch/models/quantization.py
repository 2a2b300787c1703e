"""Linear layers with int8 weights, for processors: torch's integer kernels in a stock model.

Each row of a weight has one scale, found once; each token has its own in every layer, so that one
with a very large component, as decoders have them, does not cost the others of its pack their bits.
"""

from typing import Any

import torch
from torch import nn
from torch.backends import quantized

from qbatch.errors import ConfigError

_LARGEST = 127
"""Of int8, used on both sides of zero."""

_TINY = 1e-30
"""Keeps a token of zeros from being divided by zero."""

_EXACT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Instructions of x86 that add up products of eight bits; older ones may overflow and get seven."""


def quantize_linears(model: nn.Module) -> None:
    """Give every linear layer int8 weights, in place; embeddings, norms and attention stay float32.

    Sums come out in float32. A vector still depends a little on what shares its pack, since equal
    sums are rounded to int8 anew in every layer and float32 kernels group them by the pack's size.

    Args:
        model: In float32 on the CPU.
    """
    engines = quantized.supported_engines
    quantized.engine = "onednn" if "onednn" in engines else "fbgemm"  # type: ignore[assignment]
    children = [(m, name, child) for m in model.modules() for name, child in m.named_children()]
    for parent, name, child in children:
        if isinstance(child, nn.Linear):
            setattr(parent, name, _Int8Linear(child))


def check_quantizable(dtype: str, device: str | None) -> None:
    """Refuse int8 weights where they cannot compute.

    Raises:
        ConfigError: Another dtype than float32 was asked for, or another device than the CPU.
    """
    if dtype not in {"auto", "float32"} or torch.device(device or "cpu").type != "cpu":
        raise ConfigError(
            f"weights is 'int8' with dtype {dtype!r} and device {device!r}; allowed are dtype "
            "'float32' or 'auto' and the CPU. Change those, or leave the weights 'float'"
        )


class _Int8Linear(nn.Module):
    """Stands in for a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).clamp_min(_TINY).double() / _LARGEST
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._bias = None if linear.bias is None else linear.bias.detach()
        features = torch.cpu.get_capabilities()
        self._seven_bits = features["architecture"] == "x86_64" and not any(
            features.get(name) for name in _EXACT_PRODUCTS
        )
        self._packed: Any = torch.ops.quantized.linear_prepack(rounded, None)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return what the layer would, of float32 of shape (..., inputs), within rounding."""
        largest = torch.linalg.vector_norm(states, float("inf"), -1, keepdim=True)
        largest = largest.clamp_min_(_TINY)
        output: torch.Tensor = torch.ops.quantized.linear_dynamic(
            states / largest, self._packed, self._seven_bits
        )
        output.mul_(largest)
        return output if self._bias is None else output.add_(self._bias)
