"""The flags that both training jobs have, and what they resolve to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qbatch.cli import FloatList, IntList, StrList
from qbatch.errors import ConfigError
from qbatch.models.hub import resolve_model
from qbatch.models.loading import hash_tokenizer, read_json, weights_sha256
from qbatch.schema import SCHEMA_VERSION, ComputeDtype
from qbatch.storage import Storage
from qbatch.training.task import (
    Checkpointing,
    Compute,
    Lora,
    Optimization,
    Schedule,
    Sharding,
    Stage,
    Start,
    TrainTask,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What is trained on what and how, whatever it is trained for.

    Stages are lists side by side: one value holds for all stages, else there is one for each.
    """

    pairs: StrList
    """Pairs tables of the stages, one after the other: published tables, or Parquet."""
    output: str
    """Directory of the trained model, its checkpoints and its report."""
    model: str | None = None
    """Model directory or hub id to start from; instead of it --init-config."""
    revision: str | None = None
    """Commit of a hub id; None is the pinned one of a known model."""
    init_config: str | None = None
    """Directory of config.json and a tokenizer: start from random weights."""
    epochs: IntList = (1,)
    """Passes over the pairs of each stage."""
    batch_size: IntList = (256,)
    """Pairs of a step, over all workers."""
    learning_rate: FloatList = (2e-5,)
    """Highest learning rate of each stage."""
    num_negatives: IntList = (7,)
    """Most hard negatives of a pair, drawn anew each epoch."""
    instruction: str | None = None
    """Task sentence of queries whose row names none; None is the model's own."""
    max_tokens: int | None = None
    """Longest text, prompt and special tokens included; None is the model's limit, at most 512."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: float = 0.05
    """Share of each stage's steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """Of matrices; norms and biases do not decay."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this."""
    lora_rank: int = 0
    """Rank of adapters to train in place of all weights; 0 trains all weights."""
    lora_alpha: int = 32
    """Adapters are scaled by this over their rank."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is dropped."""
    num_workers: int | None = None
    """Processes that train together; None is one a GPU of the cluster, or 1."""
    sharding: Sharding = "ddp"
    """Every worker holds the model (ddp), or a share of it (fsdp)."""
    token_budget: int = 8192
    """Tokens in one pass through the model; larger batches take more passes, not more memory."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third slower."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Compute dtype; auto is bfloat16 where the processor has it. Weights stay float32."""
    save_dtype: Literal["auto"] | ComputeDtype = "auto"
    """Dtype of written weights; auto is that of the start."""
    checkpoint_every: int = 500
    """Steps between points from which a killed run goes on."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay, as models, for merging."""
    seed: int = 0
    """Of order, negatives, dropout and random weights."""
    max_failures: int = 3
    """How often workers that died are started again."""
    stall_timeout_s: float = 1800.0
    """Seconds that a worker waits for another before the job fails."""
    single_writer: bool = False
    """I am the only writer here: allow a store without conditional PUT."""
    dry_run: bool = False
    """Print stages, steps, tokens and memory; start nothing."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init_config is None):
            raise ConfigError(
                f"model is {self.model!r} and init_config {self.init_config!r}; give one of them"
            )
        if self.lora_rank < 0 or not 0 <= self.lora_dropout < 1 or self.lora_alpha < 1:
            raise ConfigError(
                f"lora_rank {self.lora_rank}, lora_alpha {self.lora_alpha}, lora_dropout "
                f"{self.lora_dropout}; give 0 or more, 1 or more, 0 to below 1"
            )
        if self.lora_rank and self.init_config is not None:
            raise ConfigError(
                f"lora_rank is {self.lora_rank} with init_config; adapters beside random weights "
                "learn little: leave out lora_rank"
            )
        if self.token_budget < 1 or self.max_failures < 0 or self.stall_timeout_s <= 0:
            raise ConfigError(
                f"token_budget {self.token_budget}, max_failures {self.max_failures}, "
                f"stall_timeout_s {self.stall_timeout_s}; give 1, 0 or more, above 0"
            )
        if self.seed < 0 or (self.num_workers is not None and self.num_workers < 1):
            raise ConfigError(
                f"seed {self.seed}, num_workers {self.num_workers}; give 0 or more, 1 or more"
            )
        self.stages()
        self.optimization()
        self.checkpointing()

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages, their data as absolute URIs.

        Raises:
            ConfigError: A list has neither one value nor one for each stage.
        """
        if not self.pairs:
            raise ConfigError("pairs is empty; name at least one pairs table")
        names = ("epochs", "batch_size", "learning_rate", "num_negatives")
        columns = {name: self._for_stages(name) for name in names}
        return tuple(
            Stage(pairs=Storage(uri).uri, **{name: columns[name][i] for name in names})
            for i, uri in enumerate(self.pairs)
        )

    def _for_stages(self, name: str) -> tuple[Any, ...]:
        values: tuple[Any, ...] = getattr(self, name)
        if len(values) not in {1, len(self.pairs)}:
            raise ConfigError(
                f"{name} has {len(values)} values for {len(self.pairs)} pairs tables; give one for "
                "all, or one each"
            )
        return values if len(values) == len(self.pairs) else values * len(self.pairs)

    def optimization(self) -> Optimization:
        """Return how gradients become steps."""
        return Optimization(
            schedule=self.schedule,
            warmup_fraction=self.warmup_fraction,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )

    def checkpointing(self) -> Checkpointing:
        """Return what is written on the way."""
        return Checkpointing(
            every_steps=self.checkpoint_every,
            num_kept=self.keep_checkpoints,
            save_dtype=self.save_dtype,
        )

    def lora(self) -> Lora | None:
        """Return the adapters, None if all weights are trained."""
        if not self.lora_rank:
            return None
        return Lora(rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)

    def start(self) -> Start:
        """Return what training starts from; directories become absolute."""
        model, init_config = (
            str(Path(name).absolute()) if name and Path(name).is_dir() else name
            for name in (self.model, self.init_config)
        )
        return Start(model=model, revision=self.revision, init_config=init_config, seed=self.seed)

    def task(self, dtype: ComputeDtype, num_threads: int | None) -> TrainTask:
        """Return what workers need, without the fingerprint."""
        compute = Compute(
            dtype=dtype,
            token_budget=self.token_budget,
            gradient_checkpointing=self.gradient_checkpointing,
            sharding=self.sharding,
            num_threads=num_threads,
        )
        return TrainTask(
            start=self.start(),
            output=Storage(self.output).uri,
            single_writer=self.single_writer,
            stages=self.stages(),
            optimization=self.optimization(),
            lora=self.lora(),
            compute=compute,
            checkpointing=self.checkpointing(),
            instruction=self.instruction,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )


def start_fingerprint(start: Start) -> dict[str, Any]:
    """Return what names the model that training starts from."""
    if start.model is not None:
        path = resolve_model(start.model, start.revision)
        return {"weights_sha256": weights_sha256(path), "tokenizer_sha256": hash_tokenizer(path)}
    source = Path(start.init_config or "")
    return {"config": read_json(source / "config.json"), "tokenizer_sha256": hash_tokenizer(source)}


def training_fingerprint(
    task: TrainTask, objective: Mapping[str, Any], files: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return everything that changes the trained weights by more than rounding.

    Args:
        task: The run.
        objective: What it trains for.
        files: Of each stage the data files, with what names their content.
    """
    stages = [
        {**asdict(stage), "pairs": names} for stage, names in zip(task.stages, files, strict=True)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "start": start_fingerprint(task.start),
        "stages": stages,
        "objective": dict(objective),
        "optimization": asdict(task.optimization),
        "lora": None if task.lora is None else asdict(task.lora),
        "dtype": task.compute.dtype,
        "save_dtype": task.checkpointing.save_dtype,
        "instruction": task.instruction,
        "max_tokens": task.max_tokens,
        "seed": task.seed,
    }
