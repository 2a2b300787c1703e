"""What all line formats share: blocks, overlong lines, empty and damaged streams."""

from collections.abc import Callable, Iterator

from qbatch.corpus import reasons
from qbatch.corpus.compression import DamagedStreamError
from qbatch.corpus.formats import compression_of
from qbatch.corpus.lines import MAX_LINE_BYTES, LineBlock, LongLine, iter_source_lines
from qbatch.corpus.rows import RawRows, Reject, only_rejects
from qbatch.corpus.sources import Source


def read_blocks(source: Source, parse: Callable[[LineBlock], RawRows]) -> Iterator[RawRows]:
    """Yield what ``parse`` makes of every block of lines in a source."""
    empty = empty_compressed(source)
    if empty is not None:
        yield empty
        return
    try:
        for lines in iter_source_lines(source):
            yield _refuse(lines) if isinstance(lines, LongLine) else parse(lines)
    except DamagedStreamError as damage:
        yield only_rejects(Reject(reason=damage.reason, detail=str(damage)))


def empty_compressed(source: Source) -> RawRows | None:
    """Return a reject for an object of no bytes whose name promises a compressed stream."""
    compression = compression_of(source.name)
    if source.span.size or compression is None:
        return None
    detail = f"no bytes; even an empty {compression} stream has a header"
    return only_rejects(Reject(reason=reasons.EMPTY_FILE, detail=detail))


def _refuse(line: LongLine) -> RawRows:
    detail = f"the line has {line.num_bytes} bytes; at most {MAX_LINE_BYTES} are read"
    reason = reasons.LINE_TOO_LONG
    return only_rejects(Reject(row=line.offset, reason=reason, detail=detail, raw=line.head))
