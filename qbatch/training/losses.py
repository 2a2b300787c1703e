"""What training minimises: the losses of the Qwen3 Embedding report, one value a row.

Shapes: N rows of the global batch, R of them whose losses are computed here, K hard negatives a
row, D components, M candidates of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cross_entropy, normalize

from qbatch.errors import ConfigError

_NOTHING = float("-inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """Settings of the embedder's loss; where the report is silent, both readings are offered."""

    temperature: float = 0.02
    """Divides cosines. The report does not tell its own; fine-tuning guides use 0.01 to 0.1."""
    margin: float = 0.1
    """A candidate that is closer than the positive by more than this is taken for a false negative
    and left out."""
    mask_documents: bool = False
    """Whether the margin also holds between documents; the report defines it for queries only."""
    other_negatives: bool = True
    """Whether the hard negatives of other rows are among the documents that a row is compared
    with."""
    dims: tuple[int, ...] = ()
    """Matryoshka widths trained together; empty means the full width alone."""
    dim_weights: tuple[float, ...] = ()
    """Weight of each width's loss; empty means 1 each."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; give a number above 0")
        if any(dim < 1 for dim in self.dims) or len(set(self.dims)) < len(self.dims):
            raise ConfigError(f"dims are {self.dims}; give different positive widths")
        if self.dim_weights and len(self.dim_weights) != len(self.dims):
            raise ConfigError(
                f"dim_weights are {self.dim_weights} for dims {self.dims}; give one a width, or "
                "none"
            )
        if any(weight <= 0 for weight in self.dim_weights):
            raise ConfigError(f"dim_weights are {self.dim_weights}; give numbers above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveBatch:
    """The vectors of a global batch and which documents they stand for."""

    vectors: torch.Tensor
    """Shape (N, 2 + K, D): of each row the query, the positive, its hard negatives."""
    keys: torch.Tensor
    """int64, shape (N, 1 + K, 2): of each document two keys, of its text and of its id. Documents
    are the same if either key is."""
    present: torch.Tensor
    """bool, shape (N, K): which hard negatives there are; the others are padding."""

    def truncated(self, dim: int) -> "ContrastiveBatch":
        """Return the batch with the first ``dim`` components of each vector, of unit length."""
        vectors = normalize(self.vectors[..., :dim], dim=-1)
        return ContrastiveBatch(vectors=vectors, keys=self.keys, present=self.present)


def matryoshka_losses(
    batch: ContrastiveBatch, rows: slice, config: ContrastiveConfig
) -> torch.Tensor:
    """Return the weighted sum over widths of the loss at each width, shape (R,).

    Each width is a model of its own: cosines, and with them the mask, are those of that width.

    Args:
        batch: Vectors of any length; they are normalised here.
        rows: Whose losses are wanted; all rows are candidates.
        config: ``dims`` must not exceed D.
    """
    dims = config.dims or (batch.vectors.shape[-1],)
    weights = config.dim_weights or (1.0,) * len(dims)
    losses = [
        weight * contrastive_losses(batch.truncated(dim), rows, config)
        for dim, weight in zip(dims, weights, strict=True)
    ]
    return torch.stack(losses).sum(0)


def contrastive_losses(
    batch: ContrastiveBatch, rows: slice, config: ContrastiveConfig
) -> torch.Tensor:
    """Return the improved contrastive loss of each row, shape (R,): Eq. 1 of arXiv 2506.05176.

    The positive of a row competes with its hard negatives, the other queries, and the other
    documents, which are compared with the query and with the positive. A candidate is left out if
    it is closer than the positive by more than the margin, or belongs to the positive's document.

    Args:
        batch: Vectors of unit length.
        rows: Whose losses are wanted; all rows are candidates.
        config: Without ``dims``, which are the caller's.
    """
    num_rows, width, _ = batch.vectors.shape
    negatives = width - 2 if config.other_negatives else 0
    queries, positives = batch.vectors[:, 0], batch.vectors[:, 1]
    documents = batch.vectors[:, 1 : 2 + negatives].flatten(0, 1)
    own_queries, own_positives = queries[rows], positives[rows]
    own_keys = batch.keys[rows, :1]
    is_own = torch.eye(num_rows, dtype=torch.bool, device=queries.device)[rows]
    is_present = torch.cat([is_own.new_ones(num_rows, 1), batch.present[:, :negatives]], dim=1)
    is_other = is_present.flatten() & ~is_own.repeat_interleave(1 + negatives, dim=1)
    is_other &= ~_same(own_keys, batch.keys[:, : 1 + negatives].flatten(0, 1)[None])

    positive = (own_queries * own_positives).sum(-1, keepdim=True)
    hard = torch.einsum("rd,rkd->rk", own_queries, batch.vectors[rows, 2:])
    to_queries = own_queries @ queries.T
    to_documents = own_queries @ documents.T
    between_documents = own_positives @ documents.T

    limit = positive.detach() + config.margin
    is_hard = batch.present[rows] & ~_same(own_keys, batch.keys[rows, 1:])
    is_query = ~is_own & ~_same(own_keys, batch.keys[None, :, 0])
    is_between = is_other & (between_documents <= limit) if config.mask_documents else is_other
    logits = torch.cat(
        [
            positive,
            hard.masked_fill(~(is_hard & (hard <= limit)), _NOTHING),
            to_queries.masked_fill(~(is_query & (to_queries <= limit)), _NOTHING),
            between_documents.masked_fill(~is_between, _NOTHING),
            to_documents.masked_fill(~(is_other & (to_documents <= limit)), _NOTHING),
        ],
        dim=1,
    )
    logits = logits / config.temperature
    return logits.logsumexp(1) - logits[:, 0]


def _same(keys: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return where documents are the same: keys of shape (R, 1, 2) against (R or 1, M, 2)."""
    return (keys == others).any(-1)


RerankLoss = Literal["pointwise", "pointwise-two-way", "listwise"]


def answer_losses(answers: torch.Tensor, is_relevant: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the right answer of each pair, shape (M,): Eq. 2.

    Args:
        answers: Shape (M, 2): log-likelihoods of the answers no and yes among all tokens.
        is_relevant: bool, shape (M,): whether yes is right.
    """
    return -answers.gather(1, is_relevant.long()[:, None])[:, 0]


def two_way_losses(answers: torch.Tensor, is_relevant: torch.Tensor) -> torch.Tensor:
    """Return the same given that the answer is no or yes; logits serve as well as likelihoods."""
    return cross_entropy(answers, is_relevant.long(), reduction="none")


def listwise_losses(answers: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return for each query the cross-entropy of its positive among its candidates.

    Args:
        answers: Shape (sum of ``counts``, 2): logits or log-likelihoods of the answers no and yes;
            the candidates of each query in turn, the positive first.
        counts: Candidates of each query.
    """
    log_odds = answers[:, 1] - answers[:, 0]
    lists = torch.split(log_odds, list(counts))
    return torch.stack([scores.logsumexp(0) - scores[0] for scores in lists])
