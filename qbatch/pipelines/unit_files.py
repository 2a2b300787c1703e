"""The one file a unit makes: named by unit and content, complete or absent, self-describing.

``<stem>/<unit_key>-<first 16 hex of its sha256>.parquet``. The footer says what became of the
unit's rows, so that the file is its own completion record.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.errors import IntegrityError
from qbatch.manifest import canonical_json, file_entry, read_verified
from qbatch.schema import FILES, UNITS
from qbatch.storage import Storage
from qbatch.vector_files import write_vector_file

OUTPUTS = pa.schema([field for field in UNITS if field.name != "spans"])
"""What is known of a finished unit."""

_FOOTER_KEY = b"qbatch"
_NAME = re.compile(r"data/([0-9a-f]{32})-([0-9a-f]{16})\.parquet")
_PARTIAL = re.compile(r"partials/([0-9a-f]{32})-[0-9a-f]{16}\.arrow")
_ROW_GROUP_ROWS = 32_768
_LISTING_ROWS = 100_000


def write_rejects(storage: Storage, unit_key: str, rejects: pa.Table) -> dict[str, Any] | None:
    """Write a unit's rejects and return their schema.FILES entry; None when there are none."""
    return _write(storage, f"rejects/{unit_key}", rejects, {}) if rejects.num_rows else None


def write_unit_file(storage: Storage, record: Mapping[str, Any], table: pa.Table) -> dict[str, Any]:
    """Write a unit's output with its completion record; return its row of OUTPUTS.

    Args:
        storage: The table; rejects named by the record must be there already.
        record: ``unit_key``, ``fingerprint``, ``counts`` and ``rejects`` (a FILES entry or None).
        table: The rows.
    """
    entry = _write(storage, f"data/{record['unit_key']}", table, {_FOOTER_KEY: dict(record)})
    return _output(record, entry)


def read_completion(storage: Storage, path: str) -> dict[str, Any]:
    """Return the row of OUTPUTS that a listed file stands for, after checking all its bytes.

    Raises:
        IntegrityError: The file, its record or its rejects are damaged.
        FileNotFoundError: It is gone.
    """
    data = storage.read(path)
    name = _NAME.fullmatch(path)
    if name is None or not hashlib.sha256(data).hexdigest().startswith(name[2]):
        raise IntegrityError(f"{storage.object_uri(path)} does not hold what its name says")
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    record = json.loads(metadata.metadata[_FOOTER_KEY])
    if record["rejects"]:
        read_verified(storage, record["rejects"])
    return _output(record, file_entry(path, metadata.num_rows, data))


def _output(record: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    counts = canonical_json(record["counts"]).decode()
    return {
        "unit_key": record["unit_key"],
        **entry,
        "rejects": record["rejects"],
        "counts": counts,
    }


def listed_files(outputs: pa.Table) -> pa.Table:
    """Return the schema.FILES list of a generation from its OUTPUTS."""
    return pa.table([outputs[name] for name in FILES.names], schema=FILES).sort_by("path")


def listed_rejects(outputs: pa.Table) -> pa.Table:
    """Return the schema.FILES list of reject files of a generation from its OUTPUTS."""
    structs = outputs["rejects"].combine_chunks().drop_null()
    return pa.table([structs.field(name) for name in FILES.names], schema=FILES).sort_by("path")


def store_plan(storage: Storage, plan: pa.Table | memoryview, rows: int = 0) -> dict[str, Any]:
    """Write the plan of a generation under its hash; return its schema.FILES entry.

    Args:
        storage: The table.
        plan: The rows, or the bytes of a Parquet file that holds them.
        rows: Of a plan that is given as bytes.
    """
    if isinstance(plan, pa.Table):
        sink = pa.BufferOutputStream()
        pq.write_table(plan, sink, compression="zstd")
        return store_plan(storage, memoryview(sink.getvalue()), plan.num_rows)
    entry = file_entry("", rows, plan)
    entry["path"] = f"plans/{entry['sha256'][:32]}.parquet"
    storage.write(entry["path"], plan)
    return entry


def list_unit_files(storage: Storage) -> pa.Table:
    """Return ``unit_key`` and ``path`` of every data file in name order, from one LIST."""
    schema = pa.schema([UNITS.field("unit_key"), UNITS.field("path")])
    tables = [schema.empty_table()]
    names: list[re.Match[str]] = []

    def flush() -> None:
        columns = [[name[1] for name in names], [name[0] for name in names]]
        tables.append(pa.table(columns, schema=schema))
        names.clear()

    for listed in storage.iter_objects("data"):
        if name := _NAME.fullmatch(listed.path):
            names.append(name)
        if len(names) == _LISTING_ROWS:
            flush()
    flush()
    return pa.concat_tables(tables)


def write_table_file(storage: Storage, stem: str, table: pa.Table) -> dict[str, Any]:
    """Write a table as ``<stem>-<first 16 hex of its sha256>.parquet``; return its FILES entry."""
    return _write(storage, stem, table, {})


def write_partial(storage: Storage, key: str, table: pa.Table) -> None:
    """Write an intermediate result as ``partials/<key>-<first 16 hex of its sha256>.arrow``.

    Arrow's own format: it is read once, soon, and compressing it would take longer than that.
    """
    write_partial_batches(storage, key, table.to_batches(), table.schema)


def write_partial_batches(
    storage: Storage, key: str, batches: Sequence[pa.RecordBatch], schema: pa.Schema
) -> None:
    """Write an intermediate result whose batches, empty ones too, can be read one by one."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data = memoryview(sink.getvalue())
    digest = hashlib.sha256(data).hexdigest()
    storage.write(f"partials/{key}-{digest[:16]}.arrow", data)


def read_partial(storage: Storage, path: str) -> pa.Table:
    """Return an intermediate result after checking it against its name.

    Raises:
        IntegrityError: It is damaged.
    """
    data = storage.read(path)
    if f"-{hashlib.sha256(data).hexdigest()[:16]}." not in path:
        raise IntegrityError(
            f"{storage.object_uri(path)} does not hold what its name says; delete it and run the "
            "job again"
        )
    return pa.ipc.open_file(pa.BufferReader(data)).read_all()


def list_partials(storage: Storage) -> dict[str, str]:
    """Return the path of every intermediate result by key."""
    names = (_PARTIAL.fullmatch(listed.path) for listed in storage.iter_objects("partials"))
    return {name[1]: name[0] for name in names if name}


def _write(
    storage: Storage, stem: str, table: pa.Table, footer: Mapping[bytes, Any]
) -> dict[str, Any]:
    described = table.replace_schema_metadata({k: canonical_json(v) for k, v in footer.items()})
    data = write_vector_file(described, row_group_rows=_ROW_GROUP_ROWS)
    entry = file_entry(stem, table.num_rows, data)
    entry["path"] = f"{stem}-{entry['sha256'][:16]}.parquet"
    storage.write(entry["path"], data)
    return entry
