"""What a training would do and take, from a sample of its pairs; nothing is started."""

import logging
from typing import Any

import numpy as np

from qbatch.models.devices import resolve_device, resolve_dtype
from qbatch.pipelines.embed_estimate import token_histogram
from qbatch.pipelines.training_config import TrainingConfig
from qbatch.training.loop import PlannedStage, Settings, plan_stages
from qbatch.training.model_files import count_parameters

log = logging.getLogger(__name__)

_SAMPLE_ROWS = 256

_BYTES_PER_TRAINED = 16
"""Weight, gradient and two moments in float32; a frozen weight takes 4."""


def estimate_training(config: TrainingConfig, settings: Settings) -> dict[str, Any]:
    """Return stages, steps, tokens and the memory of weights and optimizer."""
    num_workers = config.num_workers or 1
    task = config.task(resolve_dtype(config.dtype, resolve_device()), None)
    stages = plan_stages(task.stages, num_workers)
    num_parameters, num_trained = count_parameters(task.start, settings.kind, task.lora)
    state_bytes = num_trained * _BYTES_PER_TRAINED + (num_parameters - num_trained) * 4
    shares = num_workers if config.sharding == "fsdp" else 1
    sampled = [_sample_lengths(planned, config, settings) for planned in stages]
    described = [
        _describe(planned, lengths) for planned, lengths in zip(stages, sampled, strict=True)
    ]
    tokens = sum(stage["tokens_estimated"] for stage in described)
    log.info(
        "dry run: %d steps, about %s tokens, %s of %s parameters trained",
        *(sum(planned.num_steps for planned in stages), f"{tokens:,}"),
        *(f"{num_trained:,}", f"{num_parameters:,}"),
    )
    return {
        "dry_run": True,
        "workers": num_workers,
        "parameters": num_parameters,
        "trained_parameters": num_trained,
        "state_gib_per_worker": round(state_bytes / shares / 2**30, 3),
        "steps": sum(planned.num_steps for planned in stages),
        "tokens_estimated": tokens,
        "token_histogram": token_histogram(np.concatenate(sampled)),
        "stages": described,
    }


def _sample_lengths(
    planned: PlannedStage, config: TrainingConfig, settings: Settings
) -> np.ndarray:
    """Return the tokens of each text of some rows, spread over the table."""
    task = config.task("float32", None)
    count = min(_SAMPLE_ROWS, len(planned.table))
    rows = np.linspace(0, len(planned.table) - 1, count).astype(np.int64)
    return settings.text_lengths(
        task, planned.table.take(rows), num_negatives=planned.stage.num_negatives
    )


def _describe(planned: PlannedStage, lengths: np.ndarray) -> dict[str, Any]:
    num_rows = min(_SAMPLE_ROWS, len(planned.table))
    per_step = float(lengths.sum()) / num_rows * planned.stage.batch_size
    return {
        "pairs": planned.stage.pairs,
        "rows": len(planned.table),
        "tasks": planned.table.num_tasks,
        "steps": planned.num_steps,
        "tokens_per_step": int(per_step),
        "tokens_estimated": int(per_step * planned.num_steps),
    }
