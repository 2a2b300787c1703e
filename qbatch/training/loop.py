"""The training loop, the same for every objective, in one process or many.

All that chance decides follows from the seed and the number of the step, so a run that was killed
and goes on from its last resume point ends with the very weights of one that was not.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch

from qbatch.errors import ConfigError, QualityGateError, StorageError
from qbatch.models.devices import resolve_device
from qbatch.storage import Storage
from qbatch.training.checkpoints import (
    History,
    complete_steps,
    model_state,
    read_resume_point,
    restore_optimizer,
    restore_weights,
    step_directory,
    training_state,
    write_resume_point,
)
from qbatch.training.model_files import starting_model
from qbatch.training.networks import without_adapters, wrap
from qbatch.training.objective import Objective
from qbatch.training.optimization import clip_gradients, learning_rate_factor, make_optimizer
from qbatch.training.pairs import PairTable, plan_batches
from qbatch.training.publishing import (
    delete_directory,
    publish_directory,
    read_complete,
    workspace,
)
from qbatch.training.task import ModelKind, Stage, TrainTask
from qbatch.training.world import World

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0

_CURVE_POINTS = 1000
"""Most points of the loss curve in a report; longer curves are averaged down to that."""

T = TypeVar("T")


class Settings(Protocol):
    """What is trained for, before there is a model."""

    @property
    def kind(self) -> ModelKind:
        """What the result is."""

    def build(self, path: Path, task: TrainTask, device: torch.device) -> Objective[Any]:
        """Load the model in ``path`` onto ``device``."""

    def text_lengths(self, task: TrainTask, rows: pa.Table, *, num_negatives: int) -> np.ndarray:
        """Return the tokens of each text that rows of TRAINING_PAIRS make; loads no weights."""


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with its data and its place among all steps."""

    number: int
    stage: Stage
    table: PairTable
    first_step: int
    """Of all steps."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; rows that fill none are left out."""
        return len(self.table) // self.stage.batch_size

    @property
    def num_steps(self) -> int:
        """Of all epochs."""
        return self.steps_per_epoch * self.stage.epochs


def plan_stages(stages: Sequence[Stage], num_processes: int) -> list[PlannedStage]:
    """Open the data of all stages and number their steps.

    Raises:
        ConfigError: A batch cannot be filled, or not be divided among the processes.
        NoInputError: A stage has no data.
    """
    planned: list[PlannedStage] = []
    first_step = 0
    for number, stage in enumerate(stages):
        table = PairTable.open(stage.pairs)
        if stage.batch_size % num_processes or stage.batch_size > len(table):
            raise ConfigError(
                f"batch_size {stage.batch_size} does not fit {len(table)} pairs in {stage.pairs} "
                f"and {num_processes} workers; give a multiple of the workers, at most the pairs"
            )
        planned.append(PlannedStage(number, stage, table, first_step))
        first_step += planned[-1].num_steps
    return planned


def train(task: TrainTask, settings: Settings) -> None:
    """Train through all stages and publish the model; every process of the world calls this.

    The output then holds the model directory, ``checkpoints/`` and ``report.json``.

    Raises:
        QbatchError: The model or the data are unusable, or training diverged.
    """
    if task.compute.num_threads is not None:
        torch.set_num_threads(task.compute.num_threads)
    world, device = World.current(), resolve_device()
    stages = plan_stages(task.stages, world.size)
    with tempfile.TemporaryDirectory() as scratch:
        path = starting_model(task.start, settings.kind, Path(scratch))
        torch.manual_seed(task.seed)  # adapters begin at random
        _Run(task, settings.build(path, task, device), stages, world, device).finish()


class _Run:
    """A training run in this process."""

    def __init__(
        self,
        task: TrainTask,
        objective: Objective[Any],
        stages: list[PlannedStage],
        world: World,
        device: torch.device,
    ) -> None:
        self._task = task
        self._objective = objective
        self._stages = stages
        self._world = world
        self._device = device
        self._storage = Storage(task.output, single_writer=task.single_writer)
        self._network = wrap(objective.network, task.compute.sharding, world)
        self._history = History()
        self._started = self._last_line = time.monotonic()
        self._first_step = 0

    @property
    def _num_steps(self) -> int:
        return sum(stage.num_steps for stage in self._stages)

    def finish(self) -> None:
        """Do the steps that are missing, then publish the model."""
        self._first_step = self._resume_step()
        state: dict[str, torch.Tensor] = {}
        if self._first_step:
            state, self._history = read_resume_point(self._storage, self._first_step)
            restore_weights(self._network, state)
            log.info("going on after step %d", self._first_step)
        for planned in self._stages:
            optimizer = make_optimizer(self._network, self._task.optimization)
            done = self._first_step - planned.first_step
            if 0 < done < planned.num_steps:
                restore_optimizer(self._network, optimizer, state)
            if done < planned.num_steps:
                self._train_stage(planned, optimizer, max(0, done))
        self._publish()

    def _resume_step(self) -> int:
        """Return the newest point that all processes see, or 0."""
        steps = complete_steps(self._storage, "resume", self._task.fingerprint)
        own = steps[-1] if steps else 0
        newest = self._world.max(own, self._device)
        if own != newest:
            raise StorageError(
                f"another worker finds a resume point at step {newest} in {self._storage.uri}, "
                f"this one at {own}; workers on several machines need an output that all can read"
            )
        return newest

    def _train_stage(
        self, planned: PlannedStage, optimizer: torch.optim.Optimizer, done: int
    ) -> None:
        """Do the steps of a stage that are not done yet."""
        for batch in _ahead(self._batches(planned, done)):
            self._step(planned, optimizer, batch)
            step = self._history.num_steps
            is_last = step == planned.first_step + planned.num_steps
            if is_last or step % self._task.checkpointing.every_steps == 0:
                self._save(optimizer)

    def _batches(self, planned: PlannedStage, first: int) -> Iterator[Any]:
        """Yield this process's part of each batch from step ``first`` of the stage on."""
        stage, per_epoch = planned.stage, planned.steps_per_epoch
        for epoch in range(first // per_epoch, stage.epochs):
            seed = [self._task.seed, planned.number, epoch]
            batches = plan_batches(planned.table, batch_size=stage.batch_size, seed=seed)
            for rows in islice(batches, max(0, first - epoch * per_epoch), None):
                own = rows[self._world.share(len(rows))]
                yield self._objective.read(
                    planned.table.take(own), own, num_negatives=stage.num_negatives, seed=seed
                )

    def _step(
        self,
        planned: PlannedStage,
        optimizer: torch.optim.Optimizer,
        batch: Any,  # noqa: ANN401 - the objective's own
    ) -> None:
        step = self._history.num_steps
        _seed_step([self._task.seed, step, self._world.rank])
        loss = self._objective.backward(
            self._network, batch, equal_passes=self._task.compute.sharding == "fsdp"
        )
        norm = clip_gradients(self._network, self._task.optimization.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise QualityGateError(
                f"training diverged in step {step + 1}: loss {loss}, gradient norm {norm}. Lower "
                "the learning rate, or train in float32; earlier checkpoints are kept"
            )
        factor = learning_rate_factor(
            step - planned.first_step, planned.num_steps, self._task.optimization
        )
        for group in optimizer.param_groups:
            group["lr"] = factor * planned.stage.learning_rate
        optimizer.step()
        optimizer.zero_grad()
        self._history.losses.append(loss)
        self._history.grad_norms.append(norm)
        self._log(planned)

    def _log(self, planned: PlannedStage) -> None:
        now, done = time.monotonic(), self._history.num_steps
        if self._world.rank or (
            now - self._last_line < _LOG_INTERVAL_S and done not in {1, self._num_steps}
        ):
            return
        self._last_line = now
        per_step = (now - self._started) / (done - self._first_step)
        log.info(
            "step %d of %d, stage %d: loss %.4f, gradient norm %.3g, about %d s left",
            done, self._num_steps, planned.number + 1,
            self._history.losses[-1], self._history.grad_norms[-1],
            per_step * (self._num_steps - done),
        )  # fmt: skip

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint, then the resume point that says it need not be written again."""
        state = training_state(self._network, optimizer)
        num_kept = self._task.checkpointing.num_kept
        weights = model_state(self._network) if num_kept else {}
        if self._world.rank:
            return
        fingerprint = self._task.fingerprint
        if num_kept:
            self._write_model(step_directory("checkpoints", self._history.num_steps), weights)
            for step in complete_steps(self._storage, "checkpoints", fingerprint)[:-num_kept]:
                delete_directory(self._storage, step_directory("checkpoints", step))
        write_resume_point(self._storage, state, self._history, fingerprint)

    def _write_model(self, directory: str, weights: dict[str, torch.Tensor]) -> None:
        if read_complete(self._storage, directory) is not None:
            return  # written before this run was killed; the same steps give the same weights
        with workspace(self._storage) as folder:
            self._objective.save(folder, without_adapters(weights, self._task.lora))
            facts = {"fingerprint": self._task.fingerprint, "step": self._history.num_steps}
            publish_directory(folder, self._storage, directory, facts)

    def _publish(self) -> None:
        weights = model_state(self._network)
        if self._world.rank:
            return
        report = self._report()
        self._storage.write("report.json", json.dumps(report, indent=1).encode())
        self._write_model("", weights)
        for step in complete_steps(self._storage, "resume", self._task.fingerprint):
            delete_directory(self._storage, step_directory("resume", step))

    def _report(self) -> dict[str, Any]:
        losses = self._history.losses
        checkpoints = complete_steps(self._storage, "checkpoints", self._task.fingerprint)
        return {
            "output": self._storage.uri,
            "fingerprint": self._task.fingerprint,
            "steps": len(losses),
            "resumed_from_step": self._first_step,
            "workers": self._world.size,
            "loss_first": round(float(np.mean(losses[: max(1, len(losses) // 20)])), 6),
            "loss_last": round(float(np.mean(losses[-max(1, len(losses) // 20) :])), 6),
            "checkpoints": [step_directory("checkpoints", step) for step in checkpoints],
            "seconds": round(time.monotonic() - self._started, 3),
            "stages": [
                {
                    **asdict(planned.stage),
                    "rows": len(planned.table),
                    "tasks": planned.table.num_tasks,
                    "steps": planned.num_steps,
                    "rows_left_out_per_epoch": len(planned.table) % planned.stage.batch_size,
                }
                for planned in self._stages
            ],
            "curve": self._curve(),
        }

    def _curve(self) -> list[dict[str, Any]]:
        points = []
        for planned in self._stages:
            width = math.ceil(self._num_steps / _CURVE_POINTS)
            for start in range(0, planned.num_steps, width):
                stop = min(start + width, planned.num_steps)
                part = slice(planned.first_step + start, planned.first_step + stop)
                factor = learning_rate_factor(stop - 1, planned.num_steps, self._task.optimization)
                points.append(
                    {
                        "step": part.stop,
                        "stage": planned.number,
                        "loss": float(np.mean(self._history.losses[part])),
                        "grad_norm": float(np.mean(self._history.grad_norms[part])),
                        "learning_rate": factor * planned.stage.learning_rate,
                    }
                )
        return points


def _seed_step(seed: Sequence[int]) -> None:
    """Make chance, such as dropout, follow from the step, so that no state of it is stored."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items; the next one is made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
