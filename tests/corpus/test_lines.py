import io
import itertools
import tracemalloc

import hypothesis.strategies as st
from hypothesis import example, given

from qbatch.corpus.lines import LineBlock, LongLine, iter_line_blocks, iter_source_lines
from qbatch.corpus.sources import Source
from qbatch.corpus.spans import Span

contents = st.lists(st.sampled_from([b"\n", b"a", b"\r\n", b"bcd", "é".encode()])).map(b"".join)


def expected_lines(data: bytes) -> list[tuple[int, bytes]]:
    """Offset and content by the definition: a line ends with its newline or with the data."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    offsets = itertools.accumulate(map(len, lines), initial=0)
    pairs = [(o, line[:-1]) for o, line in zip(offsets, lines, strict=False)]
    return pairs if not data.endswith(b"\n") and data else pairs[:-1]


def lines_of(blocks) -> list[tuple[int, bytes]]:
    lines = []
    for block in blocks:
        if isinstance(block, LongLine):
            lines.append((block.offset, block.num_bytes))
        else:
            content = block.content().split(b"\n")
            lines += zip(block.offsets().tolist(), content, strict=True)
    return lines


@given(contents, st.lists(st.integers(0, 200)))
@example(b"", [])
@example(b"\n", [0, 1])
def test_any_cut_into_byte_spans_gives_every_line_once(data, cuts):
    borders = [0, *sorted(c for c in cuts if c <= len(data)), len(data)]
    lines = []
    for start, stop in itertools.pairwise(borders):
        span = Span("x.jsonl", len(data), "v", "bytes", -1, start, stop)
        lines += lines_of(iter_source_lines(Source(span, io.BytesIO(data))))
    assert lines == expected_lines(data)


@given(contents, st.integers(1, 20), st.integers(1, 12))
def test_lines_do_not_depend_on_chunks_and_long_ones_come_as_their_length(data, chunk, limit):
    chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    expected = [
        (offset, len(line) if len(line) > limit else line) for offset, line in expected_lines(data)
    ]
    assert lines_of(iter_line_blocks(chunks, 0, limit)) == expected


def test_a_long_line_is_not_held_and_keeps_its_head():
    chunks = (b"x" * 2**16 for _ in range(2000))  # 125 MiB in one line
    tracemalloc.start()
    (line,) = iter_line_blocks(chunks, 7, 2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (line.offset, line.num_bytes, len(line.head)) == (7, 2000 * 2**16, 4096)
    assert peak < 8 * 2**20


def test_a_span_border_scan_crosses_lines_longer_than_one_read():
    data = b"a" * 200_000 + b"\n" + b"b" * 200_000 + b"\nc\n"
    middle = Span("x.jsonl", len(data), "v", "bytes", -1, 100_000, 300_000)
    (block,) = iter_source_lines(Source(middle, io.BytesIO(data)))
    assert block == LineBlock(200_001, b"b" * 200_000 + b"\n")
