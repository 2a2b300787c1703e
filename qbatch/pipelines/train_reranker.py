"""The job that trains a reranker."""

from dataclasses import dataclass
from typing import Any

from qbatch.pipelines.training_config import TrainingConfig
from qbatch.pipelines.training_run import run_training
from qbatch.training.losses import RerankLoss
from qbatch.training.reranking import RerankingSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRerankerConfig(TrainingConfig):
    """Train a reranker on pairs, from a causal language model."""

    loss: RerankLoss = "pointwise"
    """pointwise is the report's: next-token cross-entropy of yes or no over the whole vocabulary,
    which also teaches a base model to answer at all; pointwise-two-way compares yes and no alone;
    listwise compares a query's positive with its negatives."""

    def settings(self) -> RerankingSettings:
        """Return what the reranker is trained for."""
        return RerankingSettings(loss=self.loss)


def train_reranker(config: TrainRerankerConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    return run_training(config, config.settings())
