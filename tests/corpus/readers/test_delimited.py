import csv
import gzip
import io

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

cells = st.text(st.sampled_from(list('ab,"\n\r;\té ')), max_size=12).filter(str.strip)


def as_csv(rows, **settings) -> str:
    file = io.StringIO()
    csv.writer(file, **settings).writerows(rows)
    return file.getvalue()


def test_quoted_newlines_commas_and_quotes(tmp_path, read_corpus):
    rows = [("doc_id", "text", "n"), ("001", 'line one\nline "two", end', "1"), ("2", "NA", "")]
    (tmp_path / "a.csv").write_text("\ufeff" + as_csv(rows), newline="")
    corpus = read_corpus(tmp_path, keep_columns=("n", "absent"))
    assert corpus.column("doc_id") == ["001", "2"]
    assert corpus.column("text") == ['line one\nline "two", end', "NA"]
    assert corpus.column("n") == ["1", ""]
    assert corpus.column("absent") == [None, None]
    assert corpus.column("row") == [0, 1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=20))
def test_what_python_writes_is_read_back(tmp_path, read_corpus, rows):
    content = as_csv([("doc_id", "text"), *rows], quoting=csv.QUOTE_ALL)
    (tmp_path / "a.csv").write_text(content, newline="")
    corpus = read_corpus(tmp_path)
    assert list(zip(corpus.column("doc_id"), corpus.column("text"), strict=True)) == rows


def test_tsv(tmp_path, read_corpus):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"text\tdoc_id\nx, y\t1\n"))
    corpus = read_corpus(tmp_path)
    assert (corpus.column("text"), corpus.column("doc_id")) == (["x, y"], ["1"])


def test_bad_records_have_their_numbers(tmp_path, read_corpus):
    (tmp_path / "a.csv").write_bytes(
        b"doc_id,text\n0,a\n1\n\n2,b\n3,c,\xff\n4,\xff\n5,d\n6,\n7,e\n8,f,g\n"
    )
    corpus = read_corpus(tmp_path)
    assert corpus.column("row") == [0, 2, 5, 7]
    assert corpus.column("doc_id") == ["0", "2", "5", "7"]
    assert sorted(corpus.reasons()) == [
        (1, "bad_csv"),
        (3, "bad_csv"),
        (4, "invalid_utf8"),
        (6, "empty_text"),
        (8, "bad_csv"),
    ]
    assert corpus.counts["rejected:bad_csv"] == 3


def test_an_unclosed_quote_takes_the_rest_as_one_bad_record(tmp_path, read_corpus):
    (tmp_path / "a.csv").write_text('doc_id,text,n\n0,a,1\n1,"b,1\n2,c,1\n')
    corpus = read_corpus(tmp_path)
    assert corpus.column("text") == ["a"]
    assert corpus.reasons() == [(1, "bad_csv")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_file"),
        (b"\n\n", "empty_file"),
        (b"doc_id,body\n1,x\n", "missing_text_column"),
        (b"text,text\n1,x\n", "missing_text_column"),
        (b"\x00\x01\xff\xfe", "missing_text_column"),
    ],
)
def test_unusable_files(tmp_path, read_corpus, content, reason):
    (tmp_path / "a.csv").write_bytes(content)
    assert read_corpus(tmp_path).reasons() == [(None, reason)]


def test_a_truncated_stream_drops_the_record_that_was_cut(tmp_path, read_corpus):
    rows = [("doc_id", "text"), *((str(i), f'"{i**60:x}"\n') for i in range(5000))]
    data = gzip.compress(as_csv(rows).encode())
    (tmp_path / "a.csv.gz").write_bytes(data)
    whole = read_corpus(tmp_path)
    assert len(whole.documents) == 5000
    for kept in range(20_000, 20_040):
        (tmp_path / "a.csv.gz").write_bytes(data[:kept])
        corpus = read_corpus(tmp_path)
        assert 100 < len(corpus.documents) < 4900
        assert corpus.documents == whole.documents[: len(corpus.documents)]
        assert corpus.reasons() == [(None, "truncated_stream")]


def test_a_stream_cut_inside_its_header(tmp_path, read_corpus):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"doc_id,text\n")[:5])
    assert read_corpus(tmp_path).reasons() == [(None, "truncated_stream")]
