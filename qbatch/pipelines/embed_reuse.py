"""Finding out which published files may hold documents that a job would embed again.

Units that the new plan still has keep their files. The others, the vanished ones, are looked
through: see ``embed_known`` for what is done with what they hold.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from qbatch.corpus.spans import Unit
from qbatch.manifest import Generation, read_verified
from qbatch.pipelines.cluster import MAX_RETRIES
from qbatch.pipelines.embed_known import VanishedFiles, places_in, sorted_places
from qbatch.pipelines.tasks import results_as_completed
from qbatch.schema import UNITS, vector_column_names
from qbatch.storage import Storage

log = logging.getLogger(__name__)

Reuse = Literal["by-hash", "by-object", "off"]

_ENTRY = ["path", "rows", "bytes", "sha256"]


@dataclass(frozen=True, slots=True)
class _PlacesInStore:
    """Places in Ray's object store: one copy a node."""

    reference: "ray.ObjectRef[np.ndarray]"

    def get(self) -> np.ndarray:
        """Return them without copying."""
        return ray.get(self.reference)


def vanished_files(
    storage: Storage,
    current: Generation | None,
    keys: pa.ChunkedArray,
    *,
    fingerprint: Mapping[str, Any],
    reuse: Reuse,
    stall_timeout_s: float,
) -> VanishedFiles | None:
    """Return the files that documents may be taken from; None if there are none.

    Args:
        storage: The vectors table.
        current: Its newest generation.
        keys: Of the units planned now.
        fingerprint: Of the vectors to be made: others are of no use.
        reuse: by-hash looks everywhere, and holds 28 bytes a vanished document in Ray's object
            store; by-object only where the same object's rows lay before.
        stall_timeout_s: Seconds without progress after which the job gives up.
    """
    if reuse == "off" or current is None or current.plan is None:
        return None
    if current.fingerprint != fingerprint:
        return None
    data = read_verified(storage, current.plan)
    columns = ["unit_key", "spans", *_ENTRY]
    plan = pq.read_table(pa.BufferReader(data), columns=columns, schema=UNITS)
    gone = pc.invert(pc.is_in(plan["unit_key"], keys.combine_chunks()))
    rows = plan.filter(pc.and_(gone, pc.greater(plan["rows"], 0))).to_pylist()
    if not rows:
        return None
    entries = [{name: row[name] for name in _ENTRY} for row in rows]
    log.info("looking for known documents in %d files of changed units", len(entries))
    files = VanishedFiles(
        storage=storage,
        entries=entries,
        vector_columns=vector_column_names(fingerprint["dims"]),
        by_object=_files_by_object([row["spans"] for row in rows]),
    )
    if reuse == "by-object":
        return files
    read = ray.remote(max_retries=MAX_RETRIES)(places_in)
    refs = [read.remote(storage, entry, i) for i, entry in enumerate(entries)]
    found = list(results_as_completed(refs, stall_timeout_s=stall_timeout_s))
    return replace(files, by_object=None, places=_PlacesInStore(ray.put(sorted_places(found))))


def _files_by_object(spans: Sequence[str]) -> dict[str, list[int]]:
    files: dict[str, list[int]] = {}
    for i, text in enumerate(spans):
        for uri in dict.fromkeys(span.uri for span in Unit.from_json(text).spans):
            files.setdefault(uri, []).append(i)
    return files
