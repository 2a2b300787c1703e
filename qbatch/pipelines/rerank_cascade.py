"""The models of a rerank job and the cuts between them, from flags to stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qbatch.errors import ConfigError
from qbatch.models.hub import resolve_model
from qbatch.models.loading import weights_sha256
from qbatch.models.rerank_loading import RerankerSpec, load_reranker_spec
from qbatch.models.rerank_templates import ScorerName
from qbatch.models.rerank_tokens import PairTokenizer
from qbatch.models.server import ServerConfig
from qbatch.pipelines.rerank_task import RerankStage


@dataclass(frozen=True, kw_only=True, slots=True)
class Cascade:
    """What ``--cascade`` says."""

    depth: int | None
    """Candidates of a query, best by retrieval, that the first model sees."""
    models: tuple[tuple[str, int], ...]
    """Models before the last, each with how many candidates of a query it lets go on."""


def parse_cascade(items: Sequence[str]) -> Cascade:
    """Read ``N``, ``MODEL:N``, ...: a number alone can only stand first.

    Raises:
        ConfigError: An item is neither, or a later cut lets more through than an earlier one.
    """
    depth, models, narrowest = None, [], None
    for i, item in enumerate(items):
        model, _, number = item.rpartition(":")
        if not number.isdecimal() or int(number) < 1 or (not model and i):
            raise ConfigError(
                f"--cascade={','.join(items)} holds {item!r}; give N first (candidates by "
                "retrieval rank) or MODEL:N (best of a smaller reranker), N from 1 on"
            )
        keep = int(number)
        if narrowest is not None and keep > narrowest:
            raise ConfigError(
                f"--cascade={','.join(items)} lets {keep} through after {narrowest}; give numbers "
                "that do not rise"
            )
        narrowest = keep
        if model:
            models.append((model, keep))
        else:
            depth = keep
    return Cascade(depth=depth, models=tuple(models))


@dataclass(frozen=True, kw_only=True, slots=True)
class LastModel:
    """The model whose scores are written, and what all models share."""

    model: str
    revision: str | None
    scorer: Literal["auto"] | ScorerName
    max_tokens: int | None
    instruction: str | None
    server: ServerConfig | None = None
    """Computes in place of the actors."""


def make_stages(cascade: Cascade, last: LastModel) -> tuple[list[RerankStage], list[RerankerSpec]]:
    """Return the stages in order and what their checkpoints are.

    Models of the cascade find their own scorer; the instruction goes to those that take one, and
    their pairs are as long as the last model's where they can be.

    Raises:
        ConfigError: A model cannot do what was asked.
    """
    stages: list[RerankStage] = []
    specs: list[RerankerSpec] = []
    earlier: list[tuple[Any, ...]] = []
    named = [*((model, None, keep) for model, keep in cascade.models)]
    for model, revision, keep in [*named, (last.model, last.revision, None)]:
        path = resolve_model(model, revision)
        spec = load_reranker_spec(path, "auto" if keep else last.scorer)
        if keep is None and last.server is not None:
            _check_served(spec)
        instruction, max_tokens = last.instruction, last.max_tokens
        if keep is not None:
            instruction = instruction if spec.scorer == "yes-no" else None
            max_tokens = min(max_tokens or spec.max_tokens, spec.max_tokens)
        tokenizer = PairTokenizer.load(
            path, spec.tokenizer, max_tokens=max_tokens, instruction=instruction
        )
        like = (spec.tokenizer_sha256, spec.scorer, tokenizer.max_tokens, instruction)
        earlier.append(like)
        specs.append(spec)
        stages.append(
            RerankStage(
                model=model,
                revision=revision,
                spec=spec.tokenizer,
                max_tokens=tokenizer.max_tokens,
                instruction=instruction,
                tokens=earlier.index(like),
                keep=keep,
                server=last.server if keep is None else None,
            )
        )
    return stages, specs


def _check_served(spec: RerankerSpec) -> None:
    if (spec.scorer, spec.head) != ("yes-no", "language-model"):
        raise ConfigError(
            f"--engine=http for a {spec.scorer} model that ends in a {spec.head} head; allowed are "
            "yes-no language models such as Qwen/Qwen3-Reranker-4B, whose server tells how likely "
            "both answers are. Choose such a model, or --engine=local"
        )


def stage_fingerprint(stage: RerankStage, spec: RerankerSpec) -> dict[str, Any]:
    """Return everything about a model that changes what comes out of its stage."""
    return {
        "weights_sha256": weights_sha256(spec.path),
        "tokenizer_sha256": spec.tokenizer_sha256,
        "architecture": spec.architecture,
        "scorer": spec.scorer,
        "instruction": stage.instruction,
        "max_tokens": stage.max_tokens,
        "keep": stage.keep,
    }
