import dataclasses

import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": ""}, "input is empty"),
        ({"unit_bytes": 0}, "unit_bytes is 0"),
        ({"max_document_bytes": -1}, "max_document_bytes is -1"),
        ({"keep_columns": ("a", "a")}, "names a column twice"),
        ({"keep_columns": ("text",)}, "names of output columns"),
        ({"keep_columns": ("passage_id",)}, "names of output columns"),
        ({"keep_columns": ("vector_256",)}, "names of output columns"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CorpusConfig(**{"input": "x", **settings})


def test_the_fingerprint_changes_with_what_is_read_and_with_nothing_else():
    config = CorpusConfig(input="a")
    same = {"input": "b", "unit_bytes": 5, "on_bad_row": "fail"}
    other = {
        "format": "csv",
        "id_column": "x",
        "text_column": "x",
        "title_column": "x",
        "keep_columns": ("x",),
        "max_document_bytes": 5,
        "hf_split": "x",
    }
    assert {*same, *other} == {field.name for field in dataclasses.fields(CorpusConfig)}
    for name, value in same.items():
        changed = dataclasses.replace(config, **{name: value})
        assert changed.fingerprint() == config.fingerprint(), name
    for name, value in other.items():
        changed = dataclasses.replace(config, **{name: value})
        assert changed.fingerprint() != config.fingerprint(), name
