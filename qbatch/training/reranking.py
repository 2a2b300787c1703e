"""Training a reranker: yes or no after the template of Qwen3-Reranker, from a causal model.

Queries do not meet in this loss, so there is nothing to cache: groups of whole queries pass once,
each adding its gradient. A query's beginning is computed once for all its candidates, as in the
rerank job.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from qbatch.errors import BadInputError, ConfigError
from qbatch.models.backbone import load_weights
from qbatch.models.rerank_loading import RerankerSpec, load_reranker_spec
from qbatch.models.rerank_packing import PairPack, PairSet
from qbatch.models.rerank_templates import answer_ids
from qbatch.models.rerank_tokens import CandidateTokens, PairTokenizer
from qbatch.training.gradient_cache import without_exchange
from qbatch.training.losses import RerankLoss, answer_losses, listwise_losses, two_way_losses
from qbatch.training.model_files import (
    copy_tokenizer,
    starting_model,
    stored_dtype,
    write_config,
    write_weights,
)
from qbatch.training.networks import AnswerModel, add_adapters
from qbatch.training.task import ModelKind, TrainTask
from qbatch.training.tokens import num_tokens, read_candidates
from qbatch.training.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankingSettings:
    """What a reranker is trained for."""

    loss: RerankLoss

    @property
    def kind(self) -> ModelKind:
        """What the result is."""
        return "reranker"

    def build(self, path: Path, task: TrainTask, device: torch.device) -> "RerankingObjective":
        """Load the model in ``path`` onto ``device``.

        Raises:
            ConfigError: The directory is unusable, or no causal model with the answers as tokens.
        """
        spec = _load_spec(path)
        model = load_weights(AutoModelForCausalLM, path, torch.float32, device)
        if task.lora is not None:
            add_adapters(model, task.lora)
        yes, no = answer_ids(Tokenizer.from_file(str(path / "tokenizer.json")))
        two_way = self.loss != "pointwise"
        network = AnswerModel(model, (no, yes), task.compute, two_way=two_way)
        return RerankingObjective(self, task, spec, network)

    def text_lengths(self, task: TrainTask, rows: pa.Table, *, num_negatives: int) -> np.ndarray:
        """Return the tokens of each pair that rows make, prompts included; loads no weights."""
        with tempfile.TemporaryDirectory() as scratch:
            spec = _load_spec(starting_model(task.start, self.kind, Path(scratch)))
            tokenizer = _load_tokenizer(spec, task)
        numbers = np.arange(len(rows))
        groups = read_candidates(rows, numbers, tokenizer, num_negatives=num_negatives, seed=[0])
        lengths = [g.lengths + len(g.before) + len(g.after) for g in groups if g.reason is None]
        return np.concatenate([np.empty(0, np.int32), *lengths])


class RerankingObjective:
    """A reranker in training."""

    def __init__(
        self,
        settings: RerankingSettings,
        task: TrainTask,
        spec: RerankerSpec,
        network: AnswerModel,
    ) -> None:
        """Wire up the parts; ``RerankingSettings.build`` is the way to get one."""
        self.network = network
        self._settings = settings
        self._task = task
        self._spec = spec
        self._tokenizer = _load_tokenizer(spec, task)
        self._world = World.current()

    def read(
        self, rows: pa.Table, numbers: np.ndarray, *, num_negatives: int, seed: Sequence[int]
    ) -> list[CandidateTokens]:
        """Return the tokens of rows; see ``Objective``.

        Raises:
            BadInputError: A query leaves no room for documents.
        """
        groups = read_candidates(
            rows, numbers, self._tokenizer, num_negatives=num_negatives, seed=seed
        )
        for group, row in zip(groups, numbers.tolist(), strict=True):
            if group.reason is not None:
                raise BadInputError(
                    f"pair {row} cannot be trained on: {group.detail}. Raise --max-tokens, or "
                    "remove the pair"
                )
        return groups

    def backward(
        self, network: torch.nn.Module, batch: list[CandidateTokens], *, equal_passes: bool
    ) -> float:
        """Add the gradient of the mean loss over pairs (listwise: queries); see ``Objective``."""
        device = next(self.network.parameters()).device
        chunks = _chunks(
            batch, self._task.compute.token_budget, share_prefixes=self.network.shares_prefixes
        )
        num_passes = len(chunks)
        if equal_passes:
            num_passes = self._world.max(num_passes, device)
        terms_of = _LOSSES[self._settings.loss]
        is_listwise = self._settings.loss == "listwise"
        own = len(batch) if is_listwise else sum(len(group.lengths) for group in batch)
        num_terms = float(self._world.sum(torch.tensor(float(own), device=device)))
        total = torch.zeros((), device=device)
        for number in range(num_passes):
            chunk = chunks[min(number, len(chunks) - 1)]
            share = float(number < len(chunks)) / num_terms  # a repeated pass counts nothing
            with without_exchange(network, until=number == num_passes - 1):
                answers = network(chunk.pack)[chunk.order.to(device)]
                loss = terms_of(answers, chunk.counts).sum() * share
                (loss * self._world.size).backward()  # type: ignore[no-untyped-call]  # torch's
            total += loss.detach()
        return float(self._world.sum(total))

    def save(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write a causal language model that scores by yes and no; see ``Objective``."""
        path = self._spec.path
        weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        dtype = stored_dtype(self._task.checkpointing.save_dtype, path)
        write_weights(folder, weights, dtype, is_tied=self._spec.is_tied)
        write_config(path, folder, dtype, {"architectures": [type(self.network.model).__name__]})
        copy_tokenizer(path, folder)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Whole queries that go through the model together."""

    pack: PairPack
    order: torch.Tensor
    """int64, shape (pairs,): of each candidate of each query in turn, its place in the pack."""
    counts: list[int]
    """Candidates of each query."""


def _chunks(
    groups: list[CandidateTokens], token_budget: int, *, share_prefixes: bool
) -> list[_Chunk]:
    """Return the queries in their order, in chunks of at most ``token_budget`` tokens or one."""
    parts: list[list[CandidateTokens]] = [[]]
    filled = 0
    for group in groups:
        size = num_tokens([group])
        if parts[-1] and filled + size > token_budget:
            parts.append([])
            filled = 0
        parts[-1].append(group)
        filled += size
    return [_chunk(part, share_prefixes=share_prefixes) for part in parts]


def _chunk(groups: list[CandidateTokens], *, share_prefixes: bool) -> _Chunk:
    pairs = PairSet(groups, share_prefixes=share_prefixes)
    # What scatter does to scores it does to places: it says where each candidate's answer lies.
    places = pairs.scatter(np.arange(len(pairs), dtype=np.float32))
    return _Chunk(
        pack=pairs.pack(0, len(pairs)),
        order=torch.from_numpy(np.concatenate(places).astype(np.int64)),
        counts=[len(group.lengths) for group in groups],
    )


def _is_relevant(counts: list[int], device: torch.device) -> torch.Tensor:
    """Return bool of shape (pairs,): true for the first candidate of each query."""
    starts = np.cumsum([0, *counts[:-1]])
    relevant = torch.zeros(sum(counts), dtype=torch.bool)
    relevant[torch.from_numpy(starts)] = True
    return relevant.to(device)


_LOSSES: dict[RerankLoss, Callable[[torch.Tensor, list[int]], torch.Tensor]] = {
    "pointwise": lambda answers, counts: answer_losses(
        answers, _is_relevant(counts, answers.device)
    ),
    "pointwise-two-way": lambda answers, counts: two_way_losses(
        answers, _is_relevant(counts, answers.device)
    ),
    "listwise": listwise_losses,
}


def _load_spec(path: Path) -> RerankerSpec:
    spec = load_reranker_spec(path, "yes-no")
    if spec.head != "language-model":
        raise ConfigError(
            f"{path} ends in a head of kind {spec.head!r}; a reranker is trained from a causal "
            "language model. Give one, such as Qwen/Qwen3-0.6B-Base"
        )
    return spec


def _load_tokenizer(spec: RerankerSpec, task: TrainTask) -> PairTokenizer:
    return PairTokenizer.load(
        spec.path,
        spec.tokenizer,
        max_tokens=task.token_limit(spec.max_tokens),
        instruction=task.instruction,
    )
