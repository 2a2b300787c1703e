import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.corpus import cutting
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.units import plan_units

NUM_ROWS = 1000


@pytest.fixture
def config(tmp_path):
    table = pa.table({"text": [f"{i:0100d}" for i in range(NUM_ROWS)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    return CorpusConfig(input=str(tmp_path), unit_bytes=2000)


def spans(config):
    return [unit.spans[0] for unit in plan_units(config)]


def test_a_footer_decides_the_cut(config):
    assert sum(span.stop - span.start for span in spans(config)) == NUM_ROWS


@pytest.mark.parametrize("group", [(100, 2**62), (-1, 5), (5, -1)])
def test_a_footer_that_lies_makes_no_endless_plan(config, monkeypatch, group):
    monkeypatch.setattr(cutting, "_row_groups", lambda _: iter([(100, 5000), group]))
    (span,) = spans(config)
    assert span.kind == "whole"
