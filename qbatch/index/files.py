"""FAISS files in storage: written whole, and never parsed before they are known to be ours.

FAISS trusts what it reads: a false length in a file is a crash or worse (faiss issue 5400). So a
file is hashed against its manifest entry and its header compared with the manifest first.
"""

import hashlib
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss

from qbatch.errors import IntegrityError
from qbatch.index.columns import Metric
from qbatch.storage import Storage

_HEADER = struct.Struct("<4siqqqBi")
"""Of every FAISS index file: kind, dim, ntotal, two unused, is_trained, metric."""

_METRICS: dict[int, Metric] = {0: "inner_product", 1: "l2"}

_MAX_VECTOR_BYTES = 2**40


def upload_named(storage: Storage, stem: str, suffix: str, file: Path, rows: int) -> dict[str, Any]:
    """Store a local file as ``<stem>-<16 hex of its sha256><suffix>``; return its FILES entry."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    path = f"{stem}-{digest[:16]}{suffix}"
    storage.upload(path, file)
    return {"path": path, "rows": rows, "bytes": file.stat().st_size, "sha256": digest}


def download_verified(storage: Storage, entry: Mapping[str, Any], file: Path) -> None:
    """Copy a listed object to a local file and check its bytes.

    Raises:
        IntegrityError: It is gone, or its bytes are not those that were published.
    """
    uri = storage.object_uri(entry["path"])
    try:
        storage.download(entry["path"], file)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{uri} is listed in a manifest but gone. Run the build again to remake it"
        ) from error
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if (file.stat().st_size, digest) != (entry["bytes"], entry["sha256"]):
        raise IntegrityError(
            f"{uri} has {file.stat().st_size} bytes and sha256 {digest}, its manifest says "
            f"{entry['bytes']} bytes and {entry['sha256']}: it was damaged or replaced. Delete it "
            "and run the build again to remake it"
        )


def write_index(storage: Storage, stem: str, index: faiss.Index) -> dict[str, Any]:
    """Store an index under a name with its hash, by way of a local file; return its FILES entry."""
    with tempfile.TemporaryDirectory(prefix="qbatch-index-") as folder:
        file = Path(folder, "index.faiss")
        faiss.write_index(index, str(file))
        return upload_named(storage, stem, ".faiss", file, index.ntotal)


def read_index(
    storage: Storage, entry: Mapping[str, Any], *, dim: int, metric: Metric
) -> faiss.Index:
    """Return a stored index after checking its hash, then its header, then what FAISS made of it.

    Raises:
        IntegrityError: The file is damaged, or is not the index that the manifest describes.
    """
    with tempfile.TemporaryDirectory(prefix="qbatch-index-") as folder:
        file = Path(folder, "index.faiss")
        download_verified(storage, entry, file)
        uri = storage.object_uri(entry["path"])
        with file.open("rb") as stream:
            header = stream.read(_HEADER.size)
        check_header(header, uri, dim=dim, ntotal=entry["rows"], metric=metric)
        faiss.set_deserialization_vector_byte_limit(_MAX_VECTOR_BYTES)
        try:
            index = faiss.read_index(str(file))
        except RuntimeError as error:
            raise IntegrityError(
                f"FAISS cannot read {uri}: {str(error).splitlines()[-1]}. Delete it and run the "
                "build again to remake it"
            ) from error
    if (index.d, index.ntotal) != (dim, entry["rows"]):
        raise IntegrityError(
            f"{uri} became an index of {index.ntotal} vectors of {index.d} components; the "
            f"manifest says {entry['rows']} of {dim}. Delete it and run the build again"
        )
    return index


def check_header(header: bytes, uri: str, *, dim: int, ntotal: int, metric: Metric) -> None:
    """Compare the first bytes of a FAISS file with what it should hold.

    Raises:
        IntegrityError: They differ, or this is no FAISS index.
    """
    if len(header) < _HEADER.size:
        raise IntegrityError(f"{uri} is too short for a FAISS index: {len(header)} bytes")
    kind, found_dim, found_total, _, _, is_trained, found_metric = _HEADER.unpack(header)
    found = (found_dim, found_total, _METRICS.get(found_metric), is_trained)
    if not kind.isalnum() or found != (dim, ntotal, metric, 1):
        raise IntegrityError(
            f"the header of {uri} says {kind!r}, {found_dim} components, {found_total} vectors, "
            f"metric {found_metric}; the manifest says {dim} components, {ntotal} vectors, "
            f"metric {metric}. It is not given to FAISS. Delete it and run the build again"
        )
