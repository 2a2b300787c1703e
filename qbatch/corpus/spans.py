"""Spans of input objects, and the units of work that hold them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix
from typing import Literal

SpanKind = Literal["whole", "bytes", "rows"]


@dataclass(frozen=True, slots=True)
class Span:
    """A part of one version of one input object."""

    uri: str
    size: int
    """Of the whole object, in bytes; rows for a Hugging Face dataset."""
    version: str
    kind: SpanKind = "whole"
    row_group: int = -1
    """Rows: the Parquet row group from whose first row ``start`` counts; -1: the first of all."""
    start: int = 0
    """First byte or row; a line belongs to the span that holds its first byte."""
    stop: int = -1
    """One past the last byte or row, possibly in a later row group; -1: the end of the object."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Spans that are read, embedded and written together: the grain of resuming."""

    spans: tuple[Span, ...]

    def to_json(self) -> str:
        """Return compact canonical JSON: equal units give equal text."""
        base = commonprefix([span.uri for span in self.spans])  # noqa: RUF071  # of characters
        spans = [_span_values(span, len(base)) for span in self.spans]
        return json.dumps({"base": base, "spans": spans}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        """Return the unit that ``to_json`` wrote."""
        plan = json.loads(text)
        return cls(tuple(Span(plan["base"] + uri, *rest) for uri, *rest in plan["spans"]))

    def key(self, fingerprint: str) -> str:
        """Return the name of this unit's output under a fingerprint: 32 hex digits."""
        return hashlib.sha256(f"{self.to_json()}\n{fingerprint}".encode()).hexdigest()[:32]


def _span_values(span: Span, base_length: int) -> list[str | int]:
    values: list[str | int] = [span.uri[base_length:], span.size, span.version]
    if span.kind != "whole":
        values += [span.kind, span.row_group, span.start, span.stop]
    return values


def even_ranges(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of equal ranges, none larger than ``size``, that cover ``total``."""
    num_ranges = max(1, -(-total // size))
    for i in range(num_ranges):
        yield total * i // num_ranges, total * (i + 1) // num_ranges
