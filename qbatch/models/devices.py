"""What a process computes on and in: device, dtype, int8 weights.

torch is imported by the functions: drivers resolve settings and seldom need it, and loading it is
a good part of a short job.
"""

from typing import TYPE_CHECKING, Literal

from qbatch.errors import ConfigError
from qbatch.schema import ComputeDtype

if TYPE_CHECKING:
    import torch


def resolve_device(device: str | None = None) -> "torch.device":
    """Return the named device, or the GPU if there is one, or the CPU."""
    import torch  # noqa: PLC0415

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def resolve_dtype(dtype: Literal["auto"] | ComputeDtype, device: "torch.device") -> ComputeDtype:
    """Return ``dtype``, with ``auto`` as bfloat16 where the device computes in it, else float32.

    Never float16 by itself: released Qwen3-Embedding weights can overflow in it.
    """
    if dtype != "auto":
        return dtype
    import torch  # noqa: PLC0415

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if native else "float32"


def check_quantizable(dtype: str, device: str | None) -> None:
    """Refuse int8 weights where they cannot compute.

    Raises:
        ConfigError: Another dtype than float32 was asked for, or another device than the CPU, or
            this torch has no oneDNN.
    """
    import torch  # noqa: PLC0415

    if dtype not in {"auto", "float32"} or torch.device(device or "cpu").type != "cpu":
        raise ConfigError(
            f"weights is 'int8' with dtype {dtype!r} and device {device!r}; allowed are dtype "
            "'float32' or 'auto' and the CPU. Change those, or leave the weights 'float'"
        )
    engines = torch.backends.quantized.supported_engines
    if "onednn" not in engines:
        raise ConfigError(
            f"weights is 'int8', but this torch has the integer kernels {engines}; onednn is "
            "needed, as torch for x86 has it. Leave the weights 'float'"
        )
