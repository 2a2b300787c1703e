"""Columns of typed tables (Parquet, Hugging Face datasets) as raw rows."""

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from qbatch.corpus import reasons
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.rows import RawRows, Reject

DAMAGE_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises for a damaged file; the last for column names that are not UTF-8."""

_EXTENSION_NAME = b"ARROW:extension:name"


def check_text_column(schema: pa.Schema, config: CorpusConfig) -> Reject | None:
    """Return why an object with this schema has no usable text column, or None."""
    name = config.text_column
    num_columns = schema.names.count(name)
    if num_columns != 1:
        detail = f"{num_columns} columns are named {name!r}; the columns are {schema.names}"
        return Reject(reason=reasons.MISSING_TEXT_COLUMN, detail=detail)
    field = schema.field(name)
    if _is_extension(field) or not _is_text(_value_type(field.type)):
        detail = f"{name!r} is {_type_name(field)}; string or binary is read"
        return Reject(reason=reasons.TEXT_COLUMN_TYPE, detail=detail)
    return None


def columns_to_read(schema: pa.Schema, config: CorpusConfig) -> list[str]:
    """Return the names of the columns that are used, those that exist once."""
    wanted = [config.id_column, config.title_column, config.text_column, *config.keep_columns]
    return [name for name in dict.fromkeys(wanted) if name and schema.names.count(name) == 1]


def columnar_rows(batch: pa.RecordBatch, first_row: int, config: CorpusConfig) -> RawRows:
    """Return a batch as rows numbered from ``first_row``; columns it lacks are null.

    Extension types come as their storage, dictionaries as their values. Strings that are not valid
    UTF-8 get U+FFFD, except in the text, which is left to be judged.
    """
    names = [config.id_column, *config.keep_columns]
    if config.title_column:
        names.append(config.title_column)
    checked = {name: _repair(_column(batch, name)) for name in names}
    arrays = {name: array for name, (array, _) in checked.items()}
    titles = arrays[config.title_column] if config.title_column else pa.nulls(len(batch))
    return RawRows(
        rows=pa.array(np.arange(first_row, first_row + len(batch))),
        doc_ids=_as_strings(arrays[config.id_column]),
        titles=_as_strings(titles),
        texts=_column(batch, config.text_column).cast(pa.large_binary()),
        kept={name: arrays[name] for name in config.keep_columns},
        counts={"repaired_utf8": sum(num_repaired for _, num_repaired in checked.values())},
    )


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    index = batch.schema.get_field_index(name)
    array = pa.nulls(len(batch)) if index < 0 else batch.column(index)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def _repair(array: pa.Array) -> tuple[pa.Array, int]:
    """Return strings with U+FFFD for invalid UTF-8, and how many needed it; other types as is."""
    if not _is_string(array.type):
        return array, 0
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        values = array.cast(pa.large_binary()).to_pylist()
        repaired = [value and value.decode(errors="replace") for value in values]
        num_repaired = sum(
            bool(a) and a != b.encode() for a, b in zip(values, repaired, strict=True)
        )
        return pa.array(repaired, array.type), num_repaired
    return array, 0


def _as_strings(array: pa.Array) -> pa.Array:
    """Return scalars as text; null for values that are not text or scalars."""
    if pt.is_nested(array.type):
        return pa.nulls(len(array), pa.large_string())
    try:
        return array.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(array), pa.large_string())


def _is_string(data_type: pa.DataType) -> bool:
    return data_type in (pa.string(), pa.large_string(), pa.string_view())


def _is_text(data_type: pa.DataType) -> bool:
    binary = (pa.binary(), pa.large_binary(), pa.binary_view(), pa.null())
    return _is_string(data_type) or data_type in binary


def _is_extension(field: pa.Field) -> bool:
    # An extension type this process does not know arrives as its storage, with its name beside it.
    return isinstance(field.type, pa.BaseExtensionType) or _EXTENSION_NAME in (field.metadata or {})


def _type_name(field: pa.Field) -> str:
    name = (field.metadata or {}).get(_EXTENSION_NAME)
    return f"extension {name.decode(errors='replace')!r}" if name else str(field.type)


def _value_type(data_type: pa.DataType) -> pa.DataType:
    return data_type.value_type if pt.is_dictionary(data_type) else data_type
