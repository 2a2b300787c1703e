"""Queries and candidates to scores: each query's beginning computed once, only real tokens."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from qbatch.errors import ConfigError
from qbatch.models.devices import resolve_device, resolve_dtype
from qbatch.models.embedder import default_token_budget
from qbatch.models.halving import in_halves, shrunk_budget
from qbatch.models.rerank_loading import RerankerSpec, load_reranker_spec
from qbatch.models.rerank_packing import PairSet
from qbatch.models.rerank_scorers import Scorer, load_scorer
from qbatch.models.rerank_stats import RerankStats
from qbatch.models.rerank_templates import ScorerName
from qbatch.models.rerank_tokens import CandidateGroup, CandidateTokens, PairTokenizer
from qbatch.schema import ComputeDtype


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankerConfig:
    """What a reranking process needs to build its model; it travels, the model does not."""

    model_path: Path
    """What ``resolve_model`` returned."""
    scorer: Literal["auto"] | ScorerName = "auto"
    """How pairs are scored; ``auto`` goes by the checkpoint, see ``load_reranker_spec``."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Of weights and activations; ``auto`` is bfloat16 where the processor computes in it."""
    max_tokens: int | None = None
    """Longest pair, prompt included; None means the model's limit, at most 8,192."""
    token_budget: int | None = None
    """Tokens in one forward pass; None means 32,768 on a GPU and 4,096 on a CPU."""
    device: str | None = None
    """A torch device; None means the GPU if there is one."""
    num_threads: int | None = None
    """CPU threads of torch in this process; None leaves torch's setting."""
    instruction: str | None = None
    """Task sentence in English of yes-no models; None means the model card's."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "token_budget", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} is out of range: {value}; allowed is 1 or more. Raise it, or leave it "
                    "out for the default."
                )

    def build(self) -> "Reranker":
        """Load the model onto its device and check packed against padded computation.

        Raises:
            ConfigError: The directory is unusable, or the scorer does not fit the model.
        """
        spec = load_reranker_spec(self.model_path, self.scorer)
        device = resolve_device(self.device)
        dtype = getattr(torch, resolve_dtype(self.dtype, device))
        return Reranker(load_scorer(spec, dtype, device), spec, self)

    def tokenizer(self, spec: RerankerSpec) -> PairTokenizer:
        """Read the tokenizer and the prompt of ``spec``'s model with these settings."""
        return PairTokenizer.load(
            spec.path, spec.tokenizer, max_tokens=self.max_tokens, instruction=self.instruction
        )


class Reranker:
    """Scores candidates, given as texts or token ids, in groups of one query each."""

    def __init__(self, scorer: Scorer, spec: RerankerSpec, config: RerankerConfig) -> None:
        """Wire up the parts; ``RerankerConfig.build`` is the way to get one."""
        self.spec = spec
        self.stats = RerankStats()
        self._scorer = scorer
        self._config = config
        self._token_budget = config.token_budget or default_token_budget(scorer.device)

    @property
    def token_budget(self) -> int:
        """Tokens in one forward pass, about; it falls when memory runs out."""
        return self._token_budget

    @property
    def is_packed(self) -> bool:
        """Whether pairs run without padding."""
        return self._scorer.is_packed

    @property
    def shares_prefixes(self) -> bool:
        """Whether what pairs begin with is computed once a pack."""
        return self._scorer.shares_prefixes

    @cached_property
    def tokenizer(self) -> PairTokenizer:
        """Tokenizer and prompt of this model; read when first used."""
        return self._config.tokenizer(self.spec)

    def score(self, groups: Sequence[CandidateGroup]) -> list[np.ndarray]:
        """Tokenize and score; see ``score_tokens``."""
        return self.score_tokens(self.tokenizer.encode(groups))

    @torch.inference_mode()
    def score_tokens(
        self, groups: Sequence[CandidateTokens], on_pack: Callable[[], None] = lambda: None
    ) -> list[np.ndarray]:
        """Return the ranking keys of each group's documents: float32, in the order given.

        A key is the log-odds of relevance (yes-no, cross-encoder) or the mean log-likelihood of the
        query's tokens in nats (query-likelihood); ``scores_from_keys`` makes scores of them. It
        depends on the other pairs of the call by rounding only. It is NaN for pairs of a rejected
        query, and non-finite where the model overflows.

        Args:
            groups: As ``PairTokenizer.encode`` gives them for this model.
            on_pack: Called before each forward pass.

        Raises:
            ValueError: Token ids do not fit the model.
            torch.OutOfMemoryError: Not even a single pair fits.
        """
        started = time.perf_counter()
        if self._config.num_threads is not None:
            # OpenMP keeps the number per calling thread, and actors call from other threads.
            torch.set_num_threads(self._config.num_threads)
        _check_tokens(groups, self.spec)
        pairs = PairSet(groups, share_prefixes=self._scorer.shares_prefixes)
        compute, shrink = partial(self._score_pack, pairs, on_pack), partial(self._shrink, pairs)
        scores = [torch.empty(0, device=self._scorer.device)]
        scores += [in_halves(compute, *pack, shrink) for pack in pairs.plan(self._token_budget)]
        results = pairs.scatter(torch.cat(scores).cpu().numpy())
        self.stats.count(groups, pairs)
        self.stats.score_s += time.perf_counter() - started
        return results

    def _score_pack(
        self, pairs: PairSet, on_pack: Callable[[], None], first: int, stop: int
    ) -> torch.Tensor:
        on_pack()
        pack = pairs.pack(first, stop)
        scores = self._scorer.score(pack)
        lengths = pack.lengths
        self.stats.num_packs += 1
        self.stats.num_computed += int(
            lengths.sum() if self.is_packed else lengths.max() * len(lengths)
        )
        return scores

    def _shrink(self, pairs: PairSet, first: int, stop: int) -> None:
        num_tokens = pairs.tokens_between(first, stop)
        self._token_budget = shrunk_budget(self._token_budget, num_tokens)


def _check_tokens(groups: Sequence[CandidateTokens], spec: RerankerSpec) -> None:
    for number, group in enumerate(groups):
        if group.lengths.sum() != len(group.ids):
            raise ValueError(
                f"group {number} has {len(group.ids)} ids for lengths that add up to "
                f"{group.lengths.sum()}"
            )
        if group.reason is not None or len(group.lengths) == 0:
            continue
        longest = len(group.before) + int(group.lengths.max()) + len(group.after)
        ids = np.concatenate([group.before, group.ids, group.after])
        if len(group.after) == 0 or longest > spec.max_tokens:
            raise ValueError(
                f"group {number} has pairs of up to {longest} tokens, {len(group.after)} of them "
                f"after the document; the model takes 1 to {spec.max_tokens}, at least 1 after; "
                "use PairTokenizer with the max_tokens of the model"
            )
        if not 0 <= ids.min() <= ids.max() < spec.vocab_rows:
            raise ValueError(
                f"token ids of group {number} go from {ids.min()} to {ids.max()}; the model has "
                f"{spec.vocab_rows} rows; use the tokenizer that came with it"
            )
