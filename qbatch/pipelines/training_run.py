"""A training run on Ray Train: plan it, start the workers, return the summary."""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from inspect import getfile
from typing import Any

from huggingface_hub import save_torch_state_dict
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from qbatch.errors import QbatchError
from qbatch.manifest import fingerprint_id
from qbatch.pipelines.cluster import KEEP_FREED_MEMORY, cluster_resources, ray_session
from qbatch.pipelines.compute_dtype import compute_dtype
from qbatch.pipelines.training_config import TrainingConfig, training_fingerprint
from qbatch.pipelines.training_estimate import estimate_training
from qbatch.report.writing import write_page
from qbatch.schema import ComputeDtype
from qbatch.storage import Storage, probe
from qbatch.training.checkpoints import refuse_other_runs
from qbatch.training.loop import PlannedStage, Settings, plan_stages, train
from qbatch.training.publishing import read_complete
from qbatch.training.task import TrainTask

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """How many processes train, and what each of them has."""

    number: int
    has_gpus: bool
    cpus: int
    dtype: ComputeDtype


def run_training(config: TrainingConfig, settings: Settings) -> dict[str, Any]:
    """Train, or go on with a training that was killed, and return the summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    if config.dry_run:
        return estimate_training(config, settings)
    storage = Storage(config.output, single_writer=config.single_writer)
    probe(storage)
    with ray_session(stall_timeout_s=config.stall_timeout_s, with_dashboard=True):
        workers = _plan_workers(config)
        task = config.task(workers.dtype, workers.cpus)
        stages = plan_stages(task.stages, workers.number)
        task = replace(task, fingerprint=_fingerprint(task, settings, stages))
        refuse_other_runs(storage, task.fingerprint)
        if read_complete(storage) is not None:
            log.info("nothing to do: %s is finished", storage.uri)
        else:
            _log_plan(stages, workers)
            _run_workers(config, task, settings, workers)
    report: dict[str, Any] = json.loads(storage.read("report.json"))
    write_page(storage, "model", report)
    return {key: value for key, value in report.items() if key != "curve"}


def _plan_workers(config: TrainingConfig) -> Workers:
    resources = cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    number = config.num_workers or max(1, num_gpus)
    has_gpus = num_gpus >= number
    return Workers(
        number=number,
        has_gpus=has_gpus,
        cpus=max(1, num_cpus // number),
        dtype=compute_dtype(config.dtype, float(has_gpus)),
    )


def _fingerprint(task: TrainTask, settings: Settings, stages: list[PlannedStage]) -> str:
    objective = {"kind": settings.kind, **asdict(settings)}  # type: ignore[call-overload]  # all are dataclasses
    files = [planned.table.files for planned in stages]
    return fingerprint_id(training_fingerprint(task, objective, files))


def _log_plan(stages: list[PlannedStage], workers: Workers) -> None:
    for planned in stages:
        log.info(
            "stage %d: %s pairs of %d tasks, %d epochs, %d steps of %d pairs: %s",
            planned.number + 1, f"{len(planned.table):,}", planned.table.num_tasks,
            planned.stage.epochs, planned.num_steps, planned.stage.batch_size, planned.stage.pairs,
        )  # fmt: skip
    log.info("%d workers in %s", workers.number, workers.dtype)


def _run_workers(
    config: TrainingConfig, task: TrainTask, settings: Settings, workers: Workers
) -> None:
    """Run the loop on Ray Train; what it reports and stores is the loop's own business."""
    resources = {"CPU": workers.cpus, **({"GPU": 1} if workers.has_gpus else {})}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"task": task, "settings": settings},
            torch_config=TorchConfig(timeout_s=max(1, int(config.stall_timeout_s))),
            scaling_config=ScalingConfig(
                num_workers=workers.number,
                use_gpu=workers.has_gpus,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=config.max_failures),
                worker_runtime_env=KEEP_FREED_MEMORY,  # type: ignore[call-arg]  # of Train V2
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _own_error(error, config) from error


def _train_worker(config: Mapping[str, Any]) -> None:
    logging.getLogger("qbatch").setLevel(logging.INFO)
    # A line for every file written; huggingface_hub names this logger by its file.
    logging.getLogger(getfile(save_torch_state_dict)).setLevel(logging.WARNING)
    train(config["task"], config["settings"])


def _own_error(error: TrainingFailedError, config: TrainingConfig) -> QbatchError:
    """Return the error that a worker raised on purpose, or one that says what to do."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        for cause in (failure, failure.__cause__, getattr(failure, "cause", None)):
            if isinstance(cause, QbatchError):
                return cause
    return QbatchError(
        f"training failed {config.max_failures + 1} times: {error}. Its last resume point is kept; "
        "lower --token-budget if memory ran out, then run the job again to go on"
    )
