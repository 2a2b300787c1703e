import numpy as np
import pyarrow as pa
import pytest

from qbatch.errors import ConfigError
from qbatch.index.columns import VectorColumn, check_same_space, scores_of
from qbatch.schema import vector_array
from tests.vector_tables import FINGERPRINT, clustered

PRINT = FINGERPRINT | {"dims": [32, 16]}


def test_a_width_finds_its_column():
    assert VectorColumn.of(PRINT).name == "vector"
    assert VectorColumn.of(PRINT, 16).name == "vector_16"
    with pytest.raises(ConfigError, match=r"no column of 8 components; it has \[32, 16\]"):
        VectorColumn.of(PRINT, 8)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 0), ("float16", 2e-3), ("int8", 2e-2)]
)
def test_every_stored_dtype_becomes_unit_vectors(dtype, tolerance):
    vectors = clustered(100, 32)
    fingerprint = PRINT | {"vector_dtype": dtype, "scales": [180.0, 240.0]}
    stored = vectors
    if dtype == "float16":
        stored = vectors.astype(np.float16)
    if dtype == "int8":
        stored = np.clip(np.rint(vectors * 180), -127, 127).astype(np.int8)
    table = pa.table({"vector": vector_array(stored)})
    matrix = VectorColumn.of(fingerprint).matrix(table)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(matrix, vectors, atol=tolerance)


def test_scores_are_inner_products_in_both_metrics():
    a, b = clustered(1, 32)[0], clustered(1, 32, seed=1)[0]
    assert VectorColumn.of(PRINT).metric == "l2"
    assert VectorColumn.of(PRINT | {"normalize": False}).metric == "inner_product"
    squared = np.array([((a - b) ** 2).sum()])
    assert scores_of(squared, "l2")[0] == pytest.approx(float(a @ b), abs=1e-6)


def test_another_model_is_refused_with_both_fingerprints():
    check_same_space(PRINT, PRINT | {"prompt": "query: ", "dims": [16], "vector_dtype": "int8"})
    with pytest.raises(ConfigError, match=r"differ in \['weights_sha256'\].*'w'.*'other'"):
        check_same_space(PRINT, PRINT | {"weights_sha256": "other"})
