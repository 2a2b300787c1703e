"""A unit over which a process died, tried again: in parts, and deadly parts row by row."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import pyarrow as pa

_LONE_DEATHS = 2
"""Over a row alone; a single process may have died of something else, such as a lost node."""


class Trial:
    """What is known of the deaths over a unit, and a way to find the rows behind them."""

    def __init__(self, deaths: Mapping[str, int], enter: Callable[[str], None]) -> None:
        """Wire up the parts.

        Args:
            deaths: By part: how many processes died over it.
            enter: Told of each part before it is computed.
        """
        self._deaths, self._enter = deaths, enter

    def killers(
        self,
        groups: Iterable[Sequence[int]],
        probe: Callable[[list[int]], object],
        content: Callable[[int], Hashable] = lambda row: row,
    ) -> list[int]:
        """Return the rows that kill their process; all others are probed without harm.

        A group that killed is probed row by row, and a row that killed twice while it was alone is
        not probed any more, nor are later rows with the same content.

        Args:
            groups: Rows that are cheap to compute together, the same groups in every trial.
            probe: Computes some rows.
            content: Of a row; equal contents are equally deadly.
        """
        found: list[int] = []
        deadly: set[Hashable] = set()
        for group in groups:
            alone = self._deaths.get(_part_name(group), 0) > 0
            for part in [[row] for row in group] if alone else [group]:
                name = _part_name(part)
                if len(part) == 1 and self._deaths.get(name, 0) >= _LONE_DEATHS:
                    deadly.add(content(part[0]))
                rows = [row for row in part if content(row) not in deadly]
                found += [row for row in part if content(row) in deadly]
                if rows:
                    self._enter(name)
                    probe(rows)
        self._enter("what is left")
        return found


def _part_name(rows: Sequence[int]) -> str:
    return f"{len(rows)} rows from {rows[0]}"


class CarefulActor(ABC):
    """An actor of a pool that says when it moves, and can leave out rows that kill it."""

    on_pack: Callable[[], None] = staticmethod(lambda: None)
    """To be called before each forward pass, which is what may hang."""

    @abstractmethod
    def __call__(self, batch: pa.Table) -> pa.Table:
        """Compute one unit."""

    @abstractmethod
    def careful(self, batch: pa.Table, trial: Trial) -> pa.Table:
        """Compute one unit without the rows that kill the process."""
