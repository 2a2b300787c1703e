"""The job that trains an embedder."""

from dataclasses import dataclass
from typing import Any

from qbatch.cli import FloatList, IntList
from qbatch.pipelines.training_config import TrainingConfig
from qbatch.pipelines.training_run import run_training
from qbatch.training.embedding import EmbeddingSettings
from qbatch.training.losses import ContrastiveConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainEmbedderConfig(TrainingConfig):
    """Train an embedder on pairs, with the contrastive loss of the Qwen3 Embedding report."""

    temperature: float = 0.02
    """Divides cosines; the report does not tell its own, fine-tuning guides use 0.01 to 0.1."""
    margin: float = 0.1
    """Candidates closer than the positive by more than this are taken for false negatives."""
    mask_documents: bool = False
    """The margin also holds between documents; the report defines it for queries only."""
    other_negatives: bool = True
    """The hard negatives of other pairs are candidates, too."""
    dims: IntList = ()
    """Matryoshka widths trained together, the full one among them; empty is the full width."""
    dim_weights: FloatList = ()
    """Weight of each width's loss; empty is 1 each."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        self.settings()

    def settings(self) -> EmbeddingSettings:
        """Return what the embedder is trained for."""
        loss = ContrastiveConfig(
            temperature=self.temperature,
            margin=self.margin,
            mask_documents=self.mask_documents,
            other_negatives=self.other_negatives,
            dims=self.dims,
            dim_weights=self.dim_weights,
        )
        return EmbeddingSettings(loss=loss)


def train_embedder(config: TrainEmbedderConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    return run_training(config, config.settings())
