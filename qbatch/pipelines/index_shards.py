"""Building shards: one Ray task each, stored whole, and found again after a crash.

The ids sidecar is written last; its footer names the shard's other files, so that a sidecar that
exists stands for a finished shard. Resuming is one LIST of ``ids/``.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qbatch.errors import IntegrityError
from qbatch.index.building import BuiltShard, ShardBuilder
from qbatch.index.device import use_threads
from qbatch.index.files import download_verified, upload_named, write_index
from qbatch.index.probes import Probes
from qbatch.index.training import Template
from qbatch.manifest import canonical_json
from qbatch.pipelines.cluster import MAX_RETRIES
from qbatch.pipelines.index_parts import ShardPlan, read_part
from qbatch.pipelines.index_resources import Booking
from qbatch.pipelines.index_task import IndexTask
from qbatch.pipelines.tasks import results_as_completed
from qbatch.storage import Storage
from qbatch.tables import read_ahead

log = logging.getLogger(__name__)

_FOOTER_KEY = b"qbatch"
_NAME = re.compile(r"ids/([0-9a-f]{32})-([0-9a-f]{16})\.parquet")


def build_shard(task: IndexTask, shard: ShardPlan, shard_key: str) -> dict[str, Any]:
    """Build one shard and store it; return its completion record."""
    use_threads(task.num_threads)
    template = Template(task.read_training_file(task.training.template))
    probes_file = task.read_training_file(task.training.probes)
    builder = ShardBuilder(
        template,
        task.column,
        Probes.from_table(pq.read_table(pa.BufferReader(probes_file))),
        num_rows=shard.rows,
        target_recall=task.target_recall,
    )
    read = partial(read_part, task.table(), columns=[*task.columns, task.column.name])
    for table in read_ahead(read, shard.parts, num_ahead=1):
        builder.add(table)
    built = builder.finish()
    if built.facts["rows"] != shard.rows:
        raise IntegrityError(
            f"shard {shard.number} got {built.facts['rows']} vectors, its plan has {shard.rows}; "
            "nothing of it was stored. This is a bug: report it with the log"
        )
    return _store(Storage(task.output), built, shard_key)


def _store(storage: Storage, built: BuiltShard, shard_key: str) -> dict[str, Any]:
    record = {
        "shard_key": shard_key,
        "index": write_index(storage, f"shards/{shard_key}", built.index),
        "probes": _write_table(storage, f"probe-results/{shard_key}", built.probes.to_table()),
        "facts": built.facts,
    }
    ids = built.ids.replace_schema_metadata({_FOOTER_KEY: canonical_json(record)})
    return record | {"ids": _write_table(storage, f"ids/{shard_key}", ids)}


def _write_table(storage: Storage, stem: str, table: pa.Table) -> dict[str, Any]:
    with TemporaryDirectory(prefix="qbatch-shard-") as folder:
        file = Path(folder, "table.parquet")
        pq.write_table(table, file, compression="zstd")
        return upload_named(storage, stem, ".parquet", file, len(table))


def finished_shards(
    storage: Storage, wanted: Sequence[str], published: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the records of those shards that need not be built, by key.

    A shard that the newest generation lists is taken at its word; any other is read back whole.

    Args:
        storage: The index.
        wanted: Keys of the planned shards.
        published: Records of the newest generation, by key.
    """
    done = {key: published[key] for key in wanted if key in published}
    open_keys = set(wanted) - set(done)
    names = (_NAME.fullmatch(listed.path) for listed in storage.iter_objects("ids"))
    unchecked = [(name[1], name[0]) for name in names if name and name[1] in open_keys]
    if unchecked:
        log.info("checking %d finished shards of a job that did not publish", len(unchecked))
    check = ray.remote(max_retries=MAX_RETRIES)(_read_record)
    found = ray.get([check.remote(storage, path) for _, path in unchecked])
    for (key, _), record in zip(unchecked, found, strict=True):
        if record is not None:
            done.setdefault(key, record)
    return done


def _read_record(storage: Storage, path: str) -> dict[str, Any] | None:
    """Return the record of a sidecar after checking all files of its shard; None if one is bad."""
    try:
        return _checked_record(storage, path)
    except (IntegrityError, FileNotFoundError, pa.ArrowInvalid, KeyError) as error:
        log.warning("%s: %s; its shard is made again", path, error)
        return None


def _checked_record(storage: Storage, path: str) -> dict[str, Any]:
    with TemporaryDirectory(prefix="qbatch-check-") as folder:
        file = Path(folder, "ids.parquet")
        storage.download(path, file)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if f"-{digest[:16]}." not in path:
            raise IntegrityError(f"{storage.object_uri(path)} does not hold what its name says")
        metadata = pq.read_metadata(file)
        record: dict[str, Any] = json.loads(metadata.metadata[_FOOTER_KEY])
        for name in ("index", "probes"):
            download_verified(storage, record[name], Path(folder, name))
        entry = {"rows": metadata.num_rows, "bytes": file.stat().st_size, "sha256": digest}
    return record | {"ids": {"path": path, **entry}}


def build_missing(
    task: IndexTask,
    missing: Mapping[str, ShardPlan],
    *,
    booking: Booking,
    stall_timeout_s: float,
) -> Iterator[dict[str, Any]]:
    """Build shards in parallel; yield the record of each as it is stored.

    Args:
        task: What all tasks share.
        missing: The shards by key.
        booking: What Ray reserves for each task.
        stall_timeout_s: Seconds without a finished shard after which the job gives up.
    """
    build = ray.remote(
        num_cpus=booking.num_cpus,
        num_gpus=booking.num_gpus,
        memory=booking.memory,
        max_retries=MAX_RETRIES,
    )(build_shard)
    shared = ray.put(task)
    refs = [build.remote(shared, shard, key) for key, shard in missing.items()]
    records = results_as_completed(refs, stall_timeout_s=stall_timeout_s)
    for num_done, record in enumerate(records, start=1):
        facts = record["facts"]
        log.info(
            "%d/%d shards built, %s vectors in this one, seconds %s",
            num_done,
            len(refs),
            f"{facts['rows']:,}",
            facts["seconds"],
        )
        yield record
