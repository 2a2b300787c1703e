"""JSON lines: one object a line, strict about encoding and structure, literal about numbers."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa

from qbatch.corpus import reasons
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.lines import LineBlock
from qbatch.corpus.readers.blocks import read_blocks
from qbatch.corpus.rows import RawRows, Reject
from qbatch.corpus.sources import Source

_BOM = "\ufeff"
_WHITESPACE = " \t\r"
_SURROGATES = re.compile("[\ud800-\udfff]")

_Fields = tuple[str | None, ...]
"""Id, title, text, then the kept columns of one line."""


class _Number(str):
    """A JSON number as it is written: 1.0 stays 1.0, and 20 digits stay 20 digits."""

    __slots__ = ()


# NaN and Infinity are not JSON, but Python writes them for missing numbers: they read as null.
# strict=False takes control characters inside strings as they are.
_DECODER = json.JSONDecoder(
    parse_int=_Number, parse_float=_Number, parse_constant=lambda _: None, strict=False
)


class _BadLineError(Exception):
    def __init__(self, reason: str, detail: str, doc_id: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.doc_id = doc_id


def read_jsonl(source: Source, config: CorpusConfig) -> Iterator[RawRows]:
    """Yield the rows of a span of JSON lines; ``row`` is the offset of the line.

    Blank lines are no rows. An id may be a string, number or boolean. Title and kept columns
    become strings: a JSON string as it is, any other value as its JSON.
    """
    return read_blocks(source, partial(_parse_block, config=config))


def _parse_block(block: LineBlock, config: CorpusConfig) -> RawRows:
    rows: list[int] = []
    fields: list[_Fields] = []
    rejects: list[Reject] = []
    for offset, line in zip(block.offsets().tolist(), _decoded_lines(block), strict=True):
        try:
            values = _read_line(line, config)
        except _BadLineError as bad:
            rejects.append(_reject(block, offset, bad))
            continue
        if values is not None:
            rows.append(offset)
            fields.append(values)
    return _raw_rows(rows, fields, rejects, config)


def _decoded_lines(block: LineBlock) -> Sequence[str | None]:
    """Return the text of every line; None where it is not valid UTF-8."""
    content = block.content()
    try:
        lines: list[str | None] = [*content.decode().split("\n")]
    except UnicodeDecodeError:
        lines = [_decode(line) for line in content.split(b"\n")]
    if block.offset == 0 and lines[0] is not None:
        lines[0] = lines[0].removeprefix(_BOM)
    return lines


def _decode(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _read_line(line: str | None, config: CorpusConfig) -> _Fields | None:
    """Return the fields of a line, None if it is blank; raise _BadLineError if it is bad."""
    if line is None:
        raise _BadLineError(reasons.INVALID_UTF8, "the line is not valid UTF-8")
    line = line.strip(_WHITESPACE)
    if not line:
        return None
    try:
        value, end = _DECODER.raw_decode(line)
        if end < len(line) or type(value) is not dict:
            raise _not_one_object(value, end < len(line))
        title = _value_text(value.get(config.title_column)) if config.title_column else None
        kept = [_value_text(value.get(name)) for name in config.keep_columns]
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at character {error.pos} of the line"
        raise _BadLineError(reasons.BAD_JSON, detail) from error
    except RecursionError as error:
        raise _BadLineError(reasons.BAD_JSON, "nested too deeply") from error
    doc_id = _id_text(value.get(config.id_column))
    text = value.get(config.text_column)
    if type(text) is not str:
        raise _bad_text(text, config.text_column, doc_id)
    return (doc_id, title, text, *kept)


def _not_one_object(value: object, has_more: bool) -> _BadLineError:
    if has_more:
        return _BadLineError(reasons.BAD_JSON, "something follows the JSON value")
    detail = f"the line holds a {_type_name(value)}, not an object"
    return _BadLineError(reasons.NOT_AN_OBJECT, detail)


def _bad_text(text: object, column: str, doc_id: str | None) -> _BadLineError:
    if text is None:
        return _BadLineError(reasons.NULL_TEXT, f"{column!r} is null or absent", doc_id)
    detail = f"{column!r} is a {_type_name(text)}, not a string"
    return _BadLineError(reasons.TEXT_TYPE, detail, doc_id)


def _type_name(value: object) -> str:
    names = {_Number: "number", bool: "boolean", list: "list", dict: "object", str: "string"}
    return names.get(type(value), "null")


def _id_text(value: object) -> str | None:
    if type(value) is str or value is None:
        return value
    return _json_text(value) if isinstance(value, (str, bool)) else None


def _value_text(value: object) -> str | None:
    return value if type(value) is str or value is None else _json_text(value)


def _json_text(value: object) -> str:
    """Return compact JSON with numbers as they were written."""
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, list):
        return f"[{','.join(map(_json_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_json_text(k)}:{_json_text(v)}' for k, v in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def _reject(block: LineBlock, offset: int, bad: _BadLineError) -> Reject:
    line = block.data[offset - block.offset :].partition(b"\n")[0]
    doc_id = _SURROGATES.sub("\ufffd", bad.doc_id) if bad.doc_id else None
    return Reject(row=offset, reason=bad.reason, detail=str(bad), doc_id=doc_id, raw=line)


def _raw_rows(
    rows: list[int], fields: list[_Fields], rejects: list[Reject], config: CorpusConfig
) -> RawRows:
    columns = list(zip(*fields, strict=True)) or [()] * (3 + len(config.keep_columns))
    num_repaired = 0
    arrays = []
    for column in columns:
        array, repaired = _string_array(column)
        arrays.append(array)
        num_repaired += repaired
    doc_ids, titles, texts, *kept = arrays
    return RawRows(
        rows=pa.array(rows, pa.int64()),
        doc_ids=doc_ids,
        titles=titles,
        texts=texts,
        kept=dict(zip(config.keep_columns, kept, strict=True)),
        rejects=rejects,
        counts={"repaired_surrogates": num_repaired},
    )


def _string_array(values: Sequence[str | None]) -> tuple[pa.Array, int]:
    """Return large_string, and how many values held a lone surrogate, replaced by U+FFFD."""
    try:
        return pa.array(values, pa.large_string()), 0
    except UnicodeEncodeError:
        repaired = [value and _SURROGATES.sub("\ufffd", value) for value in values]
        num_repaired = sum(a != b for a, b in zip(values, repaired, strict=True))
        return pa.array(repaired, pa.large_string()), num_repaired
