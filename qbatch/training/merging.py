"""Checkpoints merged tensor by tensor on the sphere, in memory that does not grow with the model.

Every merge here is a weighted sum of the checkpoints whose weights depend on inner products alone.
So a tensor is read twice: once for its inner products, once for the sum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch

from qbatch.errors import ConfigError
from qbatch.training.weight_streams import StoredTensor, read_header, stored_tensors, tensor_bytes

MergeMethod = Literal["slerp", "spherical-mean"]

_PARALLEL = 0.9995
"""Above this cosine interpolation is linear, as in mergekit: the angle says too little."""

_PIECE_ELEMENTS = 2**18
"""Elements of each checkpoint in memory at once: 1 MiB in float32. Two checkpoints of 400 MiB then
took 40 MiB in all; with eight times as many elements it was 240."""

_MAX_STEPS = 100
_SMALL_STEP = 1e-7
"""When the spherical mean is found: radians, about the rounding of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeSettings:
    """How checkpoints become one."""

    method: MergeMethod
    weights: tuple[float, ...]
    """Share of each checkpoint; they add up to 1."""


def merge_weights(
    folders: Sequence[Path], output: Path, settings: MergeSettings, base: Path | None = None
) -> int:
    """Write the merged weights into ``output``, in files like those of the first checkpoint.

    Args:
        folders: The checkpoints; dtypes and the order of bytes are the first's.
        output: An existing folder.
        settings: Method and weights.
        base: What all were trained from; then what is merged are the differences from it.

    Returns:
        The number of merged tensors.

    Raises:
        ConfigError: The checkpoints do not have the same tensors.
    """
    tables = [stored_tensors(folder) for folder in folders]
    _check_same_tensors(folders, tables)
    origin = None if base is None else stored_tensors(base)
    combine = _METHODS[settings.method]
    files = sorted({tensor.file for tensor in tables[0].values()})
    for file in files:
        header, tensors = read_header(file)
        with (output / file.name).open("xb") as stream:
            stream.write(header)
            for tensor in tensors:
                inputs = [table[tensor.name] for table in tables]
                if not tensor.dtype.is_floating_point:
                    _copy_equal(stream, inputs)
                    continue
                start = None if origin is None else _base_tensor(origin, tensor, base)
                _merge_tensor(stream, inputs, start, lambda g: combine(g, settings.weights))
    return len(tables[0])


def _merge_tensor(
    stream: BinaryIO,
    inputs: Sequence[StoredTensor],
    base: StoredTensor | None,
    combine: Callable[[np.ndarray], np.ndarray],
) -> None:
    gram = np.zeros((len(inputs), len(inputs)))
    for vectors, _ in _pieces(inputs, base):
        exact = vectors.double()
        gram += (exact @ exact.T).numpy()
    shares = torch.from_numpy(combine(gram))
    for vectors, origin in _pieces(inputs, base):
        merged = origin + shares.to(vectors.dtype) @ vectors
        stream.write(tensor_bytes(merged.to(inputs[0].dtype)))


def _pieces(
    inputs: Sequence[StoredTensor], base: StoredTensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what is merged, shape (inputs, elements), and what it is added to, (elements,)."""
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    sources = [*inputs] if base is None else [*inputs, base]
    for pieces in zip(*(source.pieces(_PIECE_ELEMENTS) for source in sources), strict=True):
        stacked = torch.stack([piece.to(dtype) for piece in pieces])
        if base is None:
            yield stacked, torch.zeros_like(stacked[0])
        else:
            yield stacked[:-1] - stacked[-1], stacked[-1]


def _copy_equal(stream: BinaryIO, inputs: Sequence[StoredTensor]) -> None:
    """Copy a tensor of integers, which has nothing between its values."""
    sources = (tensor.pieces(_PIECE_ELEMENTS) for tensor in inputs)
    for first, *others in zip(*sources, strict=True):
        if not all(torch.equal(first, other) for other in others):
            raise ConfigError(
                f"the tensor {inputs[0].name!r} holds {inputs[0].dtype} and differs between "
                f"{inputs[0].file} and the other checkpoints; only floating-point tensors can be "
                "merged. Use checkpoints of one training run"
            )
        stream.write(tensor_bytes(first))


def slerp_shares(gram: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return the share of each vector in a chain of spherical interpolations.

    The second is interpolated with the first, the third with the result, and so on, each at its
    share of the weights so far; so the order matters a little. Lengths are interpolated too: the
    vectors are not normalised, only the angle between them is measured.

    Args:
        gram: float64, inner products of the vectors, shape (vectors, vectors).
        weights: Of each vector.
    """
    shares = np.eye(len(gram))[0]
    for i in range(1, len(gram)):
        t = weights[i] / sum(weights[: i + 1])
        following = np.eye(len(gram))[i]
        length = np.sqrt(shares @ gram @ shares) * np.sqrt(gram[i, i])
        cosine = shares @ gram[i] / length if length > 0 else 1.0
        if abs(cosine) > _PARALLEL:
            shares = np.asarray((1 - t) * shares + t * following)
        else:
            angle = np.arccos(cosine)
            ahead = np.sin((1 - t) * angle) * shares + np.sin(t * angle) * following
            shares = np.asarray(ahead / np.sin(angle))
    return np.asarray(shares)


def spherical_mean_shares(gram: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return the share of each vector in their mean on the sphere, which knows no order.

    The direction is the one whose squared angles to all vectors, weighted, are least (found by
    repeated steps along the mean of the logarithms); the length is the weighted mean of lengths.

    Args:
        gram: float64, inner products of the vectors, shape (vectors, vectors).
        weights: Of each vector; they add up to 1.
    """
    share = np.asarray(weights, np.float64)
    lengths = np.sqrt(np.diag(gram))
    if (lengths == 0).any():  # no direction: a tensor that training never touched
        return share
    cosines = gram / np.outer(lengths, lengths)
    mean = share / max(np.sqrt(share @ cosines @ share), np.finfo(np.float64).tiny)
    for _ in range(_MAX_STEPS):
        near = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(near)
        stretch = 1 / np.maximum(np.sinc(angles / np.pi), np.finfo(np.float64).eps)
        step = share * stretch - (share * stretch @ near) * mean
        size = float(np.sqrt(max(step @ cosines @ step, 0.0)))
        if size < _SMALL_STEP:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean /= np.sqrt(mean @ cosines @ mean)
    return np.asarray((share @ lengths) * mean / lengths)


_METHODS: dict[MergeMethod, Callable[[np.ndarray, Sequence[float]], np.ndarray]] = {
    "slerp": slerp_shares,
    "spherical-mean": spherical_mean_shares,
}


def _check_same_tensors(
    folders: Sequence[Path], tables: Sequence[Mapping[str, StoredTensor]]
) -> None:
    first = {name: (tensor.shape, tensor.dtype) for name, tensor in tables[0].items()}
    for folder, table in zip(folders[1:], tables[1:], strict=True):
        other = {name: (tensor.shape, tensor.dtype) for name, tensor in table.items()}
        differing = sorted(n for n in first.keys() | other if first.get(n) != other.get(n))
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{folders[0]} and {folder} do not have the same tensors: {len(differing)} differ, "
                f"such as {name!r} with {first.get(name)} and {other.get(name)}. Merge checkpoints "
                "of one model"
            )


def _base_tensor(
    origin: Mapping[str, StoredTensor], tensor: StoredTensor, base: Path | None
) -> StoredTensor:
    """Find a tensor in the base model, which may name it as a part of a language model."""
    names = (tensor.name, f"model.{tensor.name}", tensor.name.removeprefix("model."))
    found = next((origin[name] for name in names if name in origin), None)
    if found is None or found.shape != tensor.shape:
        raise ConfigError(
            f"the base {base} has no tensor like {tensor.name!r} of shape {tensor.shape}; it has "
            f"{found.shape if found else 'none of that name'}. Give the model that the checkpoints "
            "were trained from"
        )
    return found
