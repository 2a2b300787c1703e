"""What a model directory says about scoring pairs: which scorer, which head, which limits."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import safe_open
from tokenizers import Tokenizer

from qbatch.errors import ConfigError
from qbatch.models.loading import (
    hash_tokenizer,
    read_config,
    read_json,
    read_max_tokens,
    refuse_remote_code,
    weight_files,
)
from qbatch.models.rerank_prompts import NO, YES
from qbatch.models.rerank_templates import ScorerName
from qbatch.models.rerank_tokens import PairTokenizerSpec
from qbatch.models.tokenization import TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Head = Literal["language-model", "decoder-class", "encoder-class"]
"""What a checkpoint ends in: next-token logits, or one label read at the last or first token."""

_SCORERS: dict[Head, set[ScorerName]] = {
    "language-model": {"yes-no", "query-likelihood"},
    "decoder-class": {"yes-no"},
    "encoder-class": {"cross-encoder"},
}

CLASS_ROW = "score.weight"
"""The one-label head of transformers' decoder classifiers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankerSpec:
    """What a model directory says about scoring pairs."""

    path: Path
    """Directory of config.json, weights and tokenizer."""
    architecture: str
    """``model_type`` of config.json, such as ``qwen3`` or ``bert``."""
    scorer: ScorerName
    head: Head
    is_tied: bool
    """Whether the language-model head is the embedding table."""
    max_tokens: int
    """Longest pair the model takes, prompt included."""
    vocab_rows: int
    """Rows of the embedding table; no token id may reach it."""
    tokenizer_sha256: str

    @property
    def tokenizer(self) -> PairTokenizerSpec:
        """What processes that only tokenize need to know."""
        return PairTokenizerSpec(
            scorer=self.scorer,
            tokenizer=TokenizerSpec(
                subfolder="",
                vocab_rows=self.vocab_rows,
                max_tokens=self.max_tokens,
                appends_end=False,
            ),
        )


def load_reranker_spec(path: Path, scorer: Literal["auto"] | ScorerName = "auto") -> RerankerSpec:
    """Read what a checkpoint is and choose how it scores.

    ``auto`` goes by the first entry of ``architectures``. A classifier of one label is a yes-no
    reranker if it is a Qwen3 (the sequence-classification conversion of Qwen3-Reranker) and a
    cross-encoder if it is an encoder. A causal language model is a yes-no reranker if it is a Qwen3
    whose tokenizer has the answers as tokens, else it scores by query likelihood. A Qwen3 that was
    never trained as a reranker looks like one: name ``query-likelihood`` for it.

    Raises:
        ConfigError: A needed file is missing, the model wants its own code or has only pickled
            weights, or the scorer does not fit the checkpoint.
    """
    tokenizer_config = read_json(path / "tokenizer_config.json", default={})
    refuse_remote_code(path, tokenizer_config)
    config = read_config(path)
    weight_files(path)
    tokenizer_sha256 = hash_tokenizer(path)
    head = _read_head(path, config)
    if scorer == "auto":
        scorer = _choose_scorer(head, path, config.model_type)
    return RerankerSpec(
        path=path,
        architecture=config.model_type,
        scorer=_check_scorer(scorer, head, path),
        head=head,
        is_tied=bool(config.tie_word_embeddings),
        max_tokens=read_max_tokens(path, config, tokenizer_config),
        vocab_rows=config.vocab_size,
        tokenizer_sha256=tokenizer_sha256,
    )


def tensor_files(path: Path) -> dict[str, Path]:
    """Return the file that holds each stored tensor of a model, by name."""
    files: dict[str, Path] = {}
    for file in weight_files(path):
        with safe_open(file, "np") as weights:
            files |= dict.fromkeys(weights.keys(), file)
    return files


def _read_head(path: Path, config: "PreTrainedConfig") -> Head:
    name = (config.architectures or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "language-model"
    if not name.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"Not a reranker in {path}: architectures begins with {name!r}. Allowed are classes "
            "...ForSequenceClassification with one label and ...ForCausalLM; choose such a model."
        )
    if config.num_labels != 1:
        raise ConfigError(
            f"Unsupported number of labels in {path}: {config.num_labels}; a reranker has 1. "
            "Choose a model trained to rank."
        )
    return "decoder-class" if CLASS_ROW in tensor_files(path) else "encoder-class"


def _choose_scorer(head: Head, path: Path, architecture: str) -> ScorerName:
    if head == "encoder-class":
        return "cross-encoder"
    if architecture == "qwen3" and (head == "decoder-class" or _has_answers(path)):
        return "yes-no"
    if head == "language-model":
        return "query-likelihood"
    raise ConfigError(
        f"Unknown prompt of the {architecture!r} classifier in {path}; scorer is auto. If it was "
        "trained with Qwen3-Reranker's prompt, set scorer to yes-no; else choose another model."
    )


def _has_answers(path: Path) -> bool:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    return None not in (tokenizer.token_to_id(YES), tokenizer.token_to_id(NO))


def _check_scorer(scorer: ScorerName, head: Head, path: Path) -> ScorerName:
    if scorer not in _SCORERS[head]:
        raise ConfigError(
            f"The scorer does not fit the model: {scorer!r} for {path}, which ends in a head of "
            f"kind {head!r}. Allowed there: {sorted(_SCORERS[head])}; change scorer, or set auto."
        )
    return scorer
