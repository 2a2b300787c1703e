"""What a reranker has done so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from qbatch.models.rerank_packing import PairSet
from qbatch.models.rerank_tokens import CandidateTokens


@dataclass(kw_only=True, slots=True)
class RerankStats:
    """What a reranker has done so far."""

    num_pairs: int = 0
    """Pairs given, rejected ones included."""
    num_rejected: int = 0
    """Pairs of rejected queries."""
    num_truncated: int = 0
    """Documents that lost tokens at their end."""
    num_distinct: int = 0
    """Pairs left when equal documents of one query count once."""
    num_packs: int = 0
    num_tokens: int = 0
    """Tokens of the distinct pairs, prompts included, as if nothing were shared."""
    num_computed: int = 0
    """Tokens that went through the model, padding included."""
    score_s: float = 0.0
    """Seconds inside ``score_tokens``."""

    @property
    def num_saved(self) -> int:
        """Tokens that sharing beginnings saved; padding can make it negative."""
        return self.num_tokens - self.num_computed

    def count(self, groups: Sequence[CandidateTokens], pairs: PairSet) -> None:
        """Take in what was given to a call, and what of it is distinct."""
        self.num_pairs += sum(len(g.lengths) for g in groups)
        self.num_rejected += sum(len(g.lengths) for g in groups if g.reason is not None)
        self.num_truncated += sum(g.num_truncated for g in groups)
        self.num_distinct += len(pairs)
        self.num_tokens += pairs.num_tokens
