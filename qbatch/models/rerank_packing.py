"""Which pairs share one forward pass, and the tokens of that pass.

Pairs of one query lie together. Where the model allows it, what all pairs of a call begin with is
one segment of a pack, the rest of each query's beginning is a segment that continues it, and
documents continue that: system prompt and instruction are computed once a pack, and so is a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from qbatch.models.packing import common_prefix, distinct_texts, plan_packs
from qbatch.models.rerank_tokens import CandidateTokens

_MIN_SHARED_TOKENS = 8
"""A shorter beginning saves less than the attention across segments costs."""

_MAX_PREFIX_SHARE = 4
"""A pack grows beyond its budget rather than give more than this part of it, a fourth, to what its
documents continue: long queries would else be computed again for every few documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPack:
    """The tokens of one forward pass."""

    ids: np.ndarray
    """int64, shape (tokens,): the segments one after the other."""
    positions: np.ndarray
    """int64, shape (tokens,): of each token in its text."""
    type_ids: np.ndarray | None
    """int64, shape (tokens,); None where all are of type 0."""
    lengths: np.ndarray
    """int64, shape (segments,)."""
    parents: np.ndarray | None
    """int64, shape (segments,): the segment that each continues, or -1; None: each is a text."""
    pairs: np.ndarray
    """int64, shape (pairs,): the segment at whose end each pair ends."""
    num_scored: np.ndarray
    """int64, shape (pairs,): how many of its last tokens are a query to be scored."""


class PairSet:
    """The pairs of a call, each distinct one once, in the order in which they are packed."""

    def __init__(self, groups: Sequence[CandidateTokens], *, share_prefixes: bool) -> None:
        """Sort the pairs of ``groups``; those of rejected queries are left out."""
        self._groups = [_Group(tokens) for tokens in groups]
        self._shares = share_prefixes and all(
            len(g.tokens.before) >= _MIN_SHARED_TOKENS for g in self._groups if len(g.first)
        )
        self._num_common = _common_beginning([g.tokens for g in self._groups if len(g.first)])
        counts = np.array([len(g.first) for g in self._groups], np.int64)
        owners = np.repeat(np.arange(len(counts)), counts)
        nothing = np.empty(0, np.int64)
        firsts = np.concatenate([nothing, *(g.first for g in self._groups)])
        lengths = np.concatenate([nothing, *(g.tail_lengths[g.first] for g in self._groups)])
        heads = np.array([len(g.tokens.before) for g in self._groups], np.int64)
        full = lengths + heads[owners]
        order = np.lexsort((-lengths, owners)) if self._shares else np.argsort(-full, kind="stable")
        self._order = order
        self._owners, self._firsts, self._full = owners[order], firsts[order], full[order]

    def __len__(self) -> int:
        """Return the number of distinct pairs."""
        return len(self._order)

    @property
    def num_tokens(self) -> int:
        """Tokens of the distinct pairs, prompts included, as if nothing were shared."""
        return int(self._full.sum())

    def tokens_between(self, first: int, stop: int) -> int:
        """Return the tokens of the pairs ``first`` to ``stop`` as if nothing were shared."""
        return int(self._full[first:stop].sum())

    def plan(self, token_budget: int) -> list[tuple[int, int]]:
        """Return (first, stop) of packs that hold about ``token_budget`` tokens each.

        A pack has at least one pair. One of pairs with a long beginning in common may be larger, up
        to four times that beginning.
        """
        if not len(self):
            return []
        if not self._shares:
            packs = plan_packs(self._full, token_budget)  # sorted already: packs are ranges
            bounds = np.cumsum([0, *map(len, packs)]).tolist()
            return list(pairwise(bounds))
        bounds, filled, owner, limit = [0], self._num_common, -1, token_budget
        for i, pair_owner in enumerate(self._owners.tolist()):
            head = len(self._groups[pair_owner].tokens.before)
            own = int(self._full[i]) - head
            stem = head - self._num_common if pair_owner != owner else 0
            limit = max(token_budget, _MAX_PREFIX_SHARE * head)
            if i > bounds[-1] and filled + stem + own > limit:
                bounds.append(i)
                filled, stem = self._num_common, head - self._num_common
            filled += stem + own
            owner = pair_owner
        return list(zip(bounds, [*bounds[1:], len(self)], strict=True))

    def pack(self, first: int, stop: int) -> PairPack:
        """Return the tokens of the pairs ``first`` to ``stop``."""
        builder = _PackBuilder()
        common = self._groups[self._owners[first]].tokens.before[: self._num_common]
        root = builder.add([common], parent=-1) if self._shares else -1
        for owner, members in groupby(range(first, stop), lambda i: int(self._owners[i])):
            group = self._groups[owner]
            before = group.tokens.before
            stem = builder.add([before[len(common) :]], parent=root) if self._shares else -1
            for i in members:
                document = group.document(self._firsts[i])
                own = [np.empty(0, np.int32) if self._shares else before, document]
                builder.add_pair([*own, group.tokens.after], group.tokens, parent=stem)
        return builder.finish(has_parents=self._shares)

    def whole(self, first: int, stop: int) -> list[np.ndarray]:
        """Return the tokens of each of the pairs ``first`` to ``stop``, nothing shared: int32."""
        groups = [self._groups[self._owners[i]] for i in range(first, stop)]
        return [
            np.concatenate([group.tokens.before, group.document(row), group.tokens.after])
            for group, row in zip(groups, self._firsts[first:stop], strict=True)
        ]

    def scatter(self, scores: np.ndarray) -> list[np.ndarray]:
        """Return the scores of each group's documents, float32; NaN where it was rejected.

        Args:
            scores: Of the distinct pairs, in the order of this set.
        """
        ordered = np.empty(len(self), np.float32)
        ordered[self._order] = scores
        results = []
        start = 0
        for group in self._groups:
            own = ordered[start : start + len(group.first)]
            start += len(group.first)
            rejected = group.tokens.reason is not None
            missing = np.full(len(group.tokens.lengths), np.nan, np.float32)
            results.append(missing if rejected else own[group.inverse])
        return results


class _Group:
    """One query's tokens and which of its documents are distinct."""

    def __init__(self, tokens: CandidateTokens) -> None:
        self.tokens = tokens
        self.tail_lengths = tokens.lengths.astype(np.int64) + len(tokens.after)
        self.first, self.inverse = distinct_texts(tokens.ids, tokens.lengths)
        if tokens.reason is not None:
            self.first = self.first[:0]
        self._starts = np.cumsum(tokens.lengths, dtype=np.int64) - tokens.lengths

    def document(self, row: int) -> np.ndarray:
        start = self._starts[row]
        return self.tokens.ids[start : start + self.tokens.lengths[row]]


class _PackBuilder:
    """Collects the segments of a pack."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._types: list[int] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._parents: list[int] = []
        self._pairs: list[int] = []
        self._num_scored: list[int] = []

    def add(self, parts: list[np.ndarray], *, parent: int, later_type: int = 0) -> int:
        """Append a segment that continues ``parent``, unless it is empty; return the last one.

        ``later_type`` is the token type of all parts but the first.
        """
        length = sum(map(len, parts))
        if length == 0:
            return parent
        start = self._ends[parent] if parent >= 0 else 0
        self._parts += parts
        self._types += [0, *[later_type] * (len(parts) - 1)]
        self._starts.append(start)
        self._ends.append(start + length)
        self._parents.append(parent)
        return len(self._parents) - 1

    def add_pair(self, parts: list[np.ndarray], tokens: CandidateTokens, *, parent: int) -> None:
        segment = self.add(parts, parent=parent, later_type=tokens.document_type)
        self._pairs.append(segment)
        self._num_scored.append(tokens.num_scored)

    def finish(self, *, has_parents: bool) -> PairPack:
        positions = [np.arange(*span) for span in zip(self._starts, self._ends, strict=True)]
        return PairPack(
            ids=np.concatenate(self._parts).astype(np.int64),
            positions=np.concatenate(positions),
            type_ids=np.repeat(self._types, list(map(len, self._parts)))
            if any(self._types)
            else None,
            lengths=np.subtract(self._ends, self._starts),
            parents=np.array(self._parents, np.int64) if has_parents else None,
            pairs=np.array(self._pairs, np.int64),
            num_scored=np.array(self._num_scored, np.int64),
        )


def _common_beginning(groups: list[CandidateTokens]) -> int:
    """Return how many tokens all queries have before their documents in common."""
    ended = [np.append(group.before, -1) for group in groups]  # so that one may be all of another
    if not ended:
        return 0
    return common_prefix(np.concatenate(ended), np.array([len(before) for before in ended]))
