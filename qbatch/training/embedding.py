"""Training an embedder: the contrastive loss over the global batch, gradients cached."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModel

from qbatch.errors import ConfigError
from qbatch.models.backbone import load_weights
from qbatch.models.loading import ModelSpec, load_spec
from qbatch.models.packing import gather_tokens, plan_packs
from qbatch.models.tokenization import TextTokenizer
from qbatch.training.gradient_cache import GradientCache, contrastive_gradients
from qbatch.training.losses import ContrastiveBatch, ContrastiveConfig
from qbatch.training.model_files import starting_model, stored_dtype, write_embedder
from qbatch.training.networks import TextEncoder, TextPack, add_adapters
from qbatch.training.task import ModelKind, TrainTask
from qbatch.training.tokens import EmbeddingReader, EmbeddingTokens
from qbatch.training.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingSettings:
    """What an embedder is trained for."""

    loss: ContrastiveConfig

    @property
    def kind(self) -> ModelKind:
        """What the result is."""
        return "embedder"

    def build(self, path: Path, task: TrainTask, device: torch.device) -> "EmbeddingObjective":
        """Load the model in ``path`` onto ``device``.

        Raises:
            ConfigError: The directory is unusable, or a width exceeds the model's.
        """
        spec = load_spec(path)
        too_wide = [dim for dim in self.loss.dims if dim > spec.hidden_dim]
        if too_wide:
            raise ConfigError(
                f"dims has {too_wide[0]}, the model in {path} gives 1 to {spec.hidden_dim}. Lower "
                "it"
            )
        tokenizer = _load_tokenizer(path, spec, task)
        model = load_weights(AutoModel, spec.path, torch.float32, device, may_miss="pooler.")
        if task.lora is not None:
            add_adapters(model, task.lora)
        network = TextEncoder(model, spec.pooling, task.compute)
        return EmbeddingObjective(self, task, spec, tokenizer, network)

    def text_lengths(self, task: TrainTask, rows: pa.Table, *, num_negatives: int) -> np.ndarray:
        """Return the tokens of each text that rows make; loads no weights."""
        with tempfile.TemporaryDirectory() as scratch:
            path = starting_model(task.start, self.kind, Path(scratch))
            spec = load_spec(path)
            tokenizer = _load_tokenizer(path, spec, task)
        reader = EmbeddingReader(spec, tokenizer, task.instruction)
        numbers = np.arange(len(rows))
        return reader.read(rows, numbers, num_negatives=num_negatives, seed=[0]).lengths


class EmbeddingObjective:
    """An embedder in training."""

    def __init__(
        self,
        settings: EmbeddingSettings,
        task: TrainTask,
        spec: ModelSpec,
        tokenizer: TextTokenizer,
        network: TextEncoder,
    ) -> None:
        """Wire up the parts; ``EmbeddingSettings.build`` is the way to get one."""
        self.network = network
        self.model = network.model
        self._settings = settings
        self._task = task
        self._spec = spec
        self._reader = EmbeddingReader(spec, tokenizer, task.instruction)
        self._world = World.current()

    def read(
        self, rows: pa.Table, numbers: np.ndarray, *, num_negatives: int, seed: Sequence[int]
    ) -> EmbeddingTokens:
        """Return the tokens of rows; see ``Objective``."""
        return self._reader.read(rows, numbers, num_negatives=num_negatives, seed=seed)

    def backward(
        self, network: torch.nn.Module, batch: EmbeddingTokens, *, equal_passes: bool
    ) -> float:
        """Add the gradient of the contrastive loss over all processes' rows; see ``Objective``."""
        device = self.model.device
        packs = plan_packs(batch.lengths, self._task.compute.token_budget)
        num_passes = self._world.max(len(packs), device) if equal_passes else 0
        places = torch.from_numpy(batch.places[np.concatenate(packs)]).to(device)
        losses = []

        def gradients_of(vectors: torch.Tensor) -> torch.Tensor:
            own = _arrange(vectors, places, batch)
            loss, gradient = contrastive_gradients(own, self._settings.loss, self._world)
            losses.append(loss)
            return gradient.flatten(0, 1)[places]

        chunks = [_text_pack(batch, pack, device) for pack in packs]
        GradientCache[TextPack](network).backward(chunks, gradients_of, num_passes=num_passes)
        return losses[0]

    def save(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write a sentence-transformers directory; see ``Objective``."""
        write_embedder(
            folder,
            self._spec,
            {name.removeprefix("model."): tensor for name, tensor in state.items()},
            dtype=stored_dtype(self._task.checkpointing.save_dtype, self._spec.path),
            class_name=type(self.model).__name__,
            instruction=self._task.instruction,
            dims=self._settings.loss.dims,
        )


def _load_tokenizer(path: Path, spec: ModelSpec, task: TrainTask) -> TextTokenizer:
    return TextTokenizer.load(path, task.token_limit(spec.max_tokens), spec.tokenizer)


def _text_pack(batch: EmbeddingTokens, pack: np.ndarray, device: torch.device) -> TextPack:
    ids, positions = gather_tokens(batch.ids, batch.lengths, pack)
    return TextPack(
        ids=torch.from_numpy(ids.astype(np.int64)).to(device),
        positions=torch.from_numpy(positions).to(device),
        lengths=batch.lengths[pack].astype(np.int64),
    )


def _arrange(
    vectors: torch.Tensor, places: torch.Tensor, batch: EmbeddingTokens
) -> ContrastiveBatch:
    """Put vectors in pack order into rows of query, positive and negatives; gaps are zeros."""
    num_rows, num_documents, _ = batch.keys.shape
    rows = vectors.new_zeros(num_rows * (1 + num_documents), vectors.shape[1])
    rows[places] = vectors
    return ContrastiveBatch(
        vectors=rows.view(num_rows, 1 + num_documents, -1),
        keys=torch.from_numpy(batch.keys).to(vectors.device),
        present=torch.from_numpy(batch.present).to(vectors.device),
    )
