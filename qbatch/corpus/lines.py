"""Lines of a byte stream, in blocks, with exact offsets and bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from qbatch.corpus.compression import DamagedStreamError, iter_decompressed
from qbatch.corpus.formats import compression_of
from qbatch.corpus.rows import RAW_LIMIT
from qbatch.corpus.sources import Source, read_exactly

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is refused without being held in memory."""

_BLOCK_BYTES = 4 * 2**20
_READ_BYTES = 4 * 2**20
_SCAN_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Whole lines; only the last line of a stream may lack its newline."""

    offset: int
    """Of the first byte, in the decompressed stream."""
    data: bytes

    def offsets(self) -> np.ndarray:
        """Return the int64 offset of every line in the stream."""
        newlines = np.flatnonzero(np.frombuffer(self.data, np.uint8) == ord("\n"))
        starts = np.concatenate([[0], newlines + 1]) + self.offset
        return starts[:-1] if self.data.endswith(b"\n") else starts

    def content(self) -> bytes:
        """Return the data without the last newline: splitting it at newlines gives the lines."""
        return self.data.removesuffix(b"\n")


@dataclass(frozen=True, slots=True)
class LongLine:
    """A line above the limit, of which only the head was kept."""

    offset: int
    num_bytes: int
    head: bytes


def iter_source_lines(source: Source) -> Iterator[LineBlock | LongLine]:
    """Yield the lines whose first byte lies in the span of a source.

    Raises:
        DamagedStreamError: The compression ends early or is damaged; all lines that were whole
            before the damage have been yielded.
    """
    span = source.span
    compression = compression_of(span.uri)
    if compression is not None:
        return iter_line_blocks(iter_decompressed(source.file, compression), 0)
    start, chunks = 0, _iter_range(source, 0, span.size)
    if span.kind == "bytes":
        start = _line_border(source, span.start)
        chunks = _iter_span(source, start)
    return iter_line_blocks(chunks, start)


def iter_line_blocks(
    chunks: Iterable[bytes], offset: int, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[LineBlock | LongLine]:
    """Yield the lines of a stream, whatever its cut into chunks.

    Args:
        chunks: Content of the stream; small ones are joined into blocks.
        offset: Of the first byte of the first chunk.
        max_line_bytes: Without the newline; longer lines come as LongLine.
    """
    cutter = _LineCutter(offset, max_line_bytes)
    try:
        for chunk in chunks:
            for start in range(0, len(chunk), max_line_bytes):
                yield from cutter.feed(chunk[start : start + max_line_bytes])
    except DamagedStreamError:
        yield from cutter.flush()
        raise
    yield from cutter.finish()


class _LineCutter:
    """Whole lines that wait to fill a block, and the line that has only begun."""

    def __init__(self, offset: int, max_line_bytes: int) -> None:
        self._offset = offset  # of the first byte waiting here
        self._max_line_bytes = max_line_bytes
        self._lines: list[bytes] = []
        self._lines_bytes = 0
        self._begun: list[bytes] = []
        self._begun_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[LineBlock | LongLine]:
        """Take in at most ``max_line_bytes``; yield what is complete and large enough."""
        first = chunk.find(b"\n") + 1
        if not first:
            self._begin(chunk)
            return
        self._begin(chunk[:first])
        yield from self._end_line(self._begun_bytes - 1)
        last = chunk.rfind(b"\n") + 1
        self._lines.append(chunk[first:last])
        self._lines_bytes += last - first
        self._begin(chunk[last:])
        if self._lines_bytes >= _BLOCK_BYTES:
            yield from self.flush()

    def flush(self) -> Iterator[LineBlock]:
        """Yield the whole lines."""
        if self._lines_bytes:
            yield LineBlock(self._offset, b"".join(self._lines))
        self._offset += self._lines_bytes
        self._lines, self._lines_bytes = [], 0

    def finish(self) -> Iterator[LineBlock | LongLine]:
        """Yield everything; the stream has ended."""
        yield from self._end_line(self._begun_bytes)
        yield from self.flush()

    def _begin(self, piece: bytes) -> None:
        self._begun.append(piece)
        self._begun_bytes += len(piece)
        if self._begun_bytes > self._max_line_bytes + 1:  # one for the newline
            self._begun = [b"".join(self._begun)[:RAW_LIMIT]]

    def _end_line(self, num_bytes: int) -> Iterator[LineBlock | LongLine]:
        if num_bytes > self._max_line_bytes:
            yield from self.flush()
            yield LongLine(self._offset, num_bytes, b"".join(self._begun)[:RAW_LIMIT])
            self._offset += self._begun_bytes
        else:
            self._lines += self._begun
            self._lines_bytes += self._begun_bytes
        self._begun, self._begun_bytes = [], 0


def _iter_range(source: Source, start: int, stop: int) -> Iterator[bytes]:
    for position in range(start, stop, _READ_BYTES):
        end = min(position + _READ_BYTES, stop)
        yield read_exactly(source.file, source.span, position, end)


def _iter_span(source: Source, start: int) -> Iterator[bytes]:
    """Yield from a line border to the border at the span's stop, reading forward only."""
    stop = max(start, source.span.stop)
    yield from _iter_range(source, start, stop)
    yield from _iter_range(source, stop, _line_border(source, stop))


def _line_border(source: Source, position: int) -> int:
    """Return where the first line that begins at or after a position begins; else the size.

    Both ends of a span are found by this one rule, so spans that touch share no line and lose none.
    """
    size = source.span.size
    if position == 0:
        return 0
    for start in range(position - 1, size, _SCAN_BYTES):
        data = read_exactly(source.file, source.span, start, min(start + _SCAN_BYTES, size))
        newline = data.find(b"\n")
        if newline >= 0:
            return start + newline + 1
    return size
