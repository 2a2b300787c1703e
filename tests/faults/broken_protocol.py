"""A commit protocol as many have it: every attempt appends a file, and what lies there counts.

It doubles rows whenever a run follows one that died. The harness must notice.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.manifest import file_entry
from qbatch.pipelines import embed, embed_resume, embed_write
from qbatch.pipelines.unit_files import OUTPUTS
from qbatch.schema import FILES
from qbatch.storage import Storage


@contextmanager
def append_everything(*, is_on: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if is_on:
            for module, name, broken in (
                (embed_write, "write_unit_file", _append),
                (embed, "finished_units", _nothing),
                (embed_resume, "listed_files", _all_files),
            ):
                stack.enter_context(mock.patch.object(module, name, broken))
        yield


def _append(storage: Storage, record: Mapping[str, Any], table: pa.Table) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    path = f"data/{secrets.token_hex(16)}.parquet"
    storage.write(path, memoryview(sink.getvalue()))
    entry = file_entry(path, len(table), sink.getvalue())
    counts = json.dumps(record["counts"])
    _STORAGES.append(storage)
    return {"unit_key": record["unit_key"], **entry, "rejects": None, "counts": counts}


_STORAGES: list[Storage] = []
"""Where the last files were appended."""


def _nothing(*_: object) -> pa.Table:
    return OUTPUTS.empty_table()


def _all_files(_: pa.Table) -> pa.Table:
    storage = _STORAGES[-1]
    entries = []
    for found in storage.iter_objects("data"):
        data = storage.read(found.path)
        entries.append(
            file_entry(found.path, pq.read_metadata(pa.BufferReader(data)).num_rows, data)
        )
    return pa.Table.from_pylist(entries, schema=FILES)
