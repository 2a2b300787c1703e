import io
import pickle

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.readers.parquet import read_parquet
from qbatch.corpus.sources import Source
from qbatch.corpus.spans import Span
from qbatch.corpus.units import plan_units


def texts(num: int) -> list[str]:
    return [f"text number {i} " * 20 for i in range(num)]


def write(path, num_rows: int, row_group_size: int) -> None:
    table = pa.table({"doc_id": [str(i) for i in range(num_rows)], "text": texts(num_rows)})
    pq.write_table(table, path, row_group_size=row_group_size, use_dictionary=False)


@pytest.mark.parametrize(
    ("row_group_size", "num_units"),
    [(100, (5, 40)), (10_000, (5, 40)), (1500, (5, 40))],
    ids=["many row groups", "one huge row group", "some of both"],
)
def test_large_files_are_cut_by_row_groups(tmp_path, read_corpus, row_group_size, num_units):
    write(tmp_path / "a.parquet", 5000, row_group_size)
    whole = read_corpus(tmp_path)
    cut = read_corpus(tmp_path, unit_bytes=100_000)
    assert whole.column("text") == texts(5000)
    assert whole.column("row") == list(range(5000))
    assert cut.documents == whole.documents
    assert num_units[0] < len(cut.units) < num_units[1]
    assert {unit.spans[0].kind for unit in cut.units} == {"rows"}


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(0, 7),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_a_row_span_is_a_slice_from_its_row_group_on(sizes, row_group, start, length):
    row_group = min(row_group, len(sizes) - 1)
    file = io.BytesIO()
    rows = list(map(str, range(sum(sizes))))
    table = pa.table({"doc_id": rows, "text": rows})
    with pq.ParquetWriter(file, table.schema) as writer:
        first = 0
        for size in sizes:
            writer.write_table(table.slice(first, size), row_group_size=max(1, size))
            first += size
    num_groups = pq.ParquetFile(file).num_row_groups
    groups = [s for s in sizes if s] if num_groups < len(sizes) else sizes
    row_group = min(row_group, max(0, len(groups) - 1))
    origin = sum(groups[:row_group])
    size = len(file.getvalue())
    span = Span("a.parquet", size, "v", "rows", row_group, start, start + length)
    source = Source(span, file)
    found = [
        r for raw in read_parquet(source, CorpusConfig(input="x")) for r in raw.rows.to_pylist()
    ]
    assert found == list(range(len(rows)))[origin + start : origin + start + length]


def test_a_corrupt_footer_does_not_stop_the_plan(tmp_path, read_corpus):
    write(tmp_path / "a.parquet", 3000, 100)
    write(tmp_path / "c.parquet", 3000, 100)
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + b"x" * 200_000 + b"PAR1")
    corpus = read_corpus(tmp_path, unit_bytes=20_000)
    assert len(corpus.documents) == 6000
    assert corpus.reasons() == [(None, "corrupt_file")]


def test_a_large_file_without_text_is_rejected_once(tmp_path, read_corpus):
    write(tmp_path / "a.parquet", 3000, 100)
    corpus = read_corpus(tmp_path, unit_bytes=20_000, text_column="body")
    assert corpus.reasons() == [(None, "missing_text_column")]


def test_damaged_pages_reject_the_file_and_keep_what_was_read_before(tmp_path, read_corpus):
    path = tmp_path / "a.parquet"
    table = pa.table({"doc_id": ["x"] * 5000, "text": texts(5000)})
    pq.write_table(
        table,
        path,
        row_group_size=1000,
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
    )
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(2).column(1)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    corpus = read_corpus(tmp_path)
    assert corpus.column("text") == texts(2000)
    assert corpus.reasons() == [(None, "corrupt_file")]
    assert "after row 2000" in corpus.rejects[0]["detail"]


def test_two_text_columns_are_ambiguous(tmp_path, read_corpus):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = read_corpus(tmp_path)
    assert corpus.reasons() == [(None, "missing_text_column")]
    assert "2 columns are named 'text'" in corpus.rejects[0]["detail"]


def test_invalid_utf8_outside_the_text_is_repaired(tmp_path, read_corpus):
    bad = pa.array([b"ok", b"\xffx", None]).view(pa.string())
    table = pa.table({"doc_id": bad, "text": ["a", "b", "c"], "note": bad, "title": bad})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = read_corpus(tmp_path, title_column="title", keep_columns=("note",))
    assert corpus.column("doc_id") == ["ok", "\ufffdx", "a.parquet:2"]
    assert corpus.column("note") == corpus.column("title") == ["ok", "\ufffdx", None]
    assert corpus.counts["repaired_utf8"] == 3


class _TestExtension(pa.ExtensionType):
    def __init__(self):
        super().__init__(pa.string(), "qbatch.test.extension")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()


@pytest.mark.parametrize("is_known", [True, False])
def test_extension_types_are_refused_as_text_and_kept_as_storage(tmp_path, read_corpus, is_known):
    plain = pa.array(["a"])
    extension_array = pa.ExtensionArray.from_storage(_TestExtension(), plain)
    pq.write_table(pa.table({"text": extension_array, "note": plain}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": plain, "note": extension_array}), tmp_path / "b.parquet")
    if is_known:
        pa.register_extension_type(_TestExtension())
    try:
        corpus = read_corpus(tmp_path, keep_columns=("note",))
    finally:
        if is_known:
            pa.unregister_extension_type("qbatch.test.extension")
    assert corpus.reasons() == [(None, "text_column_type")]
    assert corpus.rejects[0]["object_uri"].endswith("a.parquet")
    assert corpus.column("note") == ["a"]


def test_a_pickled_extension_type_never_runs(tmp_path, read_corpus):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return open, (str(canary), "w")

    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload()),
    }
    field = pa.field("text", pa.string(), metadata=metadata)
    table = pa.table([pa.array(["x"])], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_corpus(tmp_path).reasons() == [(None, "text_column_type")]
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload())).close()
    assert canary.exists()  # the payload does work where it is run


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(flips=st.lists(st.integers(0, 10**9), min_size=1, max_size=4))
def test_random_damage_never_escapes(tmp_path, read_corpus, flips):
    path = tmp_path / "a.parquet"
    write(path, 200, 50)
    data = bytearray(path.read_bytes())
    for flip in flips:
        data[flip // 8 % len(data)] ^= 1 << flip % 8
    path.write_bytes(data)
    read_corpus(tmp_path, unit_bytes=2000)  # conservation is checked by the fixture


def test_planning_reads_footers_of_large_files_only(tmp_path):
    (tmp_path / "small.parquet").write_bytes(b"not parquet")
    write(tmp_path / "large.parquet", 3000, 100)
    units = list(plan_units(CorpusConfig(input=str(tmp_path), unit_bytes=20_000)))
    kinds = {span.uri.rpartition("/")[2]: span.kind for unit in units for span in unit.spans}
    assert kinds == {"large.parquet": "rows", "small.parquet": "whole"}


@pytest.mark.parametrize("unit_bytes", [1000, 2**20])
def test_column_names_that_are_not_utf8(tmp_path, read_corpus, unit_bytes):
    path = tmp_path / "a.parquet"
    table = pa.table({"doc_id": ["x"] * 100, "text": texts(100), "other": [1] * 100})
    pq.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"other", b"oth\xffr"))
    corpus = read_corpus(tmp_path, unit_bytes=unit_bytes)
    assert corpus.reasons() == [(None, "corrupt_file")]
