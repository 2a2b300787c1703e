"""The plan: a stream of units that covers the corpus exactly once.

Planning holds neither the listing nor the plan. Large objects are cut; small ones are grouped with
borders that depend on names and sizes only, so that a changed object dirties its own group.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.cutting import cut_object
from qbatch.corpus.huggingface import plan_dataset
from qbatch.corpus.listing import iter_corpus_objects, resolve_config
from qbatch.corpus.spans import Span, Unit
from qbatch.storage import ObjectInfo

__all__ = ["Span", "Unit", "plan_objects", "plan_units"]

_OBJECT_OVERHEAD_BYTES = 16 * 2**10
"""What opening an object costs, as bytes read in the same time: empty objects also fill units."""

_MAX_UNIT_OBJECTS = 4096
_MAX_UNIT_SIZES = 4

_CUTTING_THREADS = 8
_LOOKAHEAD = 64
"""Results waiting for an earlier one; bounds the memory of a plan."""


def plan_units(config: CorpusConfig) -> Iterator[Unit]:
    """Yield units that cover the corpus once, in an order that depends on the listing only.

    Raises:
        NoInputError: Nothing of a known format lies at ``config.input``.
        ConfigError: The URI or the split of a dataset is wrong.
    """
    config = resolve_config(config)
    if config.format == "hf":
        return plan_dataset(config)
    return plan_objects(iter_corpus_objects(config), config)


def plan_objects(objects: Iterable[ObjectInfo], config: CorpusConfig) -> Iterator[Unit]:
    """Yield the units of a stream of objects; it is consumed as units are taken."""
    with ThreadPoolExecutor(_CUTTING_THREADS, thread_name_prefix="cut") as pool:
        group = _Group(config.unit_bytes)
        pending: deque[Future[list[Unit]] | list[Unit]] = deque()
        for info in objects:
            if info.size > config.unit_bytes:
                pending.append(pool.submit(cut_object, info, config))
            else:
                pending.extend([unit] for unit in group.add(info))
            while len(pending) > _LOOKAHEAD:
                yield from _units(pending.popleft())
        pending.extend([unit] for unit in group.flush())
        for item in pending:
            yield from _units(item)


def _units(item: Future[list[Unit]] | list[Unit]) -> list[Unit]:
    return item.result() if isinstance(item, Future) else item


class _Group:
    """Small objects on their way into one unit.

    A border follows an object when the hash of its name falls into a part of the hash range as
    large as the object's part of a unit: units have about the configured size, and every border
    is a matter of one object alone. Only the caps look at neighbours.
    """

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._spans: list[Span] = []
        self._num_bytes = 0

    def add(self, info: ObjectInfo) -> Iterator[Unit]:
        """Take in an object; yield the units that are complete with it."""
        if self._num_bytes + info.size > _MAX_UNIT_SIZES * self._unit_bytes:
            yield from self.flush()
        self._spans.append(Span(info.uri, info.size, info.version))
        self._num_bytes += info.size
        digest = hashlib.blake2b(info.path.encode(), digest_size=8).digest()
        threshold = (info.size + _OBJECT_OVERHEAD_BYTES) / self._unit_bytes
        if int.from_bytes(digest) < threshold * 2**64 or len(self._spans) == _MAX_UNIT_OBJECTS:
            yield from self.flush()

    def flush(self) -> Iterator[Unit]:
        """Yield what was taken in as a unit, if anything was."""
        if self._spans:
            yield Unit(tuple(self._spans))
            self._spans, self._num_bytes = [], 0
