"""Sharing out keys and rows among partitions: each input becomes a slice for every partition.

The slices of an input lie in one partial file. A slice is known by the hash of its content, so that
a partition whose slices are the same as before need not be made again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from qbatch.errors import IntegrityError
from qbatch.manifest import fingerprint_id
from qbatch.pipelines.cluster import MAX_RETRIES
from qbatch.pipelines.search_queries import QueryBlock, QuerySource
from qbatch.pipelines.tasks import results_as_completed
from qbatch.pipelines.unit_files import list_partials, write_partial_batches
from qbatch.storage import Storage
from qbatch.tables import PublishedTable

DIGEST_BYTES = 16

MEMBERS = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # 0: the key itself, without an item
        pa.field("doc_id", pa.large_string()),
        pa.field("score", pa.float32()),
    ]
)
"""What a slice holds."""

_DIGESTS = b"digests"
_FILES_PER_TASK = 32

Input = QueryBlock | dict[str, str]
"""Queries whose ids are keys, or a FILES entry of a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceTask:
    """What every process of this step needs to know."""

    output: str
    run: PublishedTable
    """Whose rows become items: as searched, as selected, or in a reranker's order."""
    source: QuerySource
    """Where the keys are."""
    num_searched: int
    """Queries that the search accounted for."""
    num_partitions: int
    top_k: int

    def key(self, given: Input) -> str:
        """Return the name of an input's partial file."""
        if isinstance(given, QueryBlock):
            source = self.source
            own = {"column": asdict(source.column), "id": source.id_column, **asdict(given)}
        else:
            own = {"run": given["sha256"], "top_k": self.top_k}
        return fingerprint_id({"slices": own, "num_partitions": self.num_partitions})

    def members(self, given: Input) -> pa.Table:
        """Return the keys or the rows of an input: MEMBERS."""
        if isinstance(given, QueryBlock):
            return _key_members(self.source.queries(self.source.read_file(given), given).ids)
        return _run_members(self.run.read_file(given), self.top_k)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slices:
    """All slices of all inputs."""

    paths: list[str]
    """Of the partial files, in the order of the inputs."""
    digests: np.ndarray
    """uint8, (inputs, partitions, DIGEST_BYTES): 0 for a slice without rows."""

    def of(self, partition: int) -> tuple[list[str], str]:
        """Return the files that hold something of a partition, and the hash of all that.

        Both are in an order that only content decides: a changed input changes the names of files
        made from it, and so their order in lists.
        """
        digests = map(bytes, self.digests[:, partition])
        used = sorted(pair for pair in zip(digests, self.paths, strict=True) if any(pair[0]))
        joined = b"".join(digest for digest, _ in used)
        return [path for _, path in used], hashlib.sha256(joined).hexdigest()


def make_slices(task: SliceTask, inputs: Sequence[Input], *, stall_timeout_s: float) -> Slices:
    """Slice the inputs that are not sliced yet.

    Args:
        task: What all processes share.
        inputs: In any order.
        stall_timeout_s: Seconds without progress after which the job gives up.
    """
    storage, shared = Storage(task.output), ray.put(task)
    keys = [task.key(given) for given in inputs]
    existing = list_partials(storage)
    make = ray.remote(max_retries=MAX_RETRIES)(_write_slices)
    refs = [
        make.remote(shared, given)
        for key, given in zip(keys, inputs, strict=True)
        if key not in existing
    ]
    digests = dict(results_as_completed(refs, stall_timeout_s=stall_timeout_s))
    paths = list_partials(storage)
    old = [paths[key] for key in dict.fromkeys(keys) if key in existing]
    read = ray.remote(max_retries=MAX_RETRIES)(_read_digests)
    reads = [
        read.remote(storage, old[i : i + _FILES_PER_TASK])
        for i in range(0, len(old), _FILES_PER_TASK)
    ]
    for found in results_as_completed(reads, stall_timeout_s=stall_timeout_s):
        digests.update(found)
    shape = (len(keys), task.num_partitions, DIGEST_BYTES)
    joined = b"".join(digests[key] for key in keys)
    return Slices(
        paths=[paths[key] for key in keys],
        digests=np.frombuffer(joined, np.uint8).reshape(shape),
    )


def partitions_of(keys: pa.Array | pa.ChunkedArray, num_partitions: int) -> np.ndarray:
    """Return the partition of each key: the first 8 bytes of its blake2b, little-endian, modulo.

    Loaders may rely on it.
    """
    encoded = pc.dictionary_encode(keys)
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    digests = b"".join(
        hashlib.blake2b(key.encode(), digest_size=8).digest()
        for key in encoded.dictionary.to_pylist()
    )
    partitions = np.frombuffer(digests, "<u8") % np.uint64(num_partitions)
    found: np.ndarray = partitions.astype(np.int64)[encoded.indices.to_numpy()]
    return found


def read_slice(storage: Storage, path: str, partition: int) -> pa.Table:
    """Return one slice of a partial file, without reading the others.

    Raises:
        IntegrityError: It is damaged.
    """
    try:
        with storage.open(path) as stream:
            file = pa.ipc.open_file(stream)
            batch = file.get_batch(partition)
            wanted = _digest_list(file)[partition]
    except (pa.ArrowInvalid, KeyError, IndexError) as error:
        raise IntegrityError(f"{storage.object_uri(path)}: {error}. {_REMEDY}") from error
    if _digest(batch) != wanted:
        raise IntegrityError(
            f"slice {partition} of {storage.object_uri(path)} is not what was written. {_REMEDY}"
        )
    return pa.Table.from_batches([batch])


_REMEDY = "Delete the file and run the job again"


def _key_members(ids: pa.Array) -> pa.Table:
    ranks = np.zeros(len(ids), np.int32)
    nothing = [pa.nulls(len(ids), MEMBERS.field(name).type) for name in ("doc_id", "score")]
    return pa.table([ids, ranks, *nothing], schema=MEMBERS)


def _run_members(run: pa.Table, top_k: int) -> pa.Table:
    columns = ["query_id", "rank", "doc_id", "score"]
    members = pa.table([run[name] for name in columns], schema=MEMBERS)
    return members.filter(pc.less_equal(members["rank"], top_k))


def _write_slices(task: SliceTask, given: Input) -> tuple[str, bytes]:
    """Write the slices of one input; return its key and the digests of its slices."""
    members = task.members(given).combine_chunks()
    partition = partitions_of(members["key"], task.num_partitions)
    order = np.argsort(partition, kind="stable")
    bounds = np.searchsorted(partition[order], np.arange(task.num_partitions + 1))
    # take, not slice: equal content then has equal bytes
    batches = [
        _one_batch(members.take(pa.array(order[bounds[i] : bounds[i + 1]])))
        for i in range(task.num_partitions)
    ]
    digests = [_digest(batch) for batch in batches]
    schema = MEMBERS.with_metadata({_DIGESTS: b"".join(digests).hex()})
    write_partial_batches(Storage(task.output), task.key(given), batches, schema)
    return task.key(given), b"".join(digests)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _digest(batch: pa.RecordBatch) -> bytes:
    if not batch.num_rows:
        return bytes(DIGEST_BYTES)
    return hashlib.sha256(batch.serialize()).digest()[:DIGEST_BYTES]


def _read_digests(storage: Storage, paths: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for path in paths:
        with storage.open(path) as stream:
            digests = b"".join(_digest_list(pa.ipc.open_file(stream)))
        found[path.removeprefix("partials/").partition("-")[0]] = digests
    return found


def _digest_list(file: pa.ipc.RecordBatchFileReader) -> list[bytes]:
    joined = bytes.fromhex(file.schema.metadata[_DIGESTS].decode())
    return [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)]
