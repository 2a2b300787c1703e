"""Safetensors files read and written piece by piece, in memory that does not grow with the model.

safetensors' own reader maps files into memory, and what was read stays resident; here a piece is
read, used and forgotten. The format: 8 bytes that tell the length of a JSON header, the header with
dtype, shape and offsets of each tensor, then the bytes of all tensors.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qbatch.errors import ConfigError
from qbatch.models.loading import weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte in the file; tensors follow each other without gaps."""

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    def pieces(self, num_elements: int) -> Iterator[torch.Tensor]:
        """Yield the tensor flat, in order, at most ``num_elements`` at a time."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            for first in range(0, self.num_elements, num_elements):
                count = min(num_elements, self.num_elements - first)
                data = bytearray(count * self.dtype.itemsize)
                if stream.readinto(data) != len(data):
                    raise ConfigError(f"{self.file} is cut short in {self.name!r}; copy it again")
                yield torch.frombuffer(data, dtype=self.dtype)


def read_header(file: Path) -> tuple[bytes, list[StoredTensor]]:
    """Return the bytes before the first tensor, and the tensors in the order of their bytes.

    Raises:
        ConfigError: It is no safetensors file, or has a dtype that we do not know.
    """
    with file.open("rb") as stream:
        length = stream.read(8)
        header = stream.read(int.from_bytes(length, "little"))
    try:
        entries = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        base = len(length) + len(header)
        tensors = [
            StoredTensor(
                file=file,
                name=name,
                dtype=_DTYPES[entry["dtype"]],
                shape=tuple(entry["shape"]),
                start=base + entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is not a safetensors file we can read ({type(error).__name__}: {error}); "
            f"dtypes may be {sorted(_DTYPES)}. Copy the model again"
        ) from error
    return length + header, sorted(tensors, key=lambda tensor: tensor.start)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of all safetensors files of a folder by name."""
    return {t.name: t for file in weight_files(folder) for t in read_header(file)[1]}


def tensor_bytes(piece: torch.Tensor) -> bytes:
    """Return the bytes of a flat tensor as the format stores them (little-endian)."""
    return piece.contiguous().view(torch.uint8).numpy().tobytes()
