import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qbatch.models.rerank_packing import PairPack, PairSet
from qbatch.models.rerank_tokens import CandidateTokens


def group_of(before: list[int], documents: list[list[int]], after: list[int]) -> CandidateTokens:
    return CandidateTokens(
        before=np.array(before, np.int32),
        after=np.array(after, np.int32),
        ids=np.array([token for d in documents for token in d], np.int32),
        lengths=np.array([len(d) for d in documents], np.int32),
        num_scored=len(after),
        document_type=1,
    )


tokens = st.integers(0, 2)
groups_of_tokens = st.lists(
    st.builds(
        group_of,
        st.lists(tokens, max_size=6).map(lambda rest: [7] * 8 + rest),
        st.lists(st.lists(tokens, max_size=5), max_size=6),
        st.lists(tokens, min_size=1, max_size=2),
    ),
    min_size=1,
    max_size=4,
)


def spell(pack: PairPack) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and positions of each pair of a pack along the segments it continues."""
    stops = np.cumsum(pack.lengths)
    spelt = []
    for pair in pack.pairs:
        ids, positions, segment = [], [], pair
        while segment >= 0:
            rows = slice(stops[segment] - pack.lengths[segment], stops[segment])
            ids = [*pack.ids[rows].tolist(), *ids]
            positions = [*pack.positions[rows].tolist(), *positions]
            segment = -1 if pack.parents is None else pack.parents[segment]
        spelt.append((ids, positions))
    return spelt


def pairs_of(group: CandidateTokens) -> list[list[int]]:
    documents = np.split(group.ids, np.cumsum(group.lengths)[:-1]) if len(group.lengths) else []
    return [[*group.before.tolist(), *d.tolist(), *group.after.tolist()] for d in documents]


@given(groups=groups_of_tokens, token_budget=st.integers(1, 80), share=st.booleans())
def test_packs_spell_out_every_distinct_pair_once(groups, token_budget, share):
    pairs = PairSet(groups, share_prefixes=share)
    spelt = []
    for first, stop in pairs.plan(token_budget):
        pack = pairs.pack(first, stop)
        assert pack.lengths.min() > 0
        assert pack.parents is None or (pack.parents < np.arange(len(pack.parents))).all()
        for ids, positions in spell(pack):
            assert positions == list(range(len(ids)))
            spelt.append(ids)
    expected = [pair for g in groups for pair in {tuple(p): p for p in pairs_of(g)}.values()]
    assert sorted(spelt) == sorted(expected)
    assert pairs.num_tokens == sum(map(len, spelt))


@given(groups=groups_of_tokens, share=st.booleans())
def test_scores_return_to_their_documents(groups, share):
    pairs = PairSet(groups, share_prefixes=share)
    numbers: dict[tuple[int, ...], float] = {}
    scores = [
        numbers.setdefault(tuple(ids), len(numbers) + 0.5)
        for first, stop in pairs.plan(30)
        for ids, _ in spell(pairs.pack(first, stop))
    ]
    results = pairs.scatter(np.array(scores, np.float32))
    expected = [[numbers[tuple(p)] for p in pairs_of(group)] for group in groups]
    assert [r.tolist() for r in results] == expected


@given(groups=groups_of_tokens, token_budget=st.integers(1, 80))
def test_packs_stay_within_the_budget_or_four_times_what_they_share(groups, token_budget):
    pairs = PairSet(groups, share_prefixes=True)
    longest = max(len(g.before) for g in groups)
    for first, stop in pairs.plan(token_budget):
        size = pairs.pack(first, stop).lengths.sum()
        assert stop - first == 1 or size <= max(token_budget, 4 * longest)


def test_what_queries_share_is_one_segment():
    start = list(range(100, 120))
    groups = [group_of([*start, q], [[1], [2, 3], [4]], [9]) for q in (50, 51)]
    pairs = PairSet(groups, share_prefixes=True)
    pack = pairs.pack(0, 6)
    assert pack.lengths.tolist() == [20, 1, 3, 2, 2, 1, 3, 2, 2]
    assert pack.parents.tolist() == [-1, 0, 1, 1, 1, 0, 5, 5, 5]
    assert pack.pairs.tolist() == [2, 3, 4, 6, 7, 8]


def test_rejected_queries_take_part_in_no_pack():
    nothing = np.empty(0, np.int32)
    rejected = CandidateTokens(
        before=nothing,
        after=nothing,
        ids=nothing,
        lengths=np.zeros(2, np.int32),
        reason="query_too_long",
    )
    groups = [rejected, group_of([7] * 9, [[1], [1]], [9]), rejected]
    pairs = PairSet(groups, share_prefixes=True)
    assert len(pairs) == 1
    results = pairs.scatter(np.array([0.5], np.float32))
    assert [np.isnan(r).all() for r in results] == [True, False, True]
    assert results[1].tolist() == [0.5, 0.5]
    assert PairSet([rejected], share_prefixes=True).plan(100) == []


def test_types_follow_the_first_text():
    pairs = PairSet([group_of([5, 6, 7], [[1, 2]], [9])], share_prefixes=False)
    assert pairs.pack(0, 1).type_ids.tolist() == [0, 0, 0, 1, 1, 1]
