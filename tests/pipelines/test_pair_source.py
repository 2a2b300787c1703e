"""Published pairs as the next job reads them: by what they hold, not by when they were written."""

import pyarrow as pa
import pytest

from qbatch.errors import ConfigError, IntegrityError
from qbatch.pipelines.pair_source import pair_source, read_pairs
from qbatch.schema import TRAINING_PAIRS
from qbatch.storage import Storage
from tests.published_tables import publish_tables


def make_pairs(start: int) -> pa.Table:
    rows = [{"query": f"q{i}", "document": f"text {i}", "doc_id": f"d{i}"} for i in range(start, 5)]
    return pa.Table.from_pylist(rows, schema=TRAINING_PAIRS)


def plan(uri: str) -> list[str]:
    return [unit.key("") for unit in pair_source(uri, unit_bytes=1000).plan_units()]


def test_files_written_again_keep_their_units(store_uri):
    table = publish_tables(store_uri, [make_pairs(0), make_pairs(3)], kind="pairs")
    before = plan(store_uri)
    storage = Storage(store_uri)
    for path in table.generation.files["path"].to_pylist():
        written = storage.read(path)
        storage.delete(path)
        storage.write(path, written)
    assert plan(store_uri) == before
    source = pair_source(store_uri, unit_bytes=1000)
    rows = [read_pairs(unit, source).pairs for unit in source.plan_units()]
    assert pa.concat_tables(rows)["query"].to_pylist() == ["q0", "q1", "q2", "q3", "q4", "q3", "q4"]
    publish_tables(store_uri, [make_pairs(0), make_pairs(2)], kind="pairs", after=1)
    assert not set(plan(store_uri)) & set(before)


def test_a_damaged_file_is_not_read(tmp_path):
    uri = str(tmp_path)
    table = publish_tables(uri, [make_pairs(0)], kind="pairs")
    source = pair_source(uri, unit_bytes=1000)
    (path,) = table.generation.files["path"].to_pylist()
    damaged = bytearray((tmp_path / path).read_bytes())
    damaged[40] ^= 1
    (tmp_path / path).write_bytes(damaged)
    (unit,) = source.plan_units()
    with pytest.raises(IntegrityError, match="its manifest says"):
        read_pairs(unit, source)


def test_another_kind_of_table_is_refused(tmp_path):
    publish_tables(str(tmp_path), [make_pairs(0)])
    with pytest.raises(ConfigError, match="holds run, not pairs"):
        pair_source(str(tmp_path), unit_bytes=1000)
