"""What happens to vectors after the model: widths, unit length, int8.

int8 vectors have one symmetric scale per width, so that inner products keep their order: a vector
is stored as ``round(vector * scale)``, and an inner product of stored vectors divided by
``scale ** 2`` estimates the cosine.
"""

import numpy as np

_MAX_ROWS = 1024
"""Rows compared pair by pair: a million inner products say enough."""

_CLIPPED_SHARES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
"""Shares of the largest components that a scale may clip; the best of them is taken."""


def truncate_normalise(matrix: np.ndarray, dim: int) -> np.ndarray:
    """Return the first ``dim`` columns with rows of unit length, float32; a zero row stays zero."""
    matrix = np.asarray(matrix[:, :dim], np.float32)
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    norms[norms == 0] = 1
    return np.asarray(matrix / norms)


def fit_scale(matrix: np.ndarray) -> float:
    """Return the scale that keeps the inner products of a sample best: float32, (rows, dim).

    Outlier components would waste the range of all others, so some may be clipped.
    """
    sample = matrix[:_MAX_ROWS]
    magnitudes = np.abs(sample).ravel()
    limits = {float(np.quantile(magnitudes, 1 - share)) for share in _CLIPPED_SHARES} - {0.0}
    scales = sorted(127 / limit for limit in limits)
    return min(scales, key=lambda scale: _error(sample, scale), default=127.0)


def _error(matrix: np.ndarray, scale: float) -> float:
    restored = quantize(matrix, scale) / np.float32(scale)
    error = restored @ restored.T - matrix @ matrix.T
    np.fill_diagonal(error, 0)  # no search compares a vector with itself
    return float(np.square(error).mean())


def quantize(matrix: np.ndarray, scale: float) -> np.ndarray:
    """Return int8 of the same shape; components beyond the scale's range are clipped to 127."""
    scaled = np.clip(np.rint(matrix * np.float32(scale)), -127, 127)
    return scaled.astype(np.int8)
