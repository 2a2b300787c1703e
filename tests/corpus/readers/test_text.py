import gzip

import pytest


def test_a_file_is_a_document(tmp_path, read_corpus):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"drei"))
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt").touch()
    corpus = read_corpus(tmp_path, keep_columns=("x",))
    assert corpus.column("text") == ["one\r\ntwo\n", "drei"]
    assert corpus.column("doc_id") == ["a.txt:0", "b.txt.gz:0"]
    assert corpus.column("x") == [None, None]
    assert corpus.reasons() == [(0, "invalid_utf8"), (0, "empty_text")]


@pytest.mark.parametrize("tail", [b"", b"a", "é".encode(), "\U0001f600".encode()])
@pytest.mark.parametrize("limit", [10, 11, 12, 13])
def test_a_long_file_is_read_to_the_limit_only(tmp_path, read_corpus, tail, limit):
    data = (b"x" + tail) * 1000
    (tmp_path / "a.txt").write_bytes(data + b"\xff not even valid")
    corpus = read_corpus(tmp_path, max_document_bytes=limit)
    assert corpus.column("text") == [data[:limit].decode(errors="ignore")]
    assert corpus.counts == {"truncated_documents": 1, "generated_ids": 1}


def test_a_truncated_text_is_rejected_whole(tmp_path, read_corpus):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"half a text")[:-9])
    assert read_corpus(tmp_path).reasons() == [(None, "truncated_stream")]


@pytest.mark.parametrize("unit_bytes", [2, 7, 2**20])
def test_a_line_is_a_document(tmp_path, read_corpus, unit_bytes):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\n\xff\n three")
    corpus = read_corpus(tmp_path, format="text-lines", unit_bytes=unit_bytes)
    assert corpus.column("text") == ["one", "two", " three"]
    assert corpus.column("row") == [0, 9, 15]
    assert corpus.reasons() == [(8, "empty_text"), (13, "invalid_utf8")]
