"""Work that kills its process is put off and tried apart, instead of for ever.

A process that dies tells nobody why. So a record outside of it holds what each process is at. A
unit that is begun again, and whose process has not begun another since, killed that process, or was
in it by bad luck. It is put off, so that the rest of its Ray block goes on, and made at the end,
alone and with care (see trial).
"""

import faulthandler
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from qbatch.errors import QbatchError
from qbatch.pipelines.trial import Trial

log = logging.getLogger(__name__)

_MOST_DEATHS = 20
"""Over one unit. Then the machine or the model is at fault, and not a few rows."""

_STDERR, _DEVICE_ERROR_EXIT = 2, 70


class DeathRecord:
    """What every process is at, and over which parts of units processes died."""

    def __init__(self) -> None:
        self._open: dict[str, str] = {}
        """By unit that a process is at: the part of it."""
        self._last: dict[str, str] = {}
        """By process: the unit that it began last."""
        self._deaths: dict[str, Counter[str]] = {}
        self._put_off: set[str] = set()

    def begin(self, process: str, unit: str) -> dict[str, int]:
        """Note that a unit is begun; return how many processes died over each part of it.

        The process lives, so it was no death that ended its unit before.
        """
        self._open.pop(self._last.get(process, ""), None)
        if unit in self._open:
            self._deaths.setdefault(unit, Counter())[self._open[unit]] += 1
        self._open[unit] = ""
        self._last[process] = unit
        return dict(self._deaths.get(unit, {}))

    def enter(self, unit: str, part: str) -> None:
        """Note that a part of a begun unit is computed now, and alone."""
        self._open[unit] = part

    def put_off(self, unit: str, unit_key: str) -> None:
        """Note that a unit was left out for now."""
        self._open.pop(unit, None)
        self._put_off.add(unit_key)

    def all_put_off(self) -> list[str]:
        """Return the keys of the units left out so far."""
        return sorted(self._put_off)


def start_record() -> ActorHandle[Any]:
    """Return a handle on a record of its own process, which ends with the job."""
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(DeathRecord)
    record: ActorHandle[Any] = actor.remote()
    return record


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """Stands around one stage in every process that runs it."""

    record: ActorHandle[Any]
    """Of a DeathRecord."""
    stage: str
    is_last_try: bool
    """Units are not put off any more."""
    silence_s: float | None = None
    """The process is ended when it does not ``beat`` for so long; None for never."""

    def run(
        self,
        batch: pa.Table,
        plain: Callable[[pa.Table], pa.Table],
        careful: Callable[[pa.Table, Trial], pa.Table] | None,
    ) -> pa.Table:
        """Return what the stage makes of a unit; no row if the unit is put off.

        Raises:
            QbatchError: Processes died over the unit again and again, whatever was left out.
        """
        if not len(batch):  # of a block whose units were all put off
            return batch
        unit_key = batch["unit_key"][0].as_py()
        unit = f"{self.stage} {unit_key}"
        begun: Any = self.record.begin.remote(_own_process(), unit)
        deaths: dict[str, int] = ray.get(begun)
        if deaths and not self.is_last_try:
            log.warning("a process died over unit %s (%s); it is put off", unit_key, self.stage)
            ray.get(self.record.put_off.remote(unit, unit_key))
            return batch.slice(0, 0)
        if sum(deaths.values()) >= _MOST_DEATHS:
            raise QbatchError(
                f"{_MOST_DEATHS} processes died over unit {unit_key} ({self.stage}), whichever of "
                "its rows were left out. Finished units are kept; look into the log for the "
                "reason, give actors more memory or a smaller --token-budget, and run again"
            )
        with self._watched():
            if deaths and careful is not None:
                return careful(batch, Trial(deaths, partial(self._enter, unit)))
            return plain(batch)

    def _enter(self, unit: str, part: str) -> None:
        ray.get(self.record.enter.remote(unit, part))
        self.beat()

    def beat(self) -> None:
        """Say that something moves."""
        if self.silence_s is not None:
            # Of sys.stderr, which is Ray's, there is no descriptor.
            faulthandler.dump_traceback_later(self.silence_s, exit=True, file=_STDERR)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self.beat()
        try:
            yield
        except Exception as error:
            # torch.AcceleratorError, by name since stages without torch come by here: a device that
            # has failed once fails for the life of its process.
            if type(error).__name__ == "AcceleratorError":
                log.exception("the device failed; another process takes over")
                os._exit(_DEVICE_ERROR_EXIT)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()


@cache
def _own_process() -> str:
    return str(ray.get_runtime_context().get_worker_id())
