"""Which files a generation needs: everything it lists, wherever a list of it says so.

Whatever looks like a schema.FILES entry, a ``path`` with its ``sha256``, counts: in the manifest,
in the Parquet lists and the plan it names, in structs and in JSON inside them. A kind of table that
lists its files in a new place is thereby kept as well.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from qbatch.manifest import read_verified
from qbatch.storage import Storage

_TABLE_FILES = ("plans/", "manifests/")
"""Directories whose files list others."""


def referenced_files(storage: Storage, manifest: Mapping[str, Any]) -> set[str]:
    """Return the paths that a generation names; those of another table's files are among them.

    Args:
        storage: The table.
        manifest: The content of its manifest.

    Raises:
        IntegrityError: A list or the plan is damaged or gone.
    """
    paths: set[str] = set()
    for entry in iter_entries(manifest):
        paths.add(entry["path"])
        if entry["path"].startswith(_TABLE_FILES):
            listed = pq.read_table(pa.BufferReader(read_verified(storage, entry)))
            _add_paths(listed.to_struct_array(), paths)
    return paths


def iter_entries(value: object) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping with ``path`` and ``sha256`` inside a JSON value."""
    if isinstance(value, Mapping):
        if "path" in value and "sha256" in value:
            yield value
        for inner in value.values():
            yield from iter_entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from iter_entries(inner)


def iter_table_refs(value: object) -> Iterator[tuple[str, int]]:
    """Yield URI and number of every generation of another table that a JSON value names."""
    if isinstance(value, Mapping):
        if isinstance(value.get("uri"), str) and isinstance(value.get("generation"), int):
            yield value["uri"], value["generation"]
        for inner in value.values():
            yield from iter_table_refs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from iter_table_refs(inner)


def _add_paths(column: pa.ChunkedArray | pa.Array, paths: set[str]) -> None:
    for array in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if pt.is_struct(array.type):
            names = [field.name for field in array.type]
            if "path" in names and "sha256" in names:
                paths.update(pc.struct_field(array, "path").drop_null().to_pylist())
            for name in names:
                _add_paths(pc.struct_field(array, name), paths)
        elif pt.is_list(array.type) or pt.is_large_list(array.type):
            _add_paths(array.flatten(), paths)
        elif pt.is_string(array.type) or pt.is_large_string(array.type):
            _add_json_paths(array, paths)


def _add_json_paths(array: pa.Array, paths: set[str]) -> None:
    has_entries = pc.and_(pc.starts_with(array, "{"), pc.match_substring(array, '"sha256"'))
    for text in array.filter(has_entries.fill_null(False)):
        paths.update(entry["path"] for entry in iter_entries(json.loads(text.as_py())))
