"""Tables published by hand, as a job would."""

from collections.abc import Sequence

import pyarrow as pa

from qbatch.manifest import Generation, publish
from qbatch.pipelines.unit_files import write_rejects, write_table_file
from qbatch.schema import FILES
from qbatch.storage import Storage
from qbatch.tables import PublishedTable


def publish_tables(
    uri: str, tables: Sequence[pa.Table], rejects: Sequence[pa.Table] = (), *, after: int = 0
) -> PublishedTable:
    """Publish tables, a file each, and reject files, as the generation next to ``after``."""
    storage = Storage(uri)
    files = [
        write_table_file(storage, f"data/{after + i:032x}", table) for i, table in enumerate(tables)
    ]
    refused = [
        write_rejects(storage, f"{after + i:032x}", table) for i, table in enumerate(rejects)
    ]
    draft = Generation(
        kind="run",
        fingerprint={},
        config={},
        counts={},
        files=pa.Table.from_pylist(files, schema=FILES),
        rejects=pa.Table.from_pylist(refused, schema=FILES),
    )
    return PublishedTable(storage, publish(storage, draft, after=after))
