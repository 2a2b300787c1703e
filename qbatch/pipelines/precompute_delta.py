"""What changed between two generations of recommendations: the rows to put, the keys to delete.

A loader that holds the generation before needs nothing else. Keys stay in their partition, so each
partition is compared for itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.manifest import fingerprint_id, read_verified
from qbatch.pipelines.unit_files import write_table_file
from qbatch.schema import RECOMMENDATION_CHANGES, RECOMMENDATIONS
from qbatch.storage import Storage

SAME_SCORE = 1e-5
"""Scores this close count as equal: the same search in another order differs in the last bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Of one partition or of all."""

    files: tuple[dict[str, Any], ...]
    """FILES entries of schema.RECOMMENDATION_CHANGES."""
    changed: int
    """Keys whose items are others than before, new ones included."""
    removed: int
    """Keys that are gone."""

    @classmethod
    def sum(cls, parts: Iterable["Changes"]) -> "Changes":
        """Add up, with the files in name order."""
        found = list(parts)
        files = sorted((f for part in found for f in part.files), key=lambda f: f["path"])
        return cls(
            files=tuple(files),
            changed=sum(part.changed for part in found),
            removed=sum(part.removed for part in found),
        )

    def to_details(self) -> dict[str, Any]:
        """Return what the manifest says."""
        return {
            "files": list(self.files),
            "changed_keys": self.changed,
            "removed_keys": self.removed,
        }


NO_CHANGES = Changes(files=(), changed=0, removed=0)


def compare_partition(
    storage: Storage, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Changes:
    """Compare two files of one partition; store the changes, if there are any."""
    tables = [
        pq.read_table(pa.BufferReader(read_verified(storage, entry))) for entry in (before, after)
    ]
    delta = changes_between(*tables)
    if not delta.num_rows:
        return NO_CHANGES
    key = fingerprint_id({"before": before["sha256"], "after": after["sha256"]})
    removed = pc.sum(delta["deleted"]).as_py()
    return Changes(
        files=(write_table_file(storage, f"delta/{key}", delta),),
        changed=delta.num_rows - removed,
        removed=removed,
    )


def changes_between(before: pa.Table, after: pa.Table) -> pa.Table:
    """Return schema.RECOMMENDATION_CHANGES, ordered by key.

    Args:
        before: schema.RECOMMENDATIONS.
        after: schema.RECOMMENDATIONS.
    """
    place = pc.index_in(after["key"], before["key"]).combine_chunks()
    known = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    is_changed = np.ones(len(after), bool)
    old = before["items"].take(place.drop_null())
    is_changed[known] = ~_is_same(old, after["items"].take(pa.array(known)))
    put = after.filter(pa.array(is_changed))
    gone = before.filter(pc.invert(pc.is_in(before["key"], after["key"].combine_chunks())))
    empty = pa.array([[]] * len(gone), RECOMMENDATIONS.field("items").type)
    gone = pa.table([gone["key"], empty], schema=RECOMMENDATIONS)
    deleted = np.repeat([False, True], [len(put), len(gone)])
    both = pa.concat_tables([put, gone]).append_column("deleted", pa.array(deleted))
    return both.sort_by("key").cast(RECOMMENDATION_CHANGES)


def _is_same(old: pa.ChunkedArray, new: pa.ChunkedArray) -> np.ndarray:
    """Return which lists have the same documents in the same order with the same scores."""
    sizes = pc.list_value_length(old).to_numpy()
    is_same: np.ndarray = sizes == pc.list_value_length(new).to_numpy()
    alike = np.flatnonzero(is_same)
    old_items, new_items = (pc.list_flatten(side.take(pa.array(alike))) for side in (old, new))
    differs = pc.invert(pc.equal(_field(old_items, "doc_id"), _field(new_items, "doc_id")))
    scores = [_field(side, "score").to_numpy() for side in (old_items, new_items)]
    is_other = differs.to_numpy(zero_copy_only=False) | (np.abs(scores[0] - scores[1]) > SAME_SCORE)
    owner = np.repeat(np.arange(len(alike)), sizes[alike])
    is_same[alike] = np.bincount(owner, is_other, minlength=len(alike)) == 0
    return is_same


def _field(items: pa.Array | pa.ChunkedArray, name: str) -> pa.Array:
    values = pc.struct_field(items, name)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
