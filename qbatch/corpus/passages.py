"""Documents to tokenized passages: what fits stays whole, the rest is cut at natural borders.

Owns passage tables: identity, offsets, token limits, content hashes. Cuts are planned by
`splitting` on one tokenization of the text and proven on the tokens of the passages themselves: a
passage that would be truncated is cut again. Knows no model, only the shape of a `Tokenizer`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer as Backend

from qbatch import schema
from qbatch.corpus.splitting import Span, SplittableText, splittable_texts
from qbatch.errors import ConfigError

_MIN_ROOM_TOKENS = 8
"""Least tokens that special tokens and prompt must leave for title and text."""

_SLACK_TOKENS = 2
"""Room kept free when cuts are planned: alone, a passage may take more tokens than in its text."""

_MERGED_TOKENS = 8
"""A document this much over its room may still fit: tokens merge where title and text meet."""

_CALL_CHARS = 1 << 22
"""Characters handed to the tokenizer in one call, at most; a longer single text goes alone."""

_MAX_CHARS_PER_TOKEN = 32
"""A title is looked at only this far: no need to tokenize more to know that it is too long."""

_LONG_CHARS_PER_TOKEN = 6
"""Documents with more characters per allowed token are split without trying whether they fit."""


class TokenBatch(Protocol):
    """Token ids of several texts, one after the other."""

    @property
    def ids(self) -> np.ndarray:
        """int32 of shape (sum of lengths,)."""

    @property
    def lengths(self) -> np.ndarray:
        """int32 of shape (num_texts,)."""


class Tokenizer(Protocol):
    """What splitting needs of a tokenizer."""

    @property
    def max_tokens(self) -> int:
        """Longest text `encode` returns, special tokens included; it truncates there."""

    @property
    def backend(self) -> Backend:
        """The same tokenizer without truncation and padding."""

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of every text in order, special tokens included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limits:
    """The tokenizer and how much of it a passage may use."""

    tokenizer: Tokenizer
    max_tokens: int
    num_special: int
    """Special tokens of every passage."""
    overlap_tokens: int
    prompt: str
    room: int
    """Tokens left for title and text."""


def split_and_tokenize(
    documents: pa.Table,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    overlap_tokens: int,
    prompt: str = "",
) -> pa.Table:
    """Return the passages of all documents, tokenized, in document order.

    A document that fits into ``max_tokens`` is one passage, untouched. A longer one is cut after
    paragraphs, else sentences, lines, words or graphemes: the first kind that leaves a passage at
    least half full. Its passages carry no outer white space and together hold every other
    character. The tokens of a passage are those of ``prompt + title + " " + passage``; the title of
    a document that does not fit is cut at half of the room.

    Args:
        documents: schema.DOCUMENTS, then the columns to keep.
        tokenizer: Truncates at ``max_tokens`` or above.
        max_tokens: Most tokens of a passage: special tokens, prompt and title included.
        overlap_tokens: Most tokens of text repeated from the passage before, from a natural border
            on; never more than half of the room beside the title.
        prompt: Put before every passage as it stands.

    Returns:
        schema.PASSAGES, then the kept columns; at least one row per document.

    Raises:
        ConfigError: The limits leave no room for text or contradict each other.
    """
    limits = _limits(tokenizer, max_tokens, overlap_tokens, prompt)
    pieces = _tokenize_whole(documents, limits)
    if len(pieces) < len(documents):
        is_long = np.ones(len(documents), bool)
        is_long[pieces["document"].to_numpy()] = False
        split = _tokenize_split(documents, np.flatnonzero(is_long), limits)
        pieces = pa.concat_tables([pieces, *split])
        pieces = pieces.sort_by([("document", "ascending"), ("start_char", "ascending")])
    return _passage_table(documents, pieces)


def content_hashes(titles: pa.ChunkedArray, texts: pa.ChunkedArray) -> pa.Array:
    """Return blake2b-128 of title, NUL and text for every document; no title is an empty title."""
    joined = _join(titles.fill_null(""), "\0", texts)
    digests = [
        hashlib.blake2b(text, digest_size=16).digest()
        for chunk in joined.chunks
        for text in _views(chunk)
    ]
    return pa.array(digests, pa.binary(16))


def _join(*parts: pa.ChunkedArray | pa.Array | str) -> pa.ChunkedArray:
    """Return the element-wise concatenation of string columns and constants."""
    columns = [pa.scalar(p, pa.large_string()) if isinstance(p, str) else p for p in parts]
    return pc.binary_join_element_wise(*columns, pa.scalar("", pa.large_string()))


def _views(strings: pa.Array) -> Iterator[memoryview]:
    """Yield the UTF-8 bytes of every string without copying them."""
    _, offsets, data = strings.buffers()
    borders = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    view = memoryview(data) if data else memoryview(b"")
    return (view[a:b] for a, b in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))


def _limits(tokenizer: Tokenizer, max_tokens: int, overlap_tokens: int, prompt: str) -> _Limits:
    prompt_tokens = len(tokenizer.backend.encode(prompt, add_special_tokens=False))
    num_special = int(tokenizer.encode([""]).lengths[0])
    room = max_tokens - num_special - prompt_tokens
    if max_tokens > tokenizer.max_tokens:
        raise ConfigError(
            f"max_tokens ({max_tokens:,}) is above what the tokenizer returns "
            f"({tokenizer.max_tokens:,}): lower it, or load the tokenizer with a higher limit."
        )
    if room < _MIN_ROOM_TOKENS:
        raise ConfigError(
            f"max_tokens ({max_tokens:,}) leaves room for {max(room, 0)} tokens of text beside "
            f"{num_special} special tokens and {prompt_tokens} of the prompt; at least "
            f"{_MIN_ROOM_TOKENS} are needed: raise max_tokens or shorten the prompt."
        )
    if not 0 <= overlap_tokens < max_tokens / 2:
        raise ConfigError(
            f"overlap_tokens ({overlap_tokens:,}) must be at least 0 and less than half of "
            f"max_tokens ({max_tokens:,}): lower it, or raise max_tokens."
        )
    return _Limits(
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        num_special=num_special,
        overlap_tokens=overlap_tokens,
        prompt=prompt,
        room=room,
    )


def _tokenize_whole(documents: pa.Table, limits: _Limits) -> pa.Table:
    """Return the documents that fit as pieces; the others are missing from the result."""
    titles = documents["title"].fill_null("")
    stands_alone = pc.or_(pc.equal(titles, ""), pc.equal(documents["text"], ""))
    prefixes = pc.if_else(stands_alone, titles, _join(titles, " "))
    inputs = _join(limits.prompt, prefixes, documents["text"])
    max_chars = limits.max_tokens * _LONG_CHARS_PER_TOKEN
    rows = np.flatnonzero(pc.less_equal(pc.utf8_length(inputs), max_chars))
    ends = pc.utf8_length(documents["text"].take(rows)).to_numpy()
    pieces = _pieces(rows, np.zeros_like(ends), ends, inputs.take(rows).to_pylist(), limits)
    # At the tokenizer's own limit a text is either exact or truncated: splitting finds out.
    longest = min(limits.max_tokens, limits.tokenizer.max_tokens - 1)
    return pieces.filter(pc.less_equal(pc.list_value_length(pieces["token_ids"]), longest))


def _tokenize_split(documents: pa.Table, rows: np.ndarray, limits: _Limits) -> Iterator[pa.Table]:
    """Yield the pieces of the documents in ``rows``, in no order; none is longer than the limit."""
    texts = splittable_texts(documents["text"].take(rows).to_pylist(), limits.tokenizer.backend)
    titles = [_title_prefix(t, limits) for t in documents["title"].take(rows).to_pylist()]
    pending = [
        (i, *span)
        for i, title_tokens in enumerate(_count_tokens(titles, limits))
        for span in _plan(texts[i], limits.room - title_tokens, limits.overlap_tokens)
    ]
    while pending:
        inputs = [limits.prompt + titles[i] + texts[i].text[start:end] for i, start, end in pending]
        numbers, starts, ends = np.array(pending).T
        pieces = _pieces(rows[numbers], starts, ends, inputs, limits)
        # One character that takes more than the whole room stays truncated: nothing left to cut.
        is_done = ~_is_too_long(pieces, inputs, limits) | (ends - starts <= 1)
        yield pieces.filter(pa.array(is_done))
        failed = [pending[n] for n in np.flatnonzero(~is_done)]
        pending = [(i, *half) for i, start, end in failed for half in texts[i].halves(start, end)]


def _plan(text: SplittableText, capacity: int, overlap: int) -> list[Span]:
    if len(text.token_starts) <= capacity + _MERGED_TOKENS:
        return [(0, len(text.text))]
    return list(text.spans(max(capacity - _SLACK_TOKENS, 1), overlap)) or [(0, 0)]


def _title_prefix(title: str | None, limits: _Limits) -> str:
    """Return the title as it stands before a passage, cut at half of the room."""
    if not title:
        return ""
    max_tokens = limits.room // 2
    head = title[: max_tokens * _MAX_CHARS_PER_TOKEN]
    offsets = limits.tokenizer.backend.encode(head, add_special_tokens=False).offsets
    if len(offsets) > max_tokens:
        head = head[: offsets[max_tokens][0]]
    return head + " "


def _count_tokens(texts: Sequence[str], limits: _Limits) -> list[int]:
    backend = limits.tokenizer.backend
    return [len(e) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _is_too_long(pieces: pa.Table, inputs: Sequence[str], limits: _Limits) -> np.ndarray:
    lengths = pc.list_value_length(pieces["token_ids"]).to_numpy()
    too_long: np.ndarray = lengths > limits.max_tokens
    maybe_truncated = np.flatnonzero((lengths == limits.tokenizer.max_tokens) & ~too_long)
    counts = _count_tokens([inputs[i] for i in maybe_truncated.tolist()], limits)
    too_long[maybe_truncated] = np.array(counts) > limits.max_tokens - limits.num_special
    return too_long


def _pieces(
    documents: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    inputs: Sequence[str],
    limits: _Limits,
) -> pa.Table:
    """Tokenize ``inputs`` and lay the ids beside the document number and the span of each."""
    batches = [limits.tokenizer.encode(call) for call in _calls(inputs)]
    lengths = np.concatenate([np.zeros(1, np.int64), *(b.lengths for b in batches)])
    ids = np.concatenate([np.empty(0, np.int32), *(b.ids for b in batches)])
    return pa.table(
        {
            "document": documents,
            "start_char": starts.astype(np.int32),
            "end_char": ends.astype(np.int32),
            "token_ids": pa.LargeListArray.from_arrays(np.cumsum(lengths), ids),
        }
    )


def _calls(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the texts in runs of at most `_CALL_CHARS` characters."""
    start = chars = 0
    for i, text in enumerate(texts):
        if chars and chars + len(text) > _CALL_CHARS:
            yield texts[start:i]
            start, chars = i, 0
        chars += len(text)
    if start < len(texts):
        yield texts[start:]


def _passage_table(documents: pa.Table, pieces: pa.Table) -> pa.Table:
    """Join the pieces, ordered by document and start, with the columns of their documents."""
    hashes = content_hashes(documents["title"], documents["text"])
    rows = documents.drop_columns(["title", "text"])
    rows = rows.append_column("content_hash", pa.chunked_array([hashes]))
    if len(pieces) != len(documents):
        rows = rows.take(pieces["document"])
    object_uri, row, doc_id, *kept, content_hash = rows.columns
    index = _passage_indexes(pieces["document"].to_numpy())
    columns = [
        object_uri,
        row,
        doc_id,
        _join(doc_id, "#", index.cast(pa.large_string())),
        index,
        pieces["start_char"],
        pieces["end_char"],
        pc.list_value_length(pieces["token_ids"]).cast(pa.int32()),
        content_hash,
        pieces["token_ids"],
        *kept,
    ]
    kept_fields = list(documents.schema)[len(schema.DOCUMENTS) :]
    target = pa.schema([*schema.PASSAGES, *kept_fields])
    return pa.Table.from_arrays(columns, schema=target).combine_chunks()


def _passage_indexes(documents: np.ndarray) -> pa.Array:
    """Return 0, 1, 2, ... for the pieces of each document."""
    positions = np.arange(len(documents))
    is_first = np.ones(len(documents), bool)
    is_first[1:] = documents[1:] != documents[:-1]
    firsts = np.maximum.accumulate(np.where(is_first, positions, 0))
    return pa.array((positions - firsts).astype(np.int32))
