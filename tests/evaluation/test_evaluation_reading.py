"""The same run and judgements in every form they come in, and what is refused."""

import gzip
import io
import json

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from qbatch.errors import BadInputError, IntegrityError, NoInputError
from qbatch.evaluation.reading import read_qrels, read_run
from qbatch.manifest import Generation, file_entry, publish
from qbatch.schema import FILES, QRELS, RUN
from qbatch.storage import Storage

RUN_ROWS = [
    {"query_id": "q1", "doc_id": "d\u00e9", "rank": 1, "score": 0.5},
    {"query_id": "q1", "doc_id": '"NA', "rank": 2, "score": 0.25},
    {"query_id": "2020-01-01", "doc_id": "007", "rank": 1, "score": -3.0},
]
QRELS_ROWS = [
    {"query_id": "q1", "doc_id": "d\u00e9", "relevance": 2},
    {"query_id": "q1", "doc_id": "NA", "relevance": 0},
    {"query_id": "null", "doc_id": "007", "relevance": -1},
]


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def beir(row) -> dict:
    return {
        "query-id": row["query_id"],
        "corpus-id": row["doc_id"],
        "score": float(row["relevance"]),
    }


def trec_run(separator: str = " ", end: str = "\n") -> bytes:
    lines = (
        separator.join([r["query_id"], "Q0", r["doc_id"], str(r["rank"]), str(r["score"]), "tag"])
        for r in RUN_ROWS
    )
    return "".join(line + end for line in lines).encode()


def trec_qrels(separator: str = " ") -> bytes:
    rows = ([r["query_id"], "0", r["doc_id"], str(r["relevance"])] for r in QRELS_ROWS)
    return "\n".join(separator.join(row) for row in rows).encode()


def header_tsv(rows, header: str) -> bytes:
    lines = [header, *("\t".join(map(str, row.values())) for row in rows)]
    return "\n".join(lines).encode()


EXTRA = [
    {**row, "passage_id": "p", "log_odds": 1.0, "retrieval_rank": 3, "text": "a {b} \t c"}
    for row in RUN_ROWS
]
DICTIONARY = pa.dictionary(pa.int32(), pa.string())

RUN_FORMS = {
    "trec": trec_run(),
    "trec with tabs": trec_run("\t"),
    "trec with any whitespace": trec_run(" \t "),
    "trec from Windows": trec_run(end="\r\n"),
    "trec with blank lines and a byte order mark": b"\xef\xbb\xbf" + trec_run(end=" \n\n"),
    "header": header_tsv(RUN_ROWS, "query_id\tdoc_id\trank\tscore"),
    "jsonl": jsonl(RUN_ROWS),
    "jsonl with more keys": jsonl(EXTRA),
    "parquet": parquet(pa.Table.from_pylist(RUN_ROWS)),
    "parquet with more columns": parquet(pa.Table.from_pylist(EXTRA)),
    "parquet of dictionaries": parquet(
        pa.table(
            {
                "query_id": pa.array([r["query_id"] for r in RUN_ROWS]).cast(DICTIONARY),
                "doc_id": pa.array([r["doc_id"] for r in RUN_ROWS]).cast(DICTIONARY),
                "rank": pa.array([r["rank"] for r in RUN_ROWS], pa.int64()),
                "score": pa.array([r["score"] for r in RUN_ROWS], pa.float64()),
            }
        )
    ),
}
QRELS_FORMS = {
    "trec": trec_qrels(),
    "trec with tabs": trec_qrels("\t"),
    "trec in columns": trec_qrels("   "),
    "beir": header_tsv(QRELS_ROWS, "query-id\tcorpus-id\tscore"),
    "beir with whole floats": header_tsv(map(beir, QRELS_ROWS), "query-id\tcorpus-id\tscore"),
    "header below a blank line": b"\n" + header_tsv(QRELS_ROWS, "query_id\tdoc_id\trelevance"),
    "repeated lines": trec_qrels() + b"\n" + trec_qrels(),
    "jsonl": jsonl(QRELS_ROWS),
    "beir jsonl": jsonl(map(beir, QRELS_ROWS)),
    "parquet": parquet(pa.Table.from_pylist(QRELS_ROWS)),
    "beir parquet": parquet(pa.Table.from_pylist(list(map(beir, QRELS_ROWS)))),
}


def written(folder, content: bytes, name: str = "file") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize("form", RUN_FORMS)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_runs(tmp_path, form, compress):
    table = read_run(written(tmp_path, compress(RUN_FORMS[form])))
    assert table.to_pylist() == RUN_ROWS
    assert table.schema == pa.schema([RUN.field(name) for name in table.column_names])


@pytest.mark.parametrize("form", QRELS_FORMS)
def test_qrels(tmp_path, form):
    table = read_qrels(written(tmp_path, QRELS_FORMS[form]))
    assert table.to_pylist() == QRELS_ROWS
    assert table.schema == QRELS


@pytest.mark.parametrize("key", ["rank", "score"])
def test_a_run_needs_only_ranks_or_scores(tmp_path, key):
    rows = [{k: v for k, v in row.items() if k in ("query_id", "doc_id", key)} for row in RUN_ROWS]
    for content in (jsonl(rows), parquet(pa.Table.from_pylist(rows))):
        assert read_run(written(tmp_path, content)).to_pylist() == rows


def test_ids_written_as_numbers(tmp_path):
    rows = [{"query_id": 12345678901234567890, "doc_id": 7, "relevance": 1}]
    table = read_qrels(written(tmp_path, jsonl(rows)))
    assert table.to_pylist() == [
        {"query_id": "12345678901234567890", "doc_id": "7", "relevance": 1}
    ]
    columns = {"query_id": [1], "doc_id": [7], "relevance": [1]}
    table = read_qrels(written(tmp_path, parquet(pa.table(columns))))
    assert table.to_pylist() == [{"query_id": "1", "doc_id": "7", "relevance": 1}]


ids = st.text(st.characters(exclude_characters="\t\r\n", exclude_categories=["Cs"]), min_size=1)


judged = st.tuples(ids, ids, st.integers(-(2**31), 2**31 - 1))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(judged, min_size=1, unique_by=lambda row: row[:2]))
def test_json_lines_of_any_ids(tmp_path, rows):
    names = ("query_id", "doc_id", "relevance")
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    assert read_qrels(written(tmp_path, jsonl(rows))).to_pylist() == rows
    numbers = [{**row, "relevance": float(row["relevance"])} for row in rows]
    assert read_qrels(written(tmp_path, jsonl(numbers))).to_pylist() == rows


def publish_parts(uri: str, parts: list[pa.Table]) -> None:
    storage = Storage(uri)
    entries = []
    for i, part in enumerate(parts):
        data = parquet(part)
        storage.write(f"data/{i}.parquet", data)
        entries.append(file_entry(f"data/{i}.parquet", part.num_rows, data))
    draft = Generation(
        kind="run", fingerprint={}, config={}, counts={}, rejects=FILES.empty_table(),
        files=pa.Table.from_pylist(entries, schema=FILES),
    )  # fmt: skip
    publish(storage, draft, after=0)


def test_a_published_table_is_what_its_manifest_lists(store_uri):
    rows = [{**row, "passage_id": "p"} for row in RUN_ROWS]
    parts = [pa.Table.from_pylist(part, schema=RUN) for part in (rows[:2], rows[2:])]
    publish_parts(store_uri, parts)
    Storage(store_uri).write("data/9.parquet", b"a file that nothing lists")
    assert read_run(store_uri).to_pylist() == RUN_ROWS
    Storage(store_uri).write("data/1.parquet", parquet(parts[0]))
    with pytest.raises(IntegrityError, match=r"data/1\.parquet has sha256"):
        read_run(store_uri)


def test_files_in_any_store(store_uri):
    Storage(store_uri).write("deep/run.trec.gz", gzip.compress(trec_run()))
    assert read_run(f"{store_uri}/deep/run.trec.gz").to_pylist() == RUN_ROWS
    with pytest.raises(NoInputError, match=r"there is no run at .*/deep/other; give a file"):
        read_run(f"{store_uri}/deep/other")


def test_a_beir_folder_and_its_splits(store_uri):
    storage = Storage(store_uri)
    storage.write("corpus.jsonl", b"{}")
    storage.write("qrels/test.tsv", QRELS_FORMS["beir"])
    storage.write("qrels/dev.tsv.gz", gzip.compress(QRELS_FORMS["beir"].replace(b"\t2", b"\t1")))
    assert read_qrels(store_uri).to_pylist() == QRELS_ROWS
    assert read_qrels(store_uri, "dev")["relevance"].to_pylist() == [1, 0, -1]
    with pytest.raises(NoInputError, match=r"no judgements for --split=train; it has dev, test"):
        read_qrels(store_uri, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q Q0 d 1 0.5 t\n\nq Q0 d 2 0.5\n", r"line 3: 5 fields where 6 .*: 'q Q0 d 2 0.5'"),
        (b"q Q0 d 1 0.5 t\nq Q0 e x 0.5 t\n", r"line 2: rank is 'x', not int32"),
        (b"q Q0 d 1 0.5 t\nq Q0 e 1.5 0.5 t\n", r"line 2: rank is '1.5', not int32"),
        (b"q Q0 d 1 0.5 t\nq Q0 e 2 nan t\n", r"line 2: score is 'nan', not float"),
        (b"q Q0 d 1 0,5 t\n", r"line 1: score is '0,5', not float"),
        (b"q Q0 \xff 1 0.5 t\n", r"line 1: .*can't decode byte 0xff"),
        (b"query_id\tdoc_id\tscore\nq\td\n", r"line 2: 2 fields where 3 are expected"),
        (b"query_id\tdoc_id\tgrade\nq\td\t1\n", r"line 1 has the columns .*rank or score, each"),
        (b"query_id\tdoc_id\tdoc_id\trank\n", r"a run needs .*, each once"),
        (b'{"query_id": "q", "doc_id": "d"}', r"line 1 has the columns query_id, doc_id; a run"),
        (b'{"query_id": "q", "doc_id": "d", "rank": 1}\n{"query_id": "q"}\n', r"line 2: 'doc_id'"),
        (b'{"query_id": "q", "doc_id": "d", "rank": 1}\n[1]\n', r"line 2: not a JSON object"),
        (b'{"query_id": "q", "doc_id": "d", "rank": 1}\n{"query\n', r"line 2: Unterminated"),
        (b'{"query_id": "q", "doc_id": true, "rank": 1}\n', r"line 1: 'doc_id' is true"),
        (b'{"query_id": "q", "doc_id": "d", "score": NaN}\n', r"line 1: 'score' is NaN"),
        (b'{"query_id": "q", "doc_id": "\\ud800", "rank": 1}\n', r"line 1: doc_id is '\\ud800'"),
        (b'{"query_id": "q", \n', r"line 1: Expecting property name"),
        pytest.param(gzip.compress(b"q Q0 d 1 0.5 t\n")[:-9], r"is damaged gzip", id="cut gzip"),
        pytest.param(parquet(RUN.empty_table())[:-1], r"is damaged Parquet", id="cut Parquet"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, content, message):
    with pytest.raises(BadInputError, match=message):
        read_run(written(tmp_path, content))


def test_the_line_is_right_far_down(tmp_path, monkeypatch):
    monkeypatch.setattr("qbatch.evaluation.text_files._CHUNK_LINES", 10)
    lines = [f"q Q0 d{i} {i} 0.5 t" for i in range(1, 101)]
    lines[72] = "q Q0 d73 ? 0.5 t"
    with pytest.raises(BadInputError, match=r"line 73: rank is '\?'"):
        read_run(written(tmp_path, "\n".join(lines).encode()))
    lines[72] = "q  Q0 d73 73 0.5 t"
    assert read_run(written(tmp_path, "\n".join(lines).encode()))["rank"].to_pylist() == list(
        range(1, 101)
    )


@pytest.mark.parametrize("query_id", ["{", '{"a"}', "PAR1", "[]", '"', "#", "é"])
def test_query_ids_that_look_like_another_form(tmp_path, query_id):
    run = read_run(written(tmp_path, f"{query_id} Q0 d 1 0.5 t\n".encode()))
    assert run["query_id"].to_pylist() == [query_id]


def test_half_relevance_and_contradictions_are_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"line 1: relevance is '0.5', not int32"):
        read_qrels(written(tmp_path, b"q 0 d 0.5\n"))
    with pytest.raises(BadInputError, match="judges document 'd' of query 'q' as 0 and as 2"):
        read_qrels(written(tmp_path, b"q 0 d 0\nq 0 e 1\nq 0 d 2\n"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rank": None}, r"has the columns query_id, doc_id; a run needs .* rank or score"),
        ({"doc_id": [1.5, 2]}, r"'doc_id' .* is double; ids are read"),
        ({"doc_id": ["d", None]}, r"'doc_id' .* is None in row 1"),
        ({"rank": None, "score": [0, float("nan")]}, r"'score' .* is nan in row 1"),
        ({"rank": [1, 2**40]}, r"'rank' .* is int64, not int32"),
        ({"rank": [[1], [2]]}, r"'rank' .* is list<.*, not int32"),
    ],
)
def test_bad_columns_are_named(tmp_path, columns, message):
    columns = {"query_id": ["q", "q"], "doc_id": ["d", "e"], "rank": [1, 2]} | columns
    columns = {name: values for name, values in columns.items() if values is not None}
    with pytest.raises(BadInputError, match=message):
        read_run(written(tmp_path, parquet(pa.table(columns))))


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"query_id\tdoc_id\trank\n", parquet(RUN.empty_table())]
)
def test_no_rows_are_no_input(tmp_path, content):
    with pytest.raises(NoInputError, match="holds no row"):
        read_run(written(tmp_path, content))


def test_directories_without_anything(tmp_path):
    with pytest.raises(NoInputError, match="there is no run at"):
        read_run(str(tmp_path))
    written(tmp_path, b"", "something")
    with pytest.raises(NoInputError, match=r"nothing is published .* a BEIR folder"):
        read_qrels(str(tmp_path))
    publish_parts(str(tmp_path / "table"), [])
    with pytest.raises(NoInputError, match=r"generation 1 of .* holds no row"):
        read_run(str(tmp_path / "table"))
