"""Runs and judgements as text: TREC lines, tables with a header and tabs, JSON lines.

Arrow parses whole files at once. What it refuses is read again line by line, by rules that take
every file of that form and name the first line that is wrong.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.types as pt

from qbatch.errors import BadInputError, NoInputError
from qbatch.evaluation.kinds import TableKind

_BOM = b"\xef\xbb\xbf"

_BLOCK_BYTES = 8 * 2**20
"""Above Arrow's own 1 MiB, since a JSON line must fit into a block."""

_CHUNK_LINES = 100_000
"""Lines held as Python strings at a time."""

_MAX_SHOWN = 200
"""Characters of a bad line in a message."""

_Split = Callable[[bytes], Sequence[str]]
"""Returns the values of a line, or raises ValueError that says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How to read one file."""

    columns: Mapping[str, str]
    """Name in the file to our name."""
    parse: Callable[[bytes, pa.Schema], pa.Table]
    """Reads all of it at once; names are those in the file."""
    split: _Split
    """Reads one line, values in the order of ``columns``."""


def parse_text(content: bytes, kind: TableKind, uri: str) -> pa.Table:
    """Return the rows of a text file as a table of the columns of ``kind`` that it has.

    Blank lines are no rows. The form is told from the first line: a JSON object, names of columns
    between tabs, anything else is TREC.

    Args:
        content: The file, decompressed.
        kind: What the rows are.
        uri: Names the file in messages.

    Raises:
        NoInputError: There is no row.
        BadInputError: A line is not of that form; file and line number are named.
    """
    content = content.removeprefix(_BOM)
    form, num_header = _form_of(content, kind, uri)
    schema = pa.schema(
        [(name, kind.schema.field(column).type) for name, column in form.columns.items()]
    )
    try:
        table = form.parse(content, schema)
        is_parsed = all(_is_whole(column) for column in table.columns)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        is_parsed = False
    if not is_parsed:
        table = _LineReader(uri, schema, form.split).read(content, num_header)
    if not table.num_rows:
        raise NoInputError(f"{uri} holds no row; a {kind.name} has one a document and query")
    return table.rename_columns(list(form.columns.values()))


def _is_whole(column: pa.ChunkedArray) -> bool:
    """Tell whether there is a value everywhere; NaN is none."""
    if column.null_count:
        return False
    return not (pt.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py())


def _form_of(content: bytes, kind: TableKind, uri: str) -> tuple[_Form, int]:
    """Return the form of a file and the number of lines before its rows."""
    number, first = next(_numbered_lines(content), (0, b""))
    if _is_json(first, kind):
        return _json_form(first, number, kind, uri), 0
    names = [name.strip() for name in first.decode(errors="replace").split("\t")]
    if {"query_id", "query-id"} & set(names):
        return _header_form(names, number, kind, uri), number
    return _trec_form(content, kind), 0


def _is_json(line: bytes, kind: TableKind) -> bool:
    """Tell JSON, also broken JSON, from a TREC line whose query id begins with a brace."""
    if not line.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return len(line.split()) != len(kind.trec_fields)
    return True


def _json_form(first: bytes, number: int, kind: TableKind, uri: str) -> _Form:
    try:
        keys = list(_json_object(first))
    except (ValueError, RecursionError) as error:
        _refuse(uri, number, first, str(error))
    columns = kind.columns_of(keys, f"{uri} line {number}")
    split = _json_splitter(list(columns))
    return _Form(columns, _parse_json, split)


def _parse_json(content: bytes, schema: pa.Schema) -> pa.Table:
    options = pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = pajson.ReadOptions(block_size=_BLOCK_BYTES)
    return pajson.read_json(pa.BufferReader(content), read_options=read, parse_options=options)


def _json_object(line: bytes) -> dict[str, Any]:
    value = json.loads(line, parse_int=str, parse_float=str)  # numbers stay as they are written
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _json_splitter(names: Sequence[str]) -> _Split:
    def split(line: bytes) -> Sequence[str]:
        value = _json_object(line)
        for name in names:
            if not isinstance(value.get(name), str):
                raise ValueError(f"{name!r} is {json.dumps(value.get(name))}, not text or a number")
        return [value[name] for name in names]

    return split


def _header_form(names: Sequence[str], number: int, kind: TableKind, uri: str) -> _Form:
    columns = kind.columns_of(names, f"{uri} line {number}")

    def parse(content: bytes, schema: pa.Schema) -> pa.Table:
        return _parse_delimited(content, schema, names, delimiter="\t", skip_rows=number)

    def split(line: bytes) -> Sequence[str]:
        return _fields(line.decode().split("\t"), names, list(columns))

    return _Form(columns, parse, split)


def _trec_form(content: bytes, kind: TableKind) -> _Form:
    columns = {name: name for name in kind.trec_fields if name in kind.schema.names}
    delimiter = "\t" if b"\t" in content else " "

    def parse(content: bytes, schema: pa.Schema) -> pa.Table:
        if delimiter == "\t" and b" " in content:
            raise pa.ArrowInvalid("tabs and spaces are mixed")
        return _parse_delimited(content, schema, kind.trec_fields, delimiter=delimiter, skip_rows=0)

    def split(line: bytes) -> Sequence[str]:
        fields = [field.decode() for field in line.split()]  # ASCII whitespace, as trec_eval does
        return _fields(fields, kind.trec_fields, list(columns))

    return _Form(columns, parse, split)


def _fields(values: Sequence[str], names: Sequence[str], wanted: Sequence[str]) -> Sequence[str]:
    if len(values) != len(names):
        expected = " ".join(names)
        raise ValueError(f"{len(values)} fields where {len(names)} are expected ({expected})")
    by_name = dict(zip(names, values, strict=True))
    return [by_name[name] for name in wanted]


def _parse_delimited(
    content: bytes, schema: pa.Schema, names: Sequence[str], *, delimiter: str, skip_rows: int
) -> pa.Table:
    read = pacsv.ReadOptions(column_names=list(names), skip_rows=skip_rows, block_size=_BLOCK_BYTES)
    parse = pacsv.ParseOptions(delimiter=delimiter, quote_char=False)
    convert = pacsv.ConvertOptions(
        include_columns=schema.names, column_types=schema, null_values=[]
    )
    return pacsv.read_csv(
        pa.BufferReader(content), read_options=read, parse_options=parse, convert_options=convert
    )


def _numbered_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank with their numbers from 1, stripped of their ends."""
    start, number = 0, 0
    while start < len(content):
        number += 1
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        line = content[start:end].rstrip(b"\r")
        if line.strip():
            yield number, line
        start = end + 1


@dataclass(frozen=True, slots=True)
class _LineReader:
    """Reads line by line, in chunks, and names the first line that is wrong."""

    uri: str
    schema: pa.Schema
    split: _Split

    def read(self, content: bytes, num_header: int) -> pa.Table:
        lines = (line for line in _numbered_lines(content) if line[0] > num_header)
        chunks = []
        while chunk := list(itertools.islice(lines, _CHUNK_LINES)):
            chunks.append(self._convert(chunk))
        return pa.concat_tables([self.schema.empty_table(), *chunks])

    def _convert(self, lines: Sequence[tuple[int, bytes]]) -> pa.Table:
        rows = [self._values(number, line) for number, line in lines]
        arrays = []
        for field, values in zip(self.schema, zip(*rows, strict=True), strict=True):
            try:
                arrays.append(_cast(values, field.type))
            except (pa.ArrowInvalid, UnicodeEncodeError):
                self._refuse_first(lines, field, values)
        return pa.table(arrays, schema=self.schema)

    def _values(self, number: int, line: bytes) -> Sequence[str]:
        try:
            return self.split(line)
        except (ValueError, RecursionError) as error:
            _refuse(self.uri, number, line, str(error))

    def _refuse_first(
        self, lines: Sequence[tuple[int, bytes]], field: pa.Field, values: Sequence[str]
    ) -> NoReturn:
        for (number, line), value in zip(lines, values, strict=True):
            try:
                _cast([value], field.type)
            except (pa.ArrowInvalid, UnicodeEncodeError):
                _refuse(self.uri, number, line, f"{field.name} is {value!r}, not {field.type}")
        raise ValueError(f"{field.name} converts value by value but not as a whole")


def _cast(values: Sequence[str], data_type: pa.DataType) -> pa.Array:
    strings = pa.array(values, pa.large_string())
    if pt.is_integer(data_type):
        return strings.cast(pa.float64()).cast(data_type)  # 1.0 is a whole number, 0.5 is not
    array = strings.cast(data_type)
    if pt.is_floating(data_type) and pc.any(pc.is_nan(array)).as_py():
        raise pa.ArrowInvalid("NaN orders nothing")
    return array


def _refuse(uri: str, number: int, line: bytes, detail: str) -> NoReturn:
    shown = line[:_MAX_SHOWN].decode(errors="replace")
    raise BadInputError(f"{uri} line {number}: {detail}: {shown!r}. Mend or remove that line")
