"""Losses against plain loops over the formula, and the cases of the mask one by one."""

import math
from collections.abc import Iterator

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn.functional import normalize

from qbatch.errors import ConfigError
from qbatch.training.losses import (
    ContrastiveBatch,
    ContrastiveConfig,
    answer_losses,
    contrastive_losses,
    listwise_losses,
    matryoshka_losses,
    two_way_losses,
)

ALL = slice(None)


def random_batch(
    num_rows: int, num_negatives: int, *, dim: int = 8, seed: int = 0, spread: float = 1.0
) -> ContrastiveBatch:
    """Rows of random unit vectors; some documents are repeated, some negatives are missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, 2 + num_negatives, dim)
    vectors = torch.ones(shape) + spread * torch.randn(shape, generator=generator)
    keys = torch.randint(0, 3 * num_rows, (num_rows, 1 + num_negatives, 2), generator=generator)
    present = torch.rand(num_rows, num_negatives, generator=generator) < 0.8
    vectors = normalize(vectors.double(), dim=-1)
    return ContrastiveBatch(vectors=vectors, keys=keys, present=present)


def naive_losses(batch: ContrastiveBatch, config: ContrastiveConfig) -> torch.Tensor:
    """Eq. 1, term by term."""
    losses = []
    for i in range(len(batch.keys)):
        positive = batch.vectors[i, 0] @ batch.vectors[i, 1]
        terms = [positive, *candidate_terms(batch, config, i, positive.item() + config.margin)]
        total = torch.stack([torch.exp(t / config.temperature) for t in terms]).sum()
        losses.append(-torch.log(torch.exp(positive / config.temperature) / total))
    return torch.stack(losses)


def candidate_terms(
    batch: ContrastiveBatch, config: ContrastiveConfig, i: int, limit: float
) -> Iterator[torch.Tensor]:
    query, positive = batch.vectors[i, :2]
    for j, (other, *documents) in enumerate(batch.vectors):
        if j != i and not same(batch, i, j, 0):
            yield from within([query @ other], limit)
        for k, document in enumerate(documents):
            is_there = (k == 0 or batch.present[j, k - 1]) and not same(batch, i, j, k)
            if j == i and k > 0 and is_there:
                yield from within([query @ document], limit)
            if j != i and is_there and (k == 0 or config.other_negatives):
                yield from within([query @ document], limit)
                between = positive @ document
                yield from within([between], limit) if config.mask_documents else [between]


def same(batch: ContrastiveBatch, i: int, j: int, k: int) -> bool:
    return bool((batch.keys[i, 0] == batch.keys[j, k]).any())


def within(scores: list[torch.Tensor], limit: float) -> list[torch.Tensor]:
    return [score for score in scores if score.item() <= limit]


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("other_negatives", [False, True])
@pytest.mark.parametrize("num_negatives", [0, 3])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_contrastive_loss_and_gradient_equal_plain_loops(
    mask_documents, other_negatives, num_negatives, spread
):
    config = ContrastiveConfig(
        temperature=0.1, mask_documents=mask_documents, other_negatives=other_negatives
    )
    batch = random_batch(7, num_negatives, spread=spread)
    batch.vectors.requires_grad_()
    losses = contrastive_losses(batch, ALL, config)
    expected = naive_losses(batch, config)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
    gradients = [torch.autograd.grad(x.mean(), batch.vectors)[0] for x in (losses, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_rows_may_be_computed_in_parts():
    batch, config = random_batch(9, 2), ContrastiveConfig()
    parts = [contrastive_losses(batch, slice(i, i + 4), config) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(parts), contrastive_losses(batch, ALL, config))


@pytest.mark.parametrize("mask_documents", [False, True])
def test_contrastive_gradient_is_that_of_finite_differences(mask_documents):
    batch = random_batch(4, 2, dim=5, seed=3)
    config = ContrastiveConfig(temperature=0.3, mask_documents=mask_documents)

    def loss(vectors: torch.Tensor) -> torch.Tensor:
        moved = ContrastiveBatch(vectors=vectors, keys=batch.keys, present=batch.present)
        return contrastive_losses(moved, ALL, config)

    assert torch.autograd.gradcheck(loss, batch.vectors.requires_grad_())


def test_without_mask_and_with_all_documents_it_is_the_loss_of_sentence_transformers():
    batch = random_batch(6, 2, seed=5)
    apart = ContrastiveBatch(
        vectors=batch.vectors,
        keys=torch.arange(36).view(6, 3, 2),
        present=torch.ones_like(batch.present),
    )
    reference = MultipleNegativesRankingLoss(
        model=None,
        scale=20.0,
        directions=("query_to_doc", "query_to_query", "doc_to_doc"),
        partition_mode="joint",
    ).compute_loss_from_embeddings(list(apart.vectors.unbind(1)), None)
    ours = contrastive_losses(apart, ALL, ContrastiveConfig(temperature=0.05, margin=10.0)).mean()
    assert ours.item() == pytest.approx(reference.item(), abs=1e-12)


def at(cosine: float) -> list[float]:
    """A unit vector of that cosine to the query of ``pair``."""
    return [cosine, math.sqrt(1 - cosine**2), 0.0]


QUERY = [1.0, 0.0, 0.0]


def one_row(negative: float, *, keys=((1, 1), (2, 2)), margin: float = 0.25) -> float:
    """The loss of a query, its positive at cosine 0.5, and one hard negative; temperature 1."""
    batch = ContrastiveBatch(
        vectors=torch.tensor([[QUERY, at(0.5), at(negative)]], dtype=torch.float64),
        keys=torch.tensor([keys]),
        present=torch.tensor([[True]]),
    )
    config = ContrastiveConfig(temperature=1.0, margin=margin)
    return contrastive_losses(batch, ALL, config).item()


def test_a_negative_exactly_at_the_margin_counts_and_one_above_does_not():
    assert one_row(0.75) == pytest.approx(math.log1p(math.exp(0.25)))
    assert one_row(math.nextafter(0.75, 1)) == 0
    assert one_row(0.99) == 0
    assert one_row(0.99, margin=1.0) == pytest.approx(math.log1p(math.exp(0.49)))


@pytest.mark.parametrize("key", [(1, 7), (7, 1)], ids=["text", "id"])
def test_a_negative_that_is_the_positive_does_not_count(key):
    assert one_row(0.2, keys=((1, 1), key)) == 0
    assert one_row(0.2) > 0


def two_rows(*, second_key: tuple[int, int], config: ContrastiveConfig) -> float:
    """The loss of the first of two rows without negatives that are close to each other."""
    first, second = [QUERY, at(0.5)], [at(0.5), at(0.6)]
    batch = ContrastiveBatch(
        vectors=torch.tensor([first, second], dtype=torch.float64),
        keys=torch.tensor([[(1, 1)], [second_key]]),
        present=torch.empty(2, 0, dtype=torch.bool),
    )
    return contrastive_losses(batch, slice(0, 1), config).item()


def test_a_row_with_the_same_positive_is_left_out_altogether():
    config = ContrastiveConfig(temperature=1.0)
    assert two_rows(second_key=(1, 9), config=config) == 0
    assert two_rows(second_key=(9, 1), config=config) == 0
    assert two_rows(second_key=(2, 2), config=config) > 0


def test_the_margin_holds_between_documents_only_if_asked_for():
    between = at(0.5)[0] * at(0.6)[0] + at(0.5)[1] * at(0.6)[1]
    assert between > 0.5 + 0.1
    query, document = math.exp(0.5 - 0.5), math.exp(0.6 - 0.5)
    document_too = math.exp(between - 0.5)
    for is_masked, others in ((True, query + document), (False, query + document + document_too)):
        config = ContrastiveConfig(temperature=1.0, margin=0.1, mask_documents=is_masked)
        assert two_rows(second_key=(2, 2), config=config) == pytest.approx(math.log1p(others))


def test_the_mask_has_no_gradient():
    batch = random_batch(5, 2, seed=8)
    batch.vectors.requires_grad_()
    config = ContrastiveConfig(margin=-2.0)  # below every cosine: all candidates are left out
    losses = contrastive_losses(batch, ALL, config)
    between = contrastive_losses(batch, ALL, ContrastiveConfig(margin=-2.0, mask_documents=True))
    assert losses.min() > 0  # documents among themselves are left
    assert between.max() == 0
    between.sum().backward()
    assert batch.vectors.grad.abs().max() == 0


def test_matryoshka_is_the_weighted_sum_over_widths():
    batch = random_batch(6, 2)
    config = ContrastiveConfig(dims=(8, 4, 2), dim_weights=(1.0, 0.5, 2.0))
    expected = sum(
        weight
        * naive_losses(
            ContrastiveBatch(
                vectors=normalize(batch.vectors[..., :dim], dim=-1),
                keys=batch.keys,
                present=batch.present,
            ),
            config,
        )
        for dim, weight in zip(config.dims, config.dim_weights, strict=True)
    )
    torch.testing.assert_close(matryoshka_losses(batch, ALL, config), expected)


def test_matryoshka_normalises_first():
    batch = random_batch(5, 1)
    longer = ContrastiveBatch(vectors=3 * batch.vectors, keys=batch.keys, present=batch.present)
    config = ContrastiveConfig()
    torch.testing.assert_close(
        matryoshka_losses(longer, ALL, config), contrastive_losses(batch, ALL, config)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"dims": (4, 4)}, "dims are"),
        ({"dims": (0,)}, "dims are"),
        ({"dims": (8, 4), "dim_weights": (1.0,)}, "dim_weights are"),
        ({"dims": (8,), "dim_weights": (-1.0,)}, "dim_weights are"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ContrastiveConfig(**settings)


def random_answers(num_pairs: int, vocab: int = 11, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits over a vocabulary and the log-likelihoods of its tokens 3 (no) and 7 (yes)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_pairs, vocab, generator=generator, dtype=torch.float64)
    return logits, logits.log_softmax(1)[:, [3, 7]]


def test_pointwise_loss_is_the_next_token_cross_entropy_over_the_vocabulary():
    logits, answers = random_answers(6)
    is_relevant = torch.tensor([True, False, False, True, False, True])
    expected = [
        -math.log(math.exp(row[7 if yes else 3]) / sum(math.exp(x) for x in row))
        for row, yes in zip(logits.tolist(), is_relevant.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        answer_losses(answers, is_relevant), torch.tensor(expected, dtype=torch.float64)
    )


def test_two_way_loss_knows_two_answers_only_and_is_binary_cross_entropy():
    logits, answers = random_answers(6, seed=1)
    is_relevant = torch.tensor([True, False, False, True, False, True])
    log_odds = logits[:, 7] - logits[:, 3]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        log_odds, is_relevant.double(), reduction="none"
    )
    torch.testing.assert_close(two_way_losses(answers, is_relevant), expected)
    torch.testing.assert_close(two_way_losses(logits[:, [3, 7]], is_relevant), expected)


def test_listwise_loss_is_the_positives_share_among_its_candidates():
    _, answers = random_answers(9, seed=2)
    counts, expected, start = [4, 1, 4], [], 0
    for count in counts:
        scores = [yes - no for no, yes in answers[start : start + count].tolist()]
        expected.append(-math.log(math.exp(scores[0]) / sum(math.exp(s) for s in scores)))
        start += count
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(listwise_losses(answers, counts), expected)


def test_reranker_gradients_are_those_of_finite_differences():
    logits, _ = random_answers(5, seed=3)
    is_relevant = torch.tensor([True, False, True, False, False])
    logits.requires_grad_()

    def answers(x: torch.Tensor) -> torch.Tensor:
        return x.log_softmax(1)[:, [3, 7]]

    assert torch.autograd.gradcheck(lambda x: answer_losses(answers(x), is_relevant), logits)
    assert torch.autograd.gradcheck(lambda x: two_way_losses(answers(x), is_relevant), logits)
    assert torch.autograd.gradcheck(lambda x: listwise_losses(answers(x), [3, 2]), logits)
