"""Decompression that hands over every byte before a fault, then names the fault."""

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from qbatch.corpus import reasons
from qbatch.corpus.formats import Compression

_READ_BYTES = 2**20
_STEP_BYTES: dict[Compression, int] = {"gz": 32 * 2**10, "zst": 4 * 2**10}
"""Compressed bytes decoded in one call: bounds what a hostile stream can expand to at once
(gzip 1000-fold, zstd about 30000-fold)."""

_FREE_BYTES = 256 * 2**20
_MOST_EXPANSION = 200
"""A stream that has grown beyond both is a bomb: texts that people write shrink 3- to 30-fold."""

_DECODE_ERRORS = (zlib.error, zstandard.ZstdError)


class DamagedStreamError(Exception):
    """A compressed stream that ends early or does not decode; caught by the readers.

    Attributes:
        reason: TRUNCATED_STREAM or CORRUPT_FILE.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def iter_decompressed(file: BinaryIO, compression: Compression) -> Iterator[bytes]:
    """Yield the content of a gzip or zstd stream of one or more members.

    Raises:
        DamagedStreamError: After everything before the damage was yielded; a stream that expands
            beyond all measure counts as damaged from there on.
    """
    decoder: Any = None
    num_read = num_made = 0
    for step in _steps(file, _STEP_BYTES[compression]):
        num_read += len(step)
        rest = step
        while rest := rest if decoder else rest.lstrip(b"\0"):  # zeros may pad between members
            decoder = decoder or _new_decoder(compression)
            try:
                content = decoder.decompress(rest)
            except _DECODE_ERRORS as error:
                raise DamagedStreamError(
                    reasons.CORRUPT_FILE, f"{error}, within the compressed bytes before {num_read}"
                ) from error
            if content:
                yield content
            num_made += len(content)
            if num_made > max(_FREE_BYTES, _MOST_EXPANSION * num_read):
                raise DamagedStreamError(
                    reasons.CORRUPT_FILE,
                    f"{num_read} compressed bytes expand to more than {num_made}, as no text does",
                )
            rest = b""
            if decoder.eof:
                rest, decoder = decoder.unused_data, None
    if decoder is not None:
        raise DamagedStreamError(
            reasons.TRUNCATED_STREAM, f"the {compression} stream stops after {num_read} bytes"
        )


def _steps(file: BinaryIO, size: int) -> Iterator[bytes]:
    while data := file.read(_READ_BYTES):
        for start in range(0, len(data), size):
            yield data[start : start + size]


def _new_decoder(compression: Compression) -> Any:  # noqa: ANN401  # zlib's and zstandard's share no type
    if compression == "gz":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    return zstandard.ZstdDecompressor().decompressobj()
