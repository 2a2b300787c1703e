from itertools import chain, groupby, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qbatch.models.packing import (
    common_prefix,
    distinct_texts,
    equal_runs,
    gather_tokens,
    plan_packs,
)

lengths_arrays = st.lists(st.integers(1, 60), max_size=80).map(lambda x: np.array(x, np.int32))


@given(lengths=lengths_arrays, token_budget=st.integers(1, 200))
def test_packs_hold_every_text_once_within_the_budget(lengths, token_budget):
    packs = plan_packs(lengths, token_budget)
    order = [int(i) for pack in packs for i in pack]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for pack in packs:
        assert len(pack) == 1 or lengths[pack].sum() <= token_budget


@given(lengths=lengths_arrays, token_budget=st.integers(1, 200))
def test_no_pack_has_room_for_the_next_text(lengths, token_budget):
    packs = plan_packs(lengths, token_budget)
    for pack, following in pairwise(packs):
        assert lengths[pack].sum() + lengths[following[0]] > token_budget


def test_more_tokens_than_32_bits_hold_are_counted():
    lengths = np.full(3, 2**30, np.int32)
    assert [pack.tolist() for pack in plan_packs(lengths, 2**31)] == [[0, 1], [2]]


@given(lengths=lengths_arrays)
def test_runs_spell_out_the_lengths(lengths):
    runs = equal_runs(lengths)
    assert [length for length, count in runs for _ in range(count)] == lengths.tolist()
    assert all(a[0] != b[0] for a, b in pairwise(runs))


@given(lengths=lengths_arrays, seed=st.integers(0, 99))
def test_gathered_tokens_are_those_of_the_named_texts(lengths, seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 9, n).astype(np.int32) for n in lengths]
    order = rng.permutation(len(lengths))[: len(lengths) // 2 + 1]
    ids, positions = gather_tokens(np.concatenate([*texts, []]).astype(np.int32), lengths, order)
    assert ids.tolist() == [token for i in order for token in texts[i].tolist()]
    assert positions.tolist() == [k for i in order for k in range(lengths[i])]


def test_equal_texts_are_found_and_mere_prefixes_are_not():
    texts = [[1, 2], [1], [2, 1], [1, 2], [1]]
    ids = np.array(list(chain(*texts)), np.int32)
    first, inverse = distinct_texts(ids, np.array([len(t) for t in texts], np.int32))
    assert first.tolist() == [0, 1, 2]
    assert inverse.tolist() == [0, 1, 2, 0, 1]


@given(lengths=lengths_arrays, seed=st.integers(0, 99))
def test_runs_end_where_the_parent_changes(lengths, seed):
    parents = np.random.default_rng(seed).integers(-1, 2, len(lengths))
    pairs = list(zip(lengths.tolist(), parents.tolist(), strict=True))
    runs = [(key[0], len(list(run))) for key, run in groupby(pairs)]
    assert equal_runs(lengths, parents) == runs


@given(
    texts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=5),
    start=st.lists(st.integers(0, 1), max_size=4),
)
def test_the_common_prefix_leaves_every_text_a_token(texts, start):
    texts = [start + text for text in texts]
    ids = np.array(list(chain(*texts)), np.int32)
    count = common_prefix(ids, np.array([len(t) for t in texts], np.int32))
    is_common = [
        all(len(t) > n and t[:n] == texts[0][:n] for t in texts) for n in range(10 if texts else 1)
    ]
    assert is_common[count]
    assert not any(is_common[count + 1 :])


@given(lengths=lengths_arrays, seed=st.integers(0, 99))
def test_gathered_tokens_can_leave_out_the_start(lengths, seed):
    rng = np.random.default_rng(seed)
    lengths = lengths + 3
    ids = rng.integers(0, 9, lengths.sum())
    order = rng.permutation(len(lengths))
    tokens, positions = gather_tokens(ids, lengths, order, skip=3)
    texts = np.split(ids, np.cumsum(lengths)[:-1])
    assert tokens.tolist() == [token for i in order for token in texts[i][3:]]
    assert positions.tolist() == [k for i in order for k in range(3, lengths[i])]
