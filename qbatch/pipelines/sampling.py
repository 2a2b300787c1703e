"""Looking at a little of a stream."""

import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def sample_evenly(items: Iterable[T], size: int, seed: int = 0) -> list[T]:
    """Return up to ``size`` items, each equally likely, in stream order.

    Reservoir sampling (Vitter's algorithm R): the stream is read once and never held.
    """
    rng = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for i, item in enumerate(items):
        if i < size:
            kept.append((i, item))
        elif (slot := rng.randrange(i + 1)) < size:
            kept[slot] = (i, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]
