"""Everything a training process needs to know; it travels, models do not."""

from dataclasses import dataclass
from typing import Literal

from qbatch.errors import ConfigError
from qbatch.schema import ComputeDtype

Schedule = Literal["linear", "cosine", "constant"]
Sharding = Literal["ddp", "fsdp"]
ModelKind = Literal["embedder", "reranker"]

DEFAULT_MAX_TOKENS = 512
"""Longer texts are cut in training unless asked for otherwise; the cost grows with the length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One pass of training over one pairs table; a stage starts where the one before ended."""

    pairs: str
    epochs: int
    batch_size: int
    """Rows of the global batch."""
    learning_rate: float
    num_negatives: int
    """Most hard negatives of a row, drawn anew each epoch from those it has."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.num_negatives < 0:
            raise ConfigError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, num_negatives "
                f"{self.num_negatives}; give 1, 1, 0 or more"
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; give a number above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """How gradients become steps."""

    schedule: Schedule
    warmup_fraction: float
    weight_decay: float
    max_grad_norm: float

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"warmup_fraction is {self.warmup_fraction}; give 0 to below 1")
        if self.weight_decay < 0 or self.max_grad_norm <= 0:
            raise ConfigError(
                f"weight_decay is {self.weight_decay} and max_grad_norm {self.max_grad_norm}; give "
                "0 or more, and above 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Low-rank adapters in place of training all weights."""

    rank: int
    alpha: int
    dropout: float

    @property
    def scale(self) -> float:
        """What the product of both adapter matrices is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What training starts from: a model, or random weights for a config and a tokenizer."""

    model: str | None
    """Directory or hub id."""
    revision: str | None
    init_config: str | None
    """Directory of config.json and tokenizer files."""
    seed: int
    """Of the random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a process computes; all but the dtype changes results by rounding only."""

    dtype: ComputeDtype
    """Of activations, by autocast; weights and optimizer are float32."""
    token_budget: int
    """Tokens in one pass through the model."""
    gradient_checkpointing: bool
    sharding: Sharding
    num_threads: int | None
    """CPU threads of torch; None leaves torch's setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpointing:
    """What is written on the way."""

    every_steps: int
    """Steps between points from which a killed run goes on; the end of a stage is one, too."""
    num_kept: int
    """How many of the newest checkpoints stay, as models, for merging."""
    save_dtype: Literal["auto"] | ComputeDtype
    """Dtype of written weights; ``auto`` keeps that of the start."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.num_kept < 0:
            raise ConfigError(
                f"checkpoint_every is {self.every_steps} and keep_checkpoints {self.num_kept}; "
                "give 1 or more, and 0 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTask:
    """A whole training run, but for what is trained for."""

    start: Start
    output: str
    single_writer: bool
    stages: tuple[Stage, ...]
    optimization: Optimization
    lora: Lora | None
    compute: Compute
    checkpointing: Checkpointing
    instruction: str | None
    """Of queries whose row names none; None means the model's own."""
    max_tokens: int | None
    """Longest text, prompt and special tokens included; None is the model's limit, at most 512."""
    seed: int
    fingerprint: str = ""
    """Of everything that changes the result; a run goes on only from points of its own."""

    def token_limit(self, model_limit: int) -> int:
        """Return the longest text, in tokens, for a model that takes ``model_limit``."""
        if self.max_tokens is None:
            return min(model_limit, DEFAULT_MAX_TOKENS)
        return self.max_tokens
