"""Stages for tests that die and hang on purpose; workers import them."""

import json
import os
import time

import pyarrow as pa

from qbatch.pipelines.trial import CarefulActor, Trial

UNIT_ROWS, GROUP_ROWS = 8, 4
KILLS, HANGS, KILLS_READER = -1, -2, -3


def read(batch: pa.Table) -> pa.Table:
    """Here a row of the plan holds its numbers already; one of them may kill it."""
    if KILLS_READER in json.loads(batch["spans"][0].as_py()):
        os._exit(1)
    return batch


def read_carefully(batch: pa.Table, trial: Trial) -> pa.Table:
    numbers = json.loads(batch["spans"][0].as_py())
    killers = trial.killers([[i] for i in range(len(numbers))], lambda rows: touch(numbers, rows))
    left = [number for i, number in enumerate(numbers) if i not in killers]
    return batch.set_column(1, "spans", [[json.dumps(left)]])


def touch(numbers: list[int], rows: list[int]) -> list[int]:
    for row in rows:
        if numbers[row] in (KILLS, KILLS_READER):
            os._exit(1)
        if numbers[row] == HANGS:
            time.sleep(600)
    return [2 * numbers[row] for row in rows]


class Doubler(CarefulActor):
    def __call__(self, batch: pa.Table) -> pa.Table:
        return self._double(batch, [])

    def careful(self, batch: pa.Table, trial: Trial) -> pa.Table:
        numbers = json.loads(batch["spans"][0].as_py())
        groups = [range(i, i + GROUP_ROWS) for i in range(0, len(numbers), GROUP_ROWS)]
        return self._double(batch, trial.killers(groups, lambda rows: touch(numbers, rows)))

    def _double(self, batch: pa.Table, killers: list[int]) -> pa.Table:
        numbers = json.loads(batch["spans"][0].as_py())
        self.on_pack()
        left = [row for row in range(len(numbers)) if row not in killers]
        made = {"unit_key": batch["unit_key"], "doubled": [touch(numbers, left)]}
        return pa.table({**made, "killers": pa.array([killers], pa.list_(pa.int64()))})


class Mortal(Doubler):
    """Whatever is left out, it dies."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        os._exit(1)

    def careful(self, batch: pa.Table, trial: Trial) -> pa.Table:
        os._exit(1)


def write(batch: pa.Table) -> pa.Table:
    return batch
