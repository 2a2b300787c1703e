"""Which documents of a unit need no model, and copying their stored vectors. Imports no Ray.

A document is known by its content hash, wherever it stands now: edited, renamed or re-partitioned
objects cost what is new in them. Identity and kept columns come from the new rows.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.corpus.passages import content_hashes
from qbatch.corpus.spans import Unit
from qbatch.errors import IntegrityError
from qbatch.manifest import read_verified
from qbatch.schema import DOCUMENTS, PASSAGES
from qbatch.storage import Storage
from qbatch.vector_files import read_vector_file

log = logging.getLogger(__name__)

_HASH_COLUMNS = ["content_hash", "passage_index"]
_PLACE = np.dtype([("hash", "S16"), ("file", np.int32), ("row", np.int32), ("rows", np.int32)])
"""Where a document's passages lie: file, first row, number of rows."""


class SharedPlaces(Protocol):
    """Places that all processes of a node share."""

    def get(self) -> np.ndarray:
        """Return them, dtype _PLACE, sorted by hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VanishedFiles:
    """Published files of the same fingerprint that no unit of the plan makes; it travels."""

    storage: Storage
    entries: list[dict[str, Any]]
    """schema.FILES entries."""
    vector_columns: list[str]
    by_object: Mapping[str, list[int]] | None
    """Numbers of the files an object's rows lie in, by its URI; None: rows may come from any."""
    places: "SharedPlaces | None" = None
    """The sorted places of all documents; None when rows come by object."""

    def find_places(self, unit: Unit) -> np.ndarray:
        """Return the sorted places, dtype _PLACE, of all documents a unit may take from."""
        if self.places is not None:
            return self.places.get()
        known = self.by_object or {}
        uris = dict.fromkeys(span.uri for span in unit.spans)
        numbers = dict.fromkeys(i for uri in uris for i in known.get(uri, ()))
        return sorted_places([places_in(self.storage, self.entries[i], i) for i in numbers])


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitDocuments:
    """A unit's documents, parted into those to embed and those whose vectors were found."""

    fresh: pa.Table
    """schema.DOCUMENTS and kept columns."""
    fresh_places: np.ndarray
    """int64, (fresh documents,): their place among all documents of the unit."""
    reused: pa.Table
    """schema.vectors_schema, a row a passage; a table without columns where nothing was found."""
    reused_places: np.ndarray
    """int64, (reused passages,)."""

    def places(self, passages: pa.Table) -> pa.Table:
        """Return the document that each passage belongs to: of the fresh ones, then the reused.

        Args:
            passages: Of ``fresh``, in its order.
        """
        of_document = np.cumsum(passages["passage_index"].to_numpy() == 0) - 1
        places = [self.fresh_places[of_document], self.reused_places]
        return pa.table({"place": np.concatenate(places)})


def places_in(storage: Storage, entry: Mapping[str, Any], number: int) -> np.ndarray:
    """Return the places, dtype _PLACE, of the documents in one file; none if it cannot be read.

    Only the hashes are read, so that the file's own checksum has to wait until rows are taken.
    """
    try:
        with storage.open(entry["path"]) as stream:
            table = pq.read_table(stream, columns=_HASH_COLUMNS)
    except (OSError, pa.ArrowInvalid) as error:  # Parquet's errors of a damaged file are both
        log.warning("%s: %s; its documents are embedded again", entry["path"], error)
        return np.empty(0, _PLACE)
    firsts = np.flatnonzero(table["passage_index"].to_numpy() == 0)
    places = np.empty(len(firsts), _PLACE)
    places["hash"] = _hash_bytes(table["content_hash"])[firsts]
    places["file"], places["row"] = number, firsts
    places["rows"] = np.diff(firsts, append=len(table))
    return places


def _hash_bytes(hashes: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return a fixed 16-byte column as a numpy array of S16, which compares like the bytes."""
    joined = hashes.combine_chunks() if isinstance(hashes, pa.ChunkedArray) else hashes
    start = joined.offset * 16
    data = joined.buffers()[1]
    if not len(joined):
        return np.empty(0, "S16")
    return np.frombuffer(data, "S16", count=len(joined), offset=start)


def sorted_places(places: Sequence[np.ndarray]) -> np.ndarray:
    """Return all places in one array, ordered by hash: dtype _PLACE."""
    joined = np.concatenate([np.empty(0, _PLACE), *places])
    return joined[np.argsort(joined["hash"], kind="stable")]


def split_documents(
    documents: pa.Table, unit: Unit, vanished: VanishedFiles | None
) -> SplitDocuments:
    """Part the documents of a unit into fresh ones and those whose vectors are stored.

    Args:
        documents: schema.DOCUMENTS, then kept columns.
        unit: Where they come from.
        vanished: Where stored vectors may lie; None for nowhere.
    """
    if vanished is None:
        return SplitDocuments(
            fresh=documents,
            fresh_places=np.arange(len(documents)),
            reused=pa.table({}),
            reused_places=np.empty(0, np.int64),
        )
    places = vanished.find_places(unit)
    hashes = _hash_bytes(content_hashes(documents["title"], documents["text"]))
    at = np.searchsorted(places["hash"], hashes)
    is_known = at < len(places)
    is_known[is_known] = places["hash"][at[is_known]] == hashes[is_known]
    tables, numbers = [], []
    for file in np.unique(places["file"][at[is_known]]).tolist():
        own = np.flatnonzero(is_known)
        own = own[places["file"][at[own]] == file]
        found = _take_passages(vanished, file, places[at[own]], hashes[own])
        if found is None:
            is_known[own] = False
            continue
        passages, of_document = found
        new = documents.take(pa.array(own[of_document]))
        tables.append(_renamed(passages, new, vanished.vector_columns))
        numbers.append(own[of_document])
    fresh = np.flatnonzero(~is_known)
    return SplitDocuments(
        fresh=documents.take(pa.array(fresh)),
        fresh_places=fresh,
        reused=pa.concat_tables(tables).unify_dictionaries() if tables else pa.table({}),
        reused_places=np.concatenate([np.empty(0, np.int64), *numbers]),
    )


def _take_passages(
    vanished: VanishedFiles, file: int, places: np.ndarray, hashes: np.ndarray
) -> tuple[pa.Table, np.ndarray] | None:
    """Return the stored passages at some places, and which place each belongs to.

    None if the file is gone or damaged: its documents then count as fresh.
    """
    entry = vanished.entries[file]
    try:
        data = read_verified(vanished.storage, entry)
    except IntegrityError as error:
        log.warning("%s; its documents are embedded again", error)
        return None
    table = read_vector_file(data)
    counts = places["rows"].astype(np.int64)
    of_place = np.repeat(np.arange(len(places)), counts)
    within = np.arange(len(of_place)) - np.repeat(np.cumsum(counts) - counts, counts)
    passages = table.take(pa.array(places["row"].astype(np.int64)[of_place] + within))
    if not (_hash_bytes(passages["content_hash"]) == hashes[of_place]).all():
        raise IntegrityError(
            f"{vanished.storage.object_uri(entry['path'])} holds other documents than its hashes "
            "said a moment ago; run the job again"
        )
    return passages, of_place


def _renamed(passages: pa.Table, documents: pa.Table, vector_columns: Sequence[str]) -> pa.Table:
    """Return stored passages with the identity, ids and kept columns of their new documents.

    Args:
        passages: As stored, with the kept columns of then.
        documents: The document of each passage, schema.DOCUMENTS and the kept columns of now.
        vector_columns: In the order of the schema.
    """
    index = passages["passage_index"].cast(pa.large_string())
    separator = pa.scalar("#", pa.large_string())
    renewed = {
        "object_uri": documents["object_uri"],
        "row": documents["row"],
        "doc_id": documents["doc_id"],
        "passage_id": pc.binary_join_element_wise(documents["doc_id"], index, separator),
    }
    stored = [*PASSAGES.names[:-1], *vector_columns]  # all but the token ids
    kept = documents.column_names[len(DOCUMENTS) :]
    return pa.table(
        {
            **{name: renewed.get(name, passages[name]) for name in stored},
            **{name: documents[name] for name in kept},
        }
    )
