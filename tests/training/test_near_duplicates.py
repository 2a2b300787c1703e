"""Keys of texts against the similarities they stand for, computed shingle by shingle."""

import numpy as np
import pytest

from qbatch.training.near_duplicates import (
    HASHES_PER_BAND,
    NUM_BANDS,
    band_keys,
    normalised,
    text_keys,
)


def jaccard(a: str, b: str) -> float:
    one, other = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (normalised(a), normalised(b)))
    return len(one & other) / len(one | other)


def random_text(rng: np.random.Generator, num_words: int) -> list[str]:
    return ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 8))) for _ in range(num_words)]


def test_what_normalising_ignores_and_what_not():
    assert normalised("  Wide\uff21 CASE,\n\tpunctuation!?") == "widea case punctuation"
    assert normalised("Straße_und") == "strasse und"
    assert normalised("日本語、テキスト") == "日本語 テキスト"
    assert normalised("?") != normalised("!")


def test_exact_keys_are_equal_for_texts_that_are_normalised_alike():
    keys = text_keys(["A b", "a  B!", "ab", "x"], ["one", "One.", "one", "one"])
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 3
    assert text_keys(["a b"], ["c"]) != text_keys(["a"], ["b c"])


def test_keys_are_the_same_in_every_release():
    """Stored nowhere, but part of what a rerun decides: a change must be a decision."""
    assert text_keys(["qbatch"]).tolist() == [15529621369890147633]
    assert band_keys(["near duplicates of training pairs"])[0, :2].tolist() == [
        18156749145370213175,
        14278297852818377368,
    ]


@pytest.mark.parametrize(("share_changed", "sought"), [(0.02, True), (0.6, False)])
def test_similar_texts_share_a_band_and_others_do_not(share_changed, sought):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        words = random_text(rng, 60)
        other = list(words)
        for i in rng.choice(60, int(60 * share_changed), replace=False):
            other[i] = "".join(random_text(rng, 1))
        one, two = band_keys([" ".join(words)]), band_keys([" ".join(other)])
        similarity = jaccard(" ".join(words), " ".join(other))
        assert (similarity > 0.85) == sought
        found.append(bool((one == two).any()))
    assert np.mean(found) > 0.95 if sought else np.mean(found) < 0.05


def test_the_share_of_equal_hashes_is_the_similarity():
    """The law of MinHash, seen through single-hash bands: P(all of a band equal) = s**8."""
    rng = np.random.default_rng(1)
    words = random_text(rng, 400)
    other = [*words[:-40], *random_text(rng, 40)]
    one, two = (
        band_keys([" ".join(w[i:] + w[:i]) for i in range(0, 400, 10)]) for w in (words, other)
    )
    similarity = jaccard(" ".join(words), " ".join(other))
    share = (one == two).mean()
    assert share == pytest.approx(similarity**HASHES_PER_BAND, abs=0.15)


def test_rows_of_two_texts_need_both_to_be_similar():
    document = " ".join(random_text(np.random.default_rng(2), 80))
    keys = band_keys(["what is it made of", "who wrote this long poem"], [document, document])
    assert keys.shape == (2, NUM_BANDS)
    assert not (keys[0] == keys[1]).any()
    again = band_keys(["What is it made of?"], [document])
    assert (keys[0] == again[0]).all()


def test_long_texts_and_short_ones():
    rng = np.random.default_rng(3)
    long = " ".join(random_text(rng, 9000))
    assert (band_keys([long]) == band_keys([long + " end"])).mean() > 0.9
    keys = band_keys(["", "a", "abcd", "abcde"])
    assert len({tuple(row) for row in keys.tolist()}) == 4
    assert band_keys([]).shape == (0, NUM_BANDS)
