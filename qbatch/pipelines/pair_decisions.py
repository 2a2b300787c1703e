"""Which pairs stay: rules that look at one pair, then those that look at all of them.

Each pair gets one code. Rules come in this order, so a duplicate of a pair that fell to an earlier
rule stays: leak, cosine, exact duplicate, near-duplicate. A pair falls as a duplicate if an earlier
one that passed the rules before shares a key with it; which one that is does not matter, so the
keys are compared in as many parts as there are processes. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qbatch.corpus.reasons import (
    EVALUATION_LEAK,
    EXACT_DUPLICATE,
    LOW_COSINE,
    NEAR_DUPLICATE,
    NON_FINITE_VECTOR,
)
from qbatch.corpus.spans import Unit
from qbatch.errors import IntegrityError
from qbatch.pipelines.evaluation_queries import LeakCheck
from qbatch.pipelines.pair_source import PairSource, read_pairs
from qbatch.pipelines.unit_files import read_partial
from qbatch.storage import Storage
from qbatch.training.near_duplicates import NUM_BANDS, band_keys, text_keys

KEPT = 0

REASONS = (None, NON_FINITE_VECTOR, EVALUATION_LEAK, LOW_COSINE, EXACT_DUPLICATE, NEAR_DUPLICATE)
"""By code."""

_CODES = {reason: code for code, reason in enumerate(REASONS)}

_UNIT_SHIFT = 32
"""A pair's number is that of its unit, then its place in it."""

_KEYS = np.dtype([("key", "<u8"), ("pair", "<i8"), ("is_near", "?")])


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRules:
    """What decides about a pair; it travels."""

    output: str
    source: PairSource
    threshold: float
    """A pair stays if its cosine is strictly above."""
    near_duplicates: bool
    fingerprint: str
    """Id of everything that decides, besides the pairs; written into every file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredUnit:
    """A unit whose cosines are stored."""

    number: int
    """In the plan: what comes first among duplicates stays."""
    unit: Unit
    partial: str


def judge_units(
    units: Sequence[ScoredUnit], rules: PairRules, leaks: LeakCheck, num_parts: int
) -> list[np.ndarray | list[np.ndarray]]:
    """Return the codes of each unit's pairs, int8, then the keys of those kept, by part.

    Raises:
        IntegrityError: A unit has another number of pairs than cosines.
    """
    codes, keys = [], [np.empty(0, _KEYS)]
    storage = Storage(rules.output)
    for scored in units:
        cosines = read_partial(storage, scored.partial)["cosine"].to_numpy()
        pairs = read_pairs(scored.unit, rules.source).pairs
        if len(pairs) != len(cosines):
            raise IntegrityError(
                f"{scored.partial} has {len(cosines)} cosines for {len(pairs)} pairs; delete it "
                "and run the job again"
            )
        queries, documents = pairs["query"].to_pylist(), pairs["document"].to_pylist()
        own = np.zeros(len(pairs), np.int8)
        own[~(cosines > rules.threshold)] = _CODES[LOW_COSINE]
        own[leaks.is_leak(queries)] = _CODES[EVALUATION_LEAK]
        own[~np.isfinite(cosines)] = _CODES[NON_FINITE_VECTOR]
        codes.append(own)
        kept = np.flatnonzero(own == KEPT)
        texts = [queries[i] for i in kept], [documents[i] for i in kept]
        numbers = (scored.number << _UNIT_SHIFT) + kept
        keys.append(_rows(text_keys(*texts), numbers, is_near=False))
        if rules.near_duplicates and len(kept):
            bands = band_keys(*texts).reshape(-1)
            keys.append(_rows(bands, np.repeat(numbers, NUM_BANDS), is_near=True))
    rows = np.concatenate(keys)
    # The low bits choose the part: keys are hashes.
    parts = [rows[rows["key"] % num_parts == part] for part in range(num_parts)]
    return [codes, *parts]


def _rows(keys: np.ndarray, pairs: np.ndarray, *, is_near: bool) -> np.ndarray:
    rows = np.empty(len(keys), _KEYS)
    rows["key"], rows["pair"], rows["is_near"] = keys, pairs, is_near
    return rows


def find_duplicates(*parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of exact and of near-duplicates among the keys of one part.

    A pair is a duplicate if one of a lower number has the same key of the same kind.
    """
    rows = np.concatenate([np.empty(0, _KEYS), *parts])
    order = np.lexsort((rows["pair"], rows["key"], rows["is_near"]))
    rows = rows[order]
    repeats = np.zeros(len(rows), bool)
    repeats[1:] = rows["key"][1:] == rows["key"][:-1]
    repeats[1:] &= rows["is_near"][1:] == rows["is_near"][:-1]
    repeats[1:] &= rows["pair"][1:] != rows["pair"][:-1]
    return (
        np.unique(rows["pair"][repeats & ~rows["is_near"]]),
        np.unique(rows["pair"][repeats & rows["is_near"]]),
    )


def with_duplicates(
    codes: Sequence[np.ndarray], exact: np.ndarray, near: np.ndarray
) -> list[np.ndarray]:
    """Return the codes of all units with duplicates among them; exact ones count as such.

    Args:
        codes: By number of the unit.
        exact: Numbers of pairs, as near.
        near: In any order and repetition.
    """
    final = [own.copy() for own in codes]
    for found, reason in ((near, NEAR_DUPLICATE), (exact, EXACT_DUPLICATE)):
        numbers = np.unique(found)
        units = numbers >> _UNIT_SHIFT
        for unit in np.unique(units).tolist():
            places = numbers[units == unit] & ((1 << _UNIT_SHIFT) - 1)
            final[unit][places] = _CODES[reason]
    return final


def describe(code: int, cosine: float, threshold: float) -> str:
    """Return what a reject says besides its reason."""
    return {
        NON_FINITE_VECTOR: "the model gave NaN or infinity, or a zero vector",
        EVALUATION_LEAK: "its query is one of --evaluation, or nearly",
        LOW_COSINE: f"cosine {cosine:.4f} is not above {threshold:.4f}",
        EXACT_DUPLICATE: "an earlier pair has the same query and document",
        NEAR_DUPLICATE: "an earlier pair has nearly the same query and document",
    }[str(REASONS[code])]
