"""Joining the documents of objects whose kept columns differ in type."""

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.types as pt

from qbatch import schema


def concat_documents(tables: Sequence[pa.Table], kept: Sequence[str]) -> pa.Table:
    """Return the documents of a unit as one table, in order, each column in one chunk.

    Where the types of a kept column differ, null gives way, numbers widen and strings widen;
    types that have nothing in common become text (JSON for lists and structs).
    """
    tables = [table for table in tables if table.num_rows]
    if not tables:
        return pa.schema([*schema.DOCUMENTS, *(pa.field(n, pa.null()) for n in kept)]).empty_table()
    fields = [pa.field(name, _common_type([t[name].type for t in tables])) for name in kept]
    target = pa.schema([*schema.DOCUMENTS, *fields])
    joined = pa.concat_tables([_cast(table, target) for table in tables])
    return joined.unify_dictionaries().combine_chunks()


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    distinct = list(dict.fromkeys(types))
    if len(distinct) == 1:
        return distinct[0]
    schemas = [pa.schema([("kept", data_type)]) for data_type in distinct]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.large_string()


def _cast(table: pa.Table, target: pa.Schema) -> pa.Table:
    if table.schema == target:
        return table
    columns = [_cast_column(table[field.name], field.type) for field in target]
    return pa.table(columns, schema=target)


def _cast_column(column: pa.ChunkedArray, data_type: pa.DataType) -> pa.ChunkedArray:
    if column.type == data_type:
        return column
    if pt.is_nested(column.type) and pt.is_large_string(data_type):
        texts = [None if v is None else json.dumps(v, default=str) for v in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, data_type)])
    return column.cast(data_type)
