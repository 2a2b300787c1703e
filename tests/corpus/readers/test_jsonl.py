import json

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from qbatch.corpus import lines

texts = st.text(min_size=1).filter(lambda text: text.strip())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.text(min_size=1), texts, values), min_size=1, max_size=8),
    st.booleans(),
    st.integers(20, 400),
)
def test_what_python_writes_is_read_back(tmp_path, read_corpus, rows, is_ascii, unit_bytes):
    records = [{"doc_id": i, "text": t, "extra": e} for i, t, e in rows]
    content = "\n".join(json.dumps(record, ensure_ascii=is_ascii) for record in records)
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    corpus = read_corpus(tmp_path, keep_columns=("extra",), unit_bytes=unit_bytes)
    assert corpus.column("doc_id") == [doc_id for doc_id, _, _ in rows]
    assert corpus.column("text") == [text for _, text, _ in rows]
    for (_, _, expected), found in zip(rows, corpus.column("extra"), strict=True):
        if expected is None or isinstance(expected, str):
            assert found == expected
        else:
            assert json.loads(found) == expected


def test_kept_values_are_literal_json(tmp_path, read_corpus):
    (tmp_path / "a.jsonl").write_text(
        '{"text":"a","k":1.50}\n{"text":"b","k":{"a": [1.0, true, null, "\\u00e9"]}}\n'
        '{"text":"c","k":"plain"}\n{"text":"d"}\n{"text":"e","k":123456789012345678901234567890}\n'
    )
    corpus = read_corpus(tmp_path, keep_columns=("k",))
    assert corpus.column("k") == [
        "1.50",
        '{"a":[1.0,true,null,"\u00e9"]}',
        "plain",
        None,
        "123456789012345678901234567890",
    ]


def test_the_last_of_two_equal_keys_counts(tmp_path, read_corpus):
    (tmp_path / "a.jsonl").write_text('{"text":"a","text":"b"}\n')
    assert read_corpus(tmp_path).column("text") == ["b"]


def test_a_deep_kept_value_costs_its_row_only(tmp_path, read_corpus):
    deep = "[" * 800 + "]" * 800
    (tmp_path / "a.jsonl").write_text(f'{{"text":"a","k":{deep}}}\n{{"text":"b"}}\n')
    corpus = read_corpus(tmp_path, keep_columns=("k",))
    assert corpus.column("text")[-1] == "b"
    assert corpus.rows_in == 2


def test_a_line_above_the_limit_costs_itself_alone(tmp_path, read_corpus):
    first, last = b'{"doc_id":"1","text":"a"}\n', b'{"doc_id":"2","text":"b"}\n'
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(first + b'{"doc_id":"long","text":"')
        for _ in range(65):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + last)
    corpus = read_corpus(tmp_path)
    assert corpus.column("doc_id") == ["1", "2"]
    assert corpus.reasons() == [(len(first), "line_too_long")]
    assert len(corpus.rejects[0]["raw"]) == 4096
    assert str(lines.MAX_LINE_BYTES) in corpus.rejects[0]["detail"]
