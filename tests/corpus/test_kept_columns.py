import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units


def kept_column(tmp_path, *columns: pa.Array) -> pa.ChunkedArray:
    """What becomes of one kept column whose type differs between the objects of a unit."""
    for i, column in enumerate(columns):
        text = pa.array(["x"] * len(column))
        pq.write_table(pa.table({"text": text, "kept": column}), tmp_path / f"{i}.parquet")
    config = CorpusConfig(input=str(tmp_path), keep_columns=("kept",), unit_bytes=2**30)
    (unit,) = plan_units(config)
    return read_unit(unit, config).documents["kept"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([pa.array([1, None], pa.int8())], pa.array([1, None], pa.int8())),
        ([pa.array([[1], []])], pa.array([[1], []])),
        ([pa.nulls(1), pa.array([1])], pa.array([None, 1])),
        ([pa.array([1], pa.int8()), pa.array([2], pa.int64())], pa.array([1, 2])),
        ([pa.array([1]), pa.array([0.5])], pa.array([1.0, 0.5])),
        ([pa.array(["a"]), pa.array(["b"], pa.large_string())], pa.array(["a", "b"])),
        ([pa.array([1]), pa.array(["b"])], pa.array(["1", "b"])),
        ([pa.array([[1, 2]]), pa.array(["b"])], pa.array(["[1, 2]", "b"])),
        ([pa.array([{"a": 1}, None]), pa.array([2])], pa.array(['{"a": 1}', None, "2"])),
        (
            [pa.array(["a"]).dictionary_encode(), pa.array(["b"]).dictionary_encode()],
            pa.array(["a", "b"]),
        ),
    ],
    ids=lambda value: " ".join(str(c.type) for c in value) if isinstance(value, list) else "",
)
def test_types_that_differ_within_a_unit(tmp_path, columns, expected):
    found = kept_column(tmp_path, *columns)
    if pa.types.is_string(expected.type) and found.type == pa.large_string():
        expected = expected.cast(pa.large_string())
    assert found.type == expected.type
    assert found.to_pylist() == expected.to_pylist()
