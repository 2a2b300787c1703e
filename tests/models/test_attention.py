from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qbatch.models.attention import PackLayout, UnsupportedAttentionError, packed_attention

LENGTHS = np.array([7, 4, 4, 4, 2, 1, 1])


def layer(*, is_causal: bool, config_is_causal: bool = True) -> SimpleNamespace:
    return SimpleNamespace(is_causal=is_causal, config=SimpleNamespace(is_causal=config_is_causal))


def random_states(num_heads: int) -> torch.Tensor:
    """Return states as a model passes them: (1, heads, tokens, dim), laid out token by token."""
    return torch.randn(1, int(LENGTHS.sum()), num_heads, 8).transpose(1, 2)


PARENTS = np.array([-1, 0, 1, 0, -1, 4, 3])
"""Of segments of ``LENGTHS``: chains of up to three, and a second tree."""


def test_segments_attend_to_what_they_continue():
    torch.manual_seed(0)
    query, key, value = random_states(4), random_states(2), random_states(2)
    pack = PackLayout.from_lengths(LENGTHS, torch.device("cpu"), PARENTS)
    output, _ = packed_attention(
        layer(is_causal=True), query, key, value, None, pack=pack, scaling=0.3
    )
    starts = np.cumsum(LENGTHS) - LENGTHS
    for segment in range(len(LENGTHS)):
        rows, ancestor = [], segment
        while ancestor >= 0:
            rows = [*range(starts[ancestor], starts[ancestor] + LENGTHS[ancestor]), *rows]
            ancestor = PARENTS[ancestor]
        for i, row in enumerate(rows[-LENGTHS[segment] :], start=len(rows) - LENGTHS[segment]):
            for head in range(4):
                seen = rows[: i + 1]
                scores = key[0, head // 2, seen] @ query[0, head, row] * 0.3
                expected = scores.softmax(0) @ value[0, head // 2, seen]
                torch.testing.assert_close(output[0, row, head], expected)


def test_what_a_segment_does_not_continue_cannot_touch_it():
    torch.manual_seed(0)
    states = random_states(2)
    poisoned = states.clone()
    poisoned[:, :, 7 + 4 :] = torch.nan  # all but the first two segments, 1 continues 0
    pack = PackLayout.from_lengths(LENGTHS, torch.device("cpu"), PARENTS)
    clean, spoilt = (
        packed_attention(layer(is_causal=True), x, x, x, None, pack=pack)[0]
        for x in (states, poisoned)
    )
    assert torch.equal(spoilt[:, : 7 + 4], clean[:, : 7 + 4])
    assert spoilt[:, 7 + 4 :].isnan().any()


def test_the_rows_of_the_variable_length_kernel_are_those_of_the_chains():
    pack = PackLayout.from_lengths(LENGTHS, torch.device("cpu"), PARENTS)
    starts, chains = np.cumsum(LENGTHS) - LENGTHS, []
    for segment, parent in enumerate(PARENTS):
        own = [*range(starts[segment], starts[segment] + LENGTHS[segment])]
        chains.append([*chains[parent], *own] if parent >= 0 else own)
    assert pack.shared.rows.tolist() == [row for chain in chains for row in chain]
    assert pack.shared.cu_keys.diff().tolist() == [len(chain) for chain in chains]
    assert pack.shared.max_keys == max(map(len, chains))


def test_segments_of_a_model_that_sees_the_future_are_refused():
    states = random_states(2)
    pack = PackLayout.from_lengths(LENGTHS, torch.device("cpu"), PARENTS)
    with pytest.raises(UnsupportedAttentionError, match="is not causal"):
        packed_attention(layer(is_causal=False), states, states, states, None, pack=pack)


def naive_attention(query, key, value, *, is_causal: bool, scale: float) -> torch.Tensor:
    """Return softmax(q k) v written out, one text and one head at a time."""
    group = query.shape[1] // key.shape[1]
    output = torch.zeros(query.shape[2], query.shape[1], query.shape[3])
    for start, length in zip(np.cumsum(LENGTHS) - LENGTHS, LENGTHS, strict=True):
        rows = slice(start, start + length)
        for head in range(query.shape[1]):
            q, k, v = (
                query[0, head, rows],
                key[0, head // group, rows],
                value[0, head // group, rows],
            )
            scores = q @ k.T * scale
            if is_causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            output[rows, head] = scores.softmax(-1) @ v
    return output[None]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_each_text_attends_to_itself_only(is_causal, num_kv_heads):
    torch.manual_seed(0)
    query, key, value = random_states(4), random_states(num_kv_heads), random_states(num_kv_heads)
    pack = PackLayout.from_lengths(LENGTHS, torch.device("cpu"))
    output, weights = packed_attention(
        layer(is_causal=is_causal), query, key, value, None, pack=pack, scaling=0.3
    )
    expected = naive_attention(query, key, value, is_causal=is_causal, scale=0.3)
    torch.testing.assert_close(output, expected)
    assert weights is None


def test_a_decoder_configured_as_bidirectional_sees_the_future():
    torch.manual_seed(0)
    states = random_states(2)
    pack = PackLayout.from_lengths(LENGTHS, torch.device("cpu"))
    module = layer(is_causal=True, config_is_causal=False)
    output, _ = packed_attention(module, states, states, states, None, pack=pack, scaling=1.0)
    expected = naive_attention(states, states, states, is_causal=False, scale=1.0)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("option", ["sliding_window", "softcap", "position_bias", "s_aux"])
def test_what_would_change_the_result_is_refused(option):
    states = random_states(2)
    pack = PackLayout.from_lengths(LENGTHS, torch.device("cpu"))
    with pytest.raises(UnsupportedAttentionError, match=option):
        packed_attention(
            layer(is_causal=True), states, states, states, None, pack=pack, **{option: 4}
        )


def test_a_model_that_swallows_the_layout_is_refused():
    states = random_states(2)
    with pytest.raises(UnsupportedAttentionError, match="passes no layout"):
        packed_attention(layer(is_causal=True), states, states, states, None)
