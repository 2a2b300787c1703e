"""What exists of a plan: one LIST says which units are done.

A file that the newest generation lists is taken at its word; any other, left by a job that did not
get to publish, is read back and checked before it counts.
"""

import logging
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from qbatch.errors import IntegrityError
from qbatch.manifest import Generation, read_verified
from qbatch.pipelines.unit_files import OUTPUTS, list_unit_files, read_completion
from qbatch.storage import Storage

log = logging.getLogger(__name__)

_FILES_PER_CHECK = 32


def finished_units(
    storage: Storage, keys: pa.ChunkedArray, generation: Generation | None
) -> pa.Table:
    """Return a row of OUTPUTS for every planned unit whose file exists.

    Of several files of one unit the published one counts, else the first intact one by name.

    Args:
        storage: The table.
        keys: Of the units that the job has to cover.
        generation: The newest one, None before the first.
    """
    listed = list_unit_files(storage)
    wanted = listed.filter(_is_in(listed["unit_key"], keys))
    published = _published_outputs(storage, generation)
    known = published.filter(_is_in(published["path"], wanted["path"]))
    known = known.filter(_is_in(known["unit_key"], keys))
    unchecked = wanted.filter(pc.invert(_is_in(wanted["unit_key"], known["unit_key"])))
    return pa.concat_tables([known, *_check_files(storage, unchecked["path"].to_pylist())])


def _is_in(values: pa.ChunkedArray, wanted: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(values, wanted.combine_chunks())


def _published_outputs(storage: Storage, generation: Generation | None) -> pa.Table:
    if generation is None or generation.plan is None:
        return OUTPUTS.empty_table()
    data = read_verified(storage, generation.plan)
    return pq.read_table(pa.BufferReader(data), columns=OUTPUTS.names).cast(OUTPUTS)


def _check_files(storage: Storage, paths: list[str]) -> list[pa.Table]:
    if not paths:
        return []
    log.info("checking %d finished files of a job that did not publish", len(paths))
    check = ray.remote(_read_completions)
    tasks = [
        check.remote(storage, paths[i : i + _FILES_PER_CHECK])
        for i in range(0, len(paths), _FILES_PER_CHECK)
    ]
    rows = [row for task in tasks for row in ray.get(task)]
    first_by_name = {row["unit_key"]: row for row in reversed(rows)}
    return [pa.Table.from_pylist(list(first_by_name.values()), schema=OUTPUTS)]


def _read_completions(storage: Storage, paths: list[str]) -> list[dict[str, Any]]:
    rows = []
    for path in paths:
        try:
            rows.append(read_completion(storage, path))
        except (IntegrityError, FileNotFoundError) as error:
            log.warning("%s; its unit is made again", error)
    return rows
