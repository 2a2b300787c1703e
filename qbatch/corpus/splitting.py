"""Where to cut a text that is too long: borders in any script, counted in tokens.

Owns borders and character offsets; knows nothing of tables. The library semantic-text-splitter was
measured first: it takes 10 to 16 times as long as tokenizing the text once (1 MB, Qwen3 tokenizer,
512 and 8,192 tokens a passage).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import regex
from tokenizers import Tokenizer

_WINDOW_CHARS = 1 << 16
_WINDOWS_PER_CALL = 16
"""The tokenizer keeps some 150 bytes a token while it works: it must not see a large text whole."""

_GRAPHEME_LOOKBACK = 256
"""Characters after which grapheme borders are taken to be in step again."""

_PARAGRAPH_END = regex.compile(r"\n[^\S\n]*\n|\p{Zp}")
_SENTENCE_END = regex.compile(
    # Full stops also stand inside numbers and names. Looking behind keeps long runs of them linear.
    r"(?<![.!?])[.!?]++\p{M}*+[\p{Pe}\p{Pf}\"']*+(?=\s)"
    r"|[\p{Sentence_Terminal}--[.!?]]++\p{M}*+[\p{Pe}\p{Pf}\"']*+",
    regex.VERSION1,
)
_LINE_END = regex.compile(r"[\n\r\x85\p{Zl}]")
_SPACE = regex.compile(r"\s")
_LAST_SPACE = regex.compile(r"(?r)\s")
_LAST_COMMA = regex.compile(
    r"(?r)[\u060c\u3001\uff0c\uff1a\uff1b]"
)  # of scripts that need no space
_GRAPHEME = regex.compile(r"\X")
_SOLID = regex.compile(r"[^\s\x1c-\x1f]")
_LAST_SOLID = regex.compile(r"(?r)[^\s\x1c-\x1f]")

Span = tuple[int, int]
"""Start and end of a piece of text, in characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplittableText:
    """A text with every place where it may be cut."""

    text: str
    token_starts: np.ndarray
    """Character at which each token begins, rising; int32 of shape (num_tokens,)."""
    borders: tuple[list[int], ...]
    """Ends of paragraphs, of sentences and of lines, each list rising."""

    def spans(self, capacity: int, overlap: int) -> Iterator[Span]:
        """Yield spans of at most ``capacity`` tokens that together hold every non-space character.

        Args:
            capacity: Most tokens of a span, as counted in the whole text.
            overlap: Most tokens a span repeats from the one before; half of ``capacity`` at most.
        """
        start, last = self._strip(0, len(self.text))
        cut = start
        while start < last:
            cut = self._cut(start, last, capacity, after=cut)
            yield self._strip(start, cut)
            if cut >= last:
                return
            start = self._next_start(start, cut, min(overlap, capacity // 2))

    def halves(self, start: int, end: int) -> list[Span]:
        """Return two spans for one that turned out too long; a single character stays itself."""
        start, end = self._strip(start, end)
        if end - start < 2:
            return [(start, end)]
        first, last = self._tokens_before(start), self._tokens_before(end)
        limit = int(self.token_starts[(first + last) // 2]) if last > first else end
        if not start < limit < end:
            limit = (start + end) // 2
        cut = self._border(start + (limit - start) // 2, limit, after=start)
        return [self._strip(start, cut), self._strip(cut, end)]

    def _cut(self, start: int, last: int, capacity: int, *, after: int) -> int:
        """Return the best end, later than ``after``, of a span that begins at ``start``."""
        first = self._tokens_before(start)
        remaining = self._tokens_before(last) - first
        if remaining <= capacity:
            return last
        # Without this the last span could be a single word, which makes a poor vector.
        limit = min(capacity, remaining * 5 // 8)
        low = int(self.token_starts[first + limit // 2])
        high = int(self.token_starts[first + limit])
        return self._border(max(low, after), max(high, after + 1), after=after)

    def _border(self, low: int, high: int, *, after: int) -> int:
        """Return the last border in ``(low, high]`` of the best kind there.

        Where there is none, a grapheme or at worst a character ends in ``(after, high]``.
        """
        for ends in self.borders:
            i = bisect_right(ends, high)
            if i and ends[i - 1] > low:
                return ends[i - 1]
        if space := _LAST_SPACE.search(self.text, low + 1, high + 1):
            return space.start()
        if comma := _LAST_COMMA.search(self.text, low, high):
            return comma.end()
        graphemes = [p for p in self._graphemes(after, high) if after < p <= high]
        return graphemes[-1] if graphemes else high

    def _next_start(self, start: int, cut: int, overlap: int) -> int:
        """Return where the next span begins: up to ``overlap`` tokens before ``cut``."""
        if overlap:
            first = max(self._tokens_before(cut) - overlap, 0)
            earliest = max(int(self.token_starts[first]), start + 1)
            solid = _SOLID.search(self.text, self._first_border(earliest, cut), cut)
            if solid:
                return solid.start()
        solid = _SOLID.search(self.text, cut)
        return solid.start() if solid else len(self.text)

    def _first_border(self, low: int, high: int) -> int:
        """Return the first end of a sentence, line, word or grapheme in ``[low, high)``."""
        for ends in self.borders[1:]:
            i = bisect_left(ends, low)
            if i < len(ends) and ends[i] < high:
                return ends[i]
        if word := _SPACE.search(self.text, low, high):
            return word.start()
        return next((p for p in self._graphemes(0, low) if p >= low), high)

    def _tokens_before(self, char: int) -> int:
        """Return how many tokens begin before ``char``."""
        # numpy's searchsorted would copy the array to the type of a Python int in every call.
        return bisect_left(self.token_starts, char)

    def _graphemes(self, low: int, high: int) -> Iterator[int]:
        """Yield the ends of graphemes from ``low``, or from a little before ``high``."""
        anchor = max(low, high - _GRAPHEME_LOOKBACK, 0)
        # A copy, because regex looks back without limit to pair the letters of flags.
        part = self.text[anchor : high + _GRAPHEME_LOOKBACK]
        return (anchor + m.end() for m in _GRAPHEME.finditer(part))

    def _strip(self, start: int, end: int) -> Span:
        """Return the span without outer white space; ``(end, end)`` when nothing else is in it."""
        first = _SOLID.search(self.text, start, end)
        last = _LAST_SOLID.search(self.text, start, end)
        return (first.start(), last.end()) if first and last else (end, end)


def splittable_texts(texts: Sequence[str], backend: Tokenizer) -> list[SplittableText]:
    """Return the texts with their token starts and borders.

    Args:
        texts: Any length; they are tokenized in bounded windows.
        backend: Without truncation and padding.
    """
    return [
        SplittableText(text=text, token_starts=starts, borders=_borders(text))
        for text, starts in zip(texts, _token_starts(texts, backend), strict=True)
    ]


def _borders(text: str) -> tuple[list[int], ...]:
    return (
        [m.start() for m in _PARAGRAPH_END.finditer(text)],
        [m.end() for m in _SENTENCE_END.finditer(text)],
        [m.start() for m in _LINE_END.finditer(text)],
    )


def _token_starts(texts: Sequence[str], backend: Tokenizer) -> list[np.ndarray]:
    windows = [(i, *window) for i, text in enumerate(texts) for window in _windows(text)]
    parts: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in texts]
    for call in range(0, len(windows), _WINDOWS_PER_CALL):
        batch = windows[call : call + _WINDOWS_PER_CALL]
        pieces = [texts[i][start:end] for i, start, end in batch]
        for (i, start, _), encoding in zip(
            batch, backend.encode_batch(pieces, add_special_tokens=False), strict=True
        ):
            offsets = encoding.offsets
            parts[i].append(np.fromiter((o[0] for o in offsets), np.int32, len(offsets)) + start)
    # A normalizer may reorder combining marks, hence their offsets.
    return [np.maximum.accumulate(np.concatenate(part)) for part in parts]


def _windows(text: str) -> Iterator[Span]:
    """Yield spans of at most `_WINDOW_CHARS` that begin at white space where there is any."""
    start = 0
    while len(text) - start > _WINDOW_CHARS:
        end = start + _WINDOW_CHARS
        space = _LAST_SPACE.search(text, start + _WINDOW_CHARS // 2, end)
        yield start, space.start() if space else end
        start = space.start() if space else end
    yield start, len(text)
