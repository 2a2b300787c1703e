"""Every row of the bad-input table, as a corpus of real files read through the plan."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qbatch.corpus import sources
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units
from qbatch.errors import BadInputError, NoInputError, SourceChangedError, StorageError
from qbatch.storage import Storage

LINE = b'{"doc_id":"%d","text":"text %d"}\n'


def lines(num: int) -> bytes:
    return b"".join(LINE % (i, i) for i in range(num))


def write_parquet(path, **columns) -> None:
    pq.write_table(pa.table(columns), path)


def test_zero_byte_parquet_is_rejected_as_a_file(tmp_path, read_corpus):
    (tmp_path / "a.parquet").touch()
    write_parquet(tmp_path / "b.parquet", doc_id=["1"], text=["x"])
    corpus = read_corpus(tmp_path)
    assert corpus.reasons() == [(None, "empty_file")]
    assert corpus.rejects[0]["object_uri"] == str(tmp_path / "a.parquet")
    assert corpus.column("text") == ["x"]


@pytest.mark.parametrize("kept", [3, 20, 200, -5])
def test_truncated_parquet_is_rejected_and_the_rest_goes_on(tmp_path, read_corpus, kept):
    write_parquet(tmp_path / "b.parquet", doc_id=["1"], text=["x"])
    (tmp_path / "a.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:kept])
    corpus = read_corpus(tmp_path)
    assert corpus.reasons() == [(None, "corrupt_file")]
    assert corpus.column("text") == ["x"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv"])
def test_zero_row_files_are_fine(tmp_path, read_corpus, name):
    if name == "a.parquet":
        write_parquet(tmp_path / name, doc_id=pa.array([], "string"), text=pa.array([], "string"))
    else:
        content = {"a.jsonl": b"", "a.jsonl.gz": gzip.compress(b""), "a.csv": b"doc_id,text\n"}
        (tmp_path / name).write_bytes(content[name])
    corpus = read_corpus(tmp_path, keep_columns=("extra",))
    assert (corpus.rows_in, corpus.documents, corpus.rejects) == (0, [], [])
    assert len(corpus.units) == 1


def test_empty_prefix_is_no_input(tmp_path):
    with pytest.raises(NoInputError, match="no object to read"):
        list(plan_units(CorpusConfig(input=str(tmp_path / "nothing"))))


def test_missing_columns(tmp_path, read_corpus):
    write_parquet(tmp_path / "a.parquet", doc_id=["1"], body=["x"])
    write_parquet(tmp_path / "b.parquet", text=["y"])
    write_parquet(tmp_path / "c.parquet", doc_id=["3"], text=["z"], title=["t"], year=[1999])
    corpus = read_corpus(tmp_path, title_column="title", keep_columns=("year",))
    assert corpus.reasons() == [(None, "missing_text_column")]
    assert "['doc_id', 'body']" in corpus.rejects[0]["detail"]
    assert corpus.column("doc_id") == ["b.parquet:0", "3"]
    assert corpus.column("title") == [None, "t"]
    assert corpus.column("year") == [None, 1999]


@pytest.mark.parametrize(
    "text",
    [
        pa.array([5]),
        pa.array([True]),
        pa.array([["x"]]),
        pa.array([{"x": "y"}]),
        pa.array([b"16 bytes of uuid"], pa.binary(16)),
        pa.array([5]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_a_text_column_of_another_type_rejects_the_file(tmp_path, read_corpus, text):
    write_parquet(tmp_path / "a.parquet", doc_id=["1"], text=text)
    write_parquet(tmp_path / "b.parquet", doc_id=["2"], text=["fine"])
    corpus = read_corpus(tmp_path)
    assert corpus.reasons() == [(None, "text_column_type")]
    assert corpus.column("text") == ["fine"]


@pytest.mark.parametrize(
    "text_type",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()],
    ids=str,
)
def test_all_string_and_binary_types_are_read_alike(tmp_path, read_corpus, text_type):
    write_parquet(tmp_path / "a.parquet", doc_id=["1", "2"], text=pa.array(["a", None], text_type))
    write_parquet(tmp_path / "b.parquet", doc_id=["3"], text=["plain"])
    corpus = read_corpus(tmp_path)
    assert corpus.column("text") == ["a", "plain"]
    assert corpus.reasons() == [(1, "null_text")]


def test_dictionary_and_null_columns(tmp_path, read_corpus):
    encoded = pa.array(["x", "y", "x"]).dictionary_encode()
    write_parquet(tmp_path / "a.parquet", doc_id=["1", "2", "3"], text=encoded, lang=encoded)
    write_parquet(tmp_path / "b.parquet", doc_id=["4"], text=pa.nulls(1))
    corpus = read_corpus(tmp_path, keep_columns=("lang",))
    assert corpus.column("text") == corpus.column("lang") == ["x", "y", "x"]
    assert corpus.reasons() == [(0, "null_text")]


INVALID = [b"a", b"\xff\xfe", b"c"]


@pytest.mark.parametrize(
    "text",
    [
        pa.array(INVALID),
        pa.array(INVALID).view(pa.string()),
        pa.array(INVALID, pa.large_binary()).view(pa.large_string()),
    ],
    ids=lambda text: str(text.type),
)
def test_invalid_utf8_in_parquet_rejects_the_row(tmp_path, read_corpus, text):
    write_parquet(tmp_path / "a.parquet", doc_id=["1", "2", "3"], text=text)
    corpus = read_corpus(tmp_path)
    assert corpus.column("text") == ["a", "c"]
    assert corpus.reasons() == [(1, "invalid_utf8")]
    assert (corpus.rejects[0]["doc_id"], corpus.rejects[0]["raw"]) == ("2", b"\xff\xfe")


def test_three_broken_lines_among_ten_thousand_whole_and_cut(tmp_path, read_corpus):
    rows = lines(10_000).splitlines(keepends=True)
    bad = {17: b"{broken\n", 5000: b'{"text": "cut\n', 9999: b'{"doc_id":"9999","text":}\n'}
    for i, line in bad.items():
        rows[i] = line
    offsets = [sum(map(len, rows[:i])) for i in bad]
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    whole = read_corpus(tmp_path)
    assert len(whole.documents) == 9997
    assert whole.reasons() == [(offset, "bad_json") for offset in offsets]
    assert [reject["raw"] + b"\n" for reject in whole.rejects] == list(bad.values())
    assert whole.counts == {"rejected:bad_json": 3}
    for unit_bytes in (5000, 77_777):
        cut = read_corpus(tmp_path, unit_bytes=unit_bytes)
        assert len(cut.units) > 4
        assert cut.documents == whole.documents
        assert cut.rejects == whole.rejects


def test_json_ids_and_texts_keep_their_characters(tmp_path, read_corpus):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"doc_id":"001","text":"2024-01-01"}\n'
        b'{"doc_id":001,"text":"leading zeros are not JSON"}\n'
        b'{"doc_id":12345678901234567890,"text":"a"}\n'
        b'{"doc_id":12345678901234567891,"text":"b"}\n'
        b'{"doc_id":1.0,"text":"c"}\n'
        b'{"doc_id":1e400,"text":"d"}\n'
        b'{"doc_id":true,"text":"e"}\n' + b'{"doc_id":%s,"text":"f"}\n' % (b"9" * 5000)
    )
    corpus = read_corpus(tmp_path)
    assert corpus.column("doc_id") == [
        *("001", "12345678901234567890", "12345678901234567891", "1.0", "1e400", "true"),
        "9" * 5000,
    ]
    assert corpus.column("text")[0] == "2024-01-01"
    assert [reason for _, reason in corpus.reasons()] == ["bad_json"]


def test_lone_surrogates_become_replacement_characters_and_are_counted(tmp_path, read_corpus):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"doc_id":"\\udc00x","text":"a\\ud800b"}\n'
        b'{"doc_id":"2","text":"\\ud83d\\ude00"}\n'
        b'{"doc_id":"\\ud800","text":null}\n'
    )
    corpus = read_corpus(tmp_path)
    assert corpus.column("text") == ["a\ufffdb", "\U0001f600"]
    assert corpus.column("doc_id") == ["\ufffdx", "2"]
    assert corpus.counts["repaired_surrogates"] == 2
    assert corpus.rejects[0]["doc_id"] == "\ufffd"


@pytest.mark.parametrize("unit_bytes", [10, 2**20])
def test_bom_crlf_and_no_final_newline(tmp_path, read_corpus, unit_bytes):
    first = b'\xef\xbb\xbf{"doc_id":"1","text":"a"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(first + b'\r\n{"doc_id":"2","text":"b"}')
    corpus = read_corpus(tmp_path, unit_bytes=unit_bytes)
    assert corpus.column("text") == ["a", "b"]
    assert corpus.column("row") == [0, len(first) + 2]
    assert corpus.counts == {}


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)]
)
def test_a_truncated_stream_keeps_its_whole_lines(tmp_path, read_corpus, suffix, compress):
    data = compress(b"".join(b'{"doc_id":"%d","text":"%x"}\n' % (i, i**40) for i in range(20_000)))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(data)
    whole = read_corpus(tmp_path)
    assert len(whole.documents) == 20_000
    path.write_bytes(data[: len(data) // 2])
    corpus = read_corpus(tmp_path)
    assert 5000 < len(corpus.documents) < 15_000
    assert corpus.documents == whole.documents[: len(corpus.documents)]
    assert corpus.reasons() == [(None, "truncated_stream")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.csv.gz", "a.csv"])
def test_no_bytes_where_a_header_must_be(tmp_path, read_corpus, name):
    (tmp_path / name).touch()
    assert read_corpus(tmp_path).reasons() == [(None, "empty_file")]


def test_a_document_above_the_limit_is_cut_at_a_character(tmp_path, read_corpus):
    texts = ["x" * 10, "x" * 11, "xxxxxxxxx\u00e9", "\U0001f600" * 3, ""]
    write_parquet(tmp_path / "a.parquet", doc_id=[*"12345"], text=texts)
    corpus = read_corpus(tmp_path, max_document_bytes=10)
    assert corpus.column("text") == ["x" * 10, "x" * 10, "x" * 9, "\U0001f600" * 2]
    assert corpus.counts == {"truncated_documents": 3, "rejected:empty_text": 1}


def test_nul_and_controls_are_kept_and_counted(tmp_path, read_corpus):
    texts = ["a\x00b", "plain\ttext\r\n", "\x07", "\x00", "no"]
    write_parquet(tmp_path / "a.parquet", doc_id=[*"12345"], text=texts)
    lines = [json.dumps({"doc_id": "j", "text": text}) for text in texts]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + '\n{"doc_id":"j","text":"raw \t tab"}')
    corpus = read_corpus(tmp_path)
    assert corpus.column("text") == [*texts, *texts, "raw \t tab"]
    assert corpus.counts == {"documents_with_controls": 6}


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u00a0\u3000"])
def test_blank_texts_are_dropped_by_rule(tmp_path, read_corpus, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"doc_id": "7", "text": text}))
    corpus = read_corpus(tmp_path, on_bad_row="fail")
    assert corpus.reasons() == [(0, "empty_text")]
    assert corpus.rejects[0]["doc_id"] == "7"
    assert corpus.rows_in == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text":"\xff"}', "invalid_utf8"),
        (b'{"other":"\xff","text":"x"}', "invalid_utf8"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b"17", "not_an_object"),
        (b'{"text":"x"} {"text":"y"}', "bad_json"),
        (b'{"text":"x"', "bad_json"),
        (b"[" * 200_000 + b"]" * 200_000, "bad_json"),
        (b'{"text":"x","a":' + b'{"a":' * 50_000, "bad_json"),
        (b"{}", "null_text"),
        (b'{"text":null}', "null_text"),
        (b'{"text":NaN}', "null_text"),
        (b'{"text":5}', "text_type"),
        (b'{"text":["x"]}', "text_type"),
        (b'{"text":false}', "text_type"),
    ],
    ids=lambda value: value[:30],
)
def test_a_bad_line_costs_itself_alone(tmp_path, read_corpus, line, reason):
    (tmp_path / "a.jsonl").write_bytes(LINE % (1, 1) + line + b"\n" + LINE % (2, 2))
    corpus = read_corpus(tmp_path)
    assert corpus.column("doc_id") == ["1", "2"]
    assert corpus.reasons() == [(len(LINE % (1, 1)), reason)]
    assert corpus.rejects[0]["raw"] == line[:4096]


def test_on_bad_row_fail_names_the_first_bad_row(tmp_path, read_corpus):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(2) + b'{"text":""}\n{"text":7}\nbroken\n')
    row = len(lines(2)) + len(b'{"text":""}\n')
    with pytest.raises(BadInputError, match=rf"a\.jsonl, row {row}: text_type .*'quarantine'"):
        read_corpus(tmp_path, on_bad_row="fail")


def test_on_bad_row_fail_refuses_bad_files(tmp_path, read_corpus):
    (tmp_path / "a.parquet").write_bytes(b"garbage")
    with pytest.raises(BadInputError, match=r"a\.parquet: corrupt_file"):
        read_corpus(tmp_path, on_bad_row="fail")


def test_on_bad_row_skip_counts_and_writes_nothing(tmp_path, read_corpus):
    (tmp_path / "a.jsonl").write_bytes(lines(2) + b'{"text":7}\nbroken\n')
    corpus = read_corpus(tmp_path, on_bad_row="skip")
    assert (len(corpus.documents), corpus.rejects, corpus.rows_in) == (2, [], 4)
    assert corpus.counts == {"rejected:text_type": 1, "rejected:bad_json": 1}


def test_ids_are_generated_where_there_is_none(tmp_path, read_corpus):
    (tmp_path / "a.jsonl").write_text(
        '{"text":"a"}\n{"doc_id":null,"text":"b"}\n{"doc_id":"","text":"c"}\n'
        '{"doc_id":[1],"text":"d"}\n{"doc_id":{},"text":"e"}\n{"doc_id":"kept","text":"f"}\n'
    )
    write_parquet(tmp_path / "b.parquet", doc_id=[["x"], None], text=["g", "h"])
    corpus = read_corpus(tmp_path)
    rows = corpus.column("row")
    assert corpus.column("doc_id") == [
        *(f"a.jsonl:{row}" for row in rows[:5]),
        "kept",
        "b.parquet:0",
        "b.parquet:1",
    ]
    assert corpus.counts["generated_ids"] == 7


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (pa.array([1, 2**62]), ["1", str(2**62)]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([b"a", b"b"]), ["a", "b"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([0, 1], pa.date32()), ["1970-01-01", "1970-01-02"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_typed_ids_become_text(tmp_path, read_corpus, ids, texts):
    write_parquet(tmp_path / "a.parquet", doc_id=ids, text=["a", "b"])
    assert read_corpus(tmp_path).column("doc_id") == texts


@pytest.mark.parametrize("size", [1000, 9 * 2**20])  # fetched whole, and read piece by piece
@pytest.mark.parametrize("change", ["content", "time", "delete"])
def test_a_source_that_changed_after_planning_is_refused(tmp_path, size, change):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(size // 20))
    config = CorpusConfig(input=str(tmp_path), unit_bytes=2**30)
    (unit,) = plan_units(config)
    if change == "content":
        path.write_bytes(lines(3))
    elif change == "time":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    with pytest.raises(SourceChangedError, match="start the job again"):
        read_unit(unit, config)


def test_a_failing_store_is_no_bad_input(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_parquet(path, doc_id=["1"], text=["x" * 9 * 2**20])
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False)
    config = CorpusConfig(input=str(tmp_path), unit_bytes=2**30)
    (unit,) = plan_units(config)

    class FailingFile:
        def __init__(self, file):
            self.seek, self.tell, self.close = file.seek, file.tell, file.close

        def read(self, _):
            raise ConnectionResetError("reset by peer")

    opened = sources.open_object
    monkeypatch.setattr(sources, "open_object", lambda uri: FailingFile(opened(uri)))
    with pytest.raises(StorageError, match=r"cannot read .*a\.parquet: ConnectionResetError"):
        read_unit(unit, config)


def test_a_unit_of_many_objects_keeps_their_order(tmp_path, read_corpus):
    for i in range(200):
        (tmp_path / f"{i:03d}.txt").write_text(f"text {i}")
    corpus = read_corpus(tmp_path, unit_bytes=2**30)
    assert len(corpus.units) == 1
    assert corpus.column("text") == [f"text {i}" for i in range(200)]
    assert corpus.column("doc_id")[7] == "007.txt:0"
    assert corpus.column("object_uri")[7] == str(tmp_path / "007.txt")


def test_objects_on_a_store_are_read_like_files(store_uri, read_corpus):
    storage = Storage(store_uri)
    storage.write("a.jsonl", lines(1000) + b"broken\n")
    storage.write("b.jsonl.gz", gzip.compress(lines(10)))
    for unit_bytes in (5000, 2**20):
        corpus = read_corpus(store_uri, unit_bytes=unit_bytes)
        assert len(corpus.documents) == 1010
        assert corpus.reasons() == [(len(lines(1000)), "bad_json")]


def test_a_beir_folder_is_read_with_its_own_columns(tmp_path, read_corpus):
    (tmp_path / "corpus.jsonl").write_text('{"_id":"d1","title":"T","text":"body","metadata":{}}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id":"q1","text":"query"}\n')
    corpus = read_corpus(tmp_path)
    assert corpus.documents == [
        {
            "object_uri": str(tmp_path / "corpus.jsonl"),
            "row": 0,
            "doc_id": "d1",
            "title": "T",
            "text": "body",
        }
    ]


def test_a_title_alone_is_a_document(tmp_path, read_corpus):
    rows = [{"title": "T", "text": ""}, {"title": " ", "text": "  "}, {"title": "U", "text": " "}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = read_corpus(tmp_path, title_column="title")
    assert corpus.column("title") == ["T", "U"]
    assert [reason for _, reason in corpus.reasons()] == ["empty_text"]
