"""int8 vectors keep cosines, also with outlier components."""

import numpy as np
import pytest

from qbatch.models.vectors import fit_scale, quantize


def unit_rows(rng, outlier: float) -> np.ndarray:
    matrix = rng.standard_normal((500, 256)).astype(np.float32)
    matrix[:, 7] *= outlier
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.mark.parametrize("outlier", [1.0, 5.0])
def test_inner_products_survive(rng, outlier):
    matrix = unit_rows(rng, outlier)
    scale = fit_scale(matrix)
    stored = quantize(matrix, scale).astype(np.float32)
    estimate = stored @ stored.T / scale**2
    assert np.abs(estimate - matrix @ matrix.T).max() < 0.02


def test_the_range_is_symmetric_and_used(rng):
    stored = quantize(unit_rows(rng, 1.0), fit_scale(unit_rows(rng, 1.0)))
    assert stored.dtype == np.int8
    assert stored.min() >= -127
    assert max(stored.max(), -stored.min()) > 100


def test_clipping_beats_the_full_range_when_outliers_are_common(rng):
    matrix = unit_rows(rng, 5.0)
    assert product_error(matrix, fit_scale(matrix)) < product_error(
        matrix, 127 / np.abs(matrix).max()
    )


def product_error(matrix: np.ndarray, scale: float) -> float:
    stored = quantize(matrix, scale).astype(np.float32)
    error = stored @ stored.T / scale**2 - matrix @ matrix.T
    return np.square(error[~np.eye(len(matrix), dtype=bool)]).mean()


def test_a_sample_of_zeros_has_a_scale():
    assert np.isfinite(fit_scale(np.zeros((3, 4), np.float32)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
