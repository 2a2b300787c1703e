from itertools import chain, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qbatch.models.packing import distinct_texts, equal_runs, gather_tokens, plan_packs

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
