import gzip
import io
import random

import pytest
import zstandard

from qbatch.corpus.compression import DamagedStreamError, iter_decompressed
from qbatch.corpus.reasons import CORRUPT_FILE, TRUNCATED_STREAM

CONTENT = random.Random(0).randbytes(300_000) + b"abc" * 100_000
COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress}


def decompress(data: bytes, compression: str) -> tuple[bytes, str | None]:
    parts = []
    try:
        for part in iter_decompressed(io.BytesIO(data), compression):
            parts.append(part)
    except DamagedStreamError as damage:
        return b"".join(parts), damage.reason
    return b"".join(parts), None


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("contents", [[], [b""], [CONTENT], [CONTENT, b"", b"end"]])
def test_members_are_joined(compression, contents):
    data = b"".join(COMPRESS[compression](content) for content in contents)
    assert decompress(data, compression) == (b"".join(contents), None)


def test_zeros_may_pad_gzip_members():
    data = gzip.compress(b"a") + bytes(100_000) + gzip.compress(b"b") + bytes(7)
    assert decompress(data, "gz") == (b"ab", None)


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("kept", [1, 5, 1000, -1])
def test_a_truncated_stream_gives_what_a_streaming_decoder_can_give(compression, kept):
    data = COMPRESS[compression](CONTENT)[:kept]
    content, reason = decompress(data, compression)
    assert reason == TRUNCATED_STREAM
    assert CONTENT.startswith(content)
    if kept == -1 and compression == "gz":
        assert content == CONTENT  # only the checksum lacks a byte


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_damage_in_the_middle_keeps_what_comes_before(compression):
    whole = COMPRESS[compression](b"first" * 1000)
    content, reason = decompress(whole + b"garbage, not a member", compression)
    assert (content, reason) == (b"first" * 1000, CORRUPT_FILE)


def test_a_flipped_bit_does_not_pass():
    data = bytearray(gzip.compress(CONTENT))
    data[150_000] ^= 1
    content, reason = decompress(bytes(data), "gz")
    assert reason == CORRUPT_FILE
    assert len(content) <= len(CONTENT)


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_bomb_ends_as_a_damaged_stream(compression):
    bomb = COMPRESS[compression](b"the same line again\n" * (400 * 2**20 // 20))
    content, reason = decompress(bomb, compression)
    assert reason == CORRUPT_FILE
    assert len(content) < 400 * 2**20


def test_a_large_stream_of_ordinary_text_is_no_bomb():
    rng = random.Random(0)
    words = [rng.randbytes(8).hex() for _ in range(1000)]
    block = " ".join(rng.choice(words) for _ in range(500_000)).encode()
    stream = zstandard.compress(block) * 40  # members, 340 MB in all
    assert sum(map(len, iter_decompressed(io.BytesIO(stream), "zst"))) == 40 * len(block)
