"""What the training loop needs of a thing to train for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch

BatchT = TypeVar("BatchT")


class Objective(Protocol[BatchT]):
    """Reads batches, takes their gradients, and writes the finished model."""

    @property
    def network(self) -> torch.nn.Module:
        """The module that is trained, on its device."""

    def read(
        self, rows: pa.Table, numbers: np.ndarray, *, num_negatives: int, seed: Sequence[int]
    ) -> BatchT:
        """Return a batch ready for ``backward``.

        Args:
            rows: TRAINING_PAIRS, this process's part of the global batch.
            numbers: Of each row in its table.
            num_negatives: Most hard negatives of a row.
            seed: Of the epoch.
        """

    def backward(self, network: torch.nn.Module, batch: BatchT, *, equal_passes: bool) -> float:
        """Add the gradient of the global batch's mean loss to the parameters, and return the loss.

        Args:
            network: ``self.network``, or its wrapper for several processes.
            batch: What ``read`` returned; all processes have as many rows.
            equal_passes: All processes must pass through the network equally often.
        """

    def save(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write a model directory that our jobs load.

        Args:
            folder: Empty.
            state: Weights of ``network`` by name, on the CPU, without adapters.
        """
