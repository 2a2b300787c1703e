"""Plain text: a document a file, or a document a line."""

from collections.abc import Iterable, Iterator
from functools import partial

import pyarrow as pa

from qbatch.corpus.compression import DamagedStreamError, iter_decompressed
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.formats import compression_of
from qbatch.corpus.lines import LineBlock
from qbatch.corpus.readers.blocks import empty_compressed, read_blocks
from qbatch.corpus.rows import RawRows, Reject, only_rejects
from qbatch.corpus.sources import Source

_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 2**20
_MARGIN_BYTES = 16
"""Read beyond the longest document: room for a BOM and a last character that may be incomplete."""


def read_text(source: Source, config: CorpusConfig) -> Iterator[RawRows]:
    """Yield a whole object as one document; no more is read than a document may have."""
    empty = empty_compressed(source)
    if empty is not None:
        yield empty
        return
    limit = config.max_document_bytes + _MARGIN_BYTES
    try:
        data = _head(_chunks(source), limit)
    except DamagedStreamError as damage:
        yield only_rejects(Reject(reason=damage.reason, detail=str(damage)))
        return
    if len(data) == limit:
        data = _without_last_character(data)
    yield _text_rows([0], [data.removeprefix(_BOM)], config)


def read_text_lines(source: Source, config: CorpusConfig) -> Iterator[RawRows]:
    """Yield every line of a span as a document; ``row`` is the offset of the line."""
    return read_blocks(source, partial(_parse_block, config=config))


def _parse_block(block: LineBlock, config: CorpusConfig) -> RawRows:
    lines = [line.removesuffix(b"\r") for line in block.content().split(b"\n")]
    if block.offset == 0:
        lines[0] = lines[0].removeprefix(_BOM)
    return _text_rows(block.offsets(), lines, config)


def _text_rows(rows: Iterable[int], texts: list[bytes], config: CorpusConfig) -> RawRows:
    absent = pa.nulls(len(texts))
    return RawRows(
        rows=pa.array(rows, pa.int64()),
        doc_ids=absent.cast(pa.large_string()),
        titles=absent.cast(pa.large_string()),
        texts=pa.array(texts, pa.large_binary()),
        kept=dict.fromkeys(config.keep_columns, absent),
    )


def _chunks(source: Source) -> Iterator[bytes]:
    compression = compression_of(source.name)
    if compression is not None:
        yield from iter_decompressed(source.file, compression)
        return
    while chunk := source.file.read(_READ_BYTES):
        yield chunk


def _head(chunks: Iterable[bytes], limit: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    for chunk in chunks:
        parts.append(chunk)
        num_bytes += len(chunk)
        if num_bytes >= limit:
            break
    return b"".join(parts)[:limit]


def _without_last_character(data: bytes) -> bytes:
    stop = len(data)
    while stop > len(data) - 3 and data[stop - 1] & 0b1100_0000 == 0b1000_0000:
        stop -= 1
    return data[: stop - 1]
