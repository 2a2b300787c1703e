"""Gates over small published tables, each against numbers worked out by hand or by scipy's rule."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from qbatch.errors import ConfigError
from qbatch.manifest import Generation, latest_generation, publish
from qbatch.pipelines.precompute_slices import partitions_of
from qbatch.pipelines.release_gates import (
    Gate,
    GatesConfig,
    check_gates,
    format_gates,
    kolmogorov_smirnov,
    mean_overlap,
)
from qbatch.pipelines.unit_files import store_plan, write_table_file
from qbatch.schema import FILES, RECOMMENDATIONS, UNITS
from qbatch.storage import Storage
from qbatch.tables import open_table
from tests.vector_tables import FINGERPRINT, clustered, rows_table, write_vectors

ROWS, DIM, PARTITIONS = 60, 8, 3
COUNTS = {"rows_in": ROWS, "rows_embedded": ROWS, "passages": ROWS, "rejected": {}}
Items = dict[str, list[tuple[str, float]]]


def write_answers(uri: str, items: Items, partitions: int = PARTITIONS) -> None:
    storage = Storage(uri)
    keys = sorted(items)
    homes = partitions_of(pa.array(keys), partitions)
    units = []
    for number in range(partitions):
        rows = [
            {"key": key, "items": [{"doc_id": d, "score": s} for d, s in items[key]]}
            for key, home in zip(keys, homes, strict=True)
            if home == number
        ]
        table = pa.Table.from_pylist(rows, schema=RECOMMENDATIONS)
        entry = write_table_file(storage, f"data/{number}", table)
        units.append({"unit_key": str(number), "spans": "{}", "counts": "{}", **entry})
    plan = store_plan(storage, pa.Table.from_pylist(units, schema=UNITS))
    files = pa.Table.from_pylist([{n: u[n] for n in FILES.names} for u in units], schema=FILES)
    publish_files(storage, "recommendations", files, {"keys": len(items)}, plan=plan)


def publish_files(storage: Storage, kind: str, files: pa.Table, counts: dict, **more) -> None:
    current = latest_generation(storage)
    draft = Generation(
        kind=kind,
        fingerprint={},
        config={},
        counts=counts,
        files=files,
        rejects=FILES.empty_table(),
        **more,
    )
    publish(storage, draft, after=current.number if current else 0)


def write_night(uri: str, answers: Items, *, vectors=None, ntotal=ROWS, recall=0.99, **counts):
    """Publish vectors, index and answers; return them as they are to be released."""
    matrix = clustered(ROWS, DIM) if vectors is None else vectors
    fingerprint = FINGERPRINT | {"dims": [DIM]}
    made = write_vectors(
        f"{uri}/vectors",
        {"a": rows_table(matrix, [f"d{i}" for i in range(len(matrix))])},
        fingerprint=fingerprint,
    )
    publish(
        Storage(f"{uri}/vectors"), replace(made, counts={**COUNTS, **counts}), after=made.number
    )
    details = {"recall": {"10": {"mean": recall, "low": recall, "high": recall}}}
    publish_files(
        Storage(f"{uri}/index"), "index", FILES.empty_table(), {"ntotal": ntotal}, details=details
    )
    write_answers(f"{uri}/answers", answers)
    return {name: open_table(f"{uri}/{name}") for name in ("vectors", "index", "answers")}


def answers_of(seed: int = 0, shift: float = 0.0, keys: int = 200) -> Items:
    rng = np.random.default_rng(seed)
    return {
        f"q{i}": [(f"d{d}", float(rng.normal() + shift)) for d in rng.choice(ROWS, 5, False)]
        for i in range(keys)
    }


def verdicts(gates: list[Gate]) -> dict[str, bool]:
    return {gate.name: gate.passed for gate in gates}


def failed(tables, last=None, **changes) -> list[str]:
    gates, _ = check_gates(tables, last, GatesConfig(**changes))
    return [gate.name for gate in gates if not gate.passed]


@pytest.fixture
def night(tmp_path):
    return write_night(str(tmp_path), answers_of())


def test_a_sound_night_passes_and_the_first_compares_with_nothing(night):
    gates, evaluation = check_gates(night, None, GatesConfig())
    assert all(verdicts(gates).values())
    assert evaluation is None
    assert set(verdicts(gates)) == {
        "rows of the corpus unaccounted for",
        "passages not listed",
        "vectors not indexed",
        "keys of answers not listed",
        "rejected rows",
        "vectors that are zero, NaN or infinite",
        "furthest length of a vector from 1",
        "recall@10 of the index",
    }
    gates, _ = check_gates(night, night, GatesConfig())
    by_name = {gate.name: gate.value for gate in gates}
    assert by_name["drift of the best scores of answers"] == 0
    assert by_name["overlap of answers with the last release"] == 1
    assert by_name["documents lost since the last release"] == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rows_in": ROWS + 1}, "rows of the corpus unaccounted for"),
        ({"passages": ROWS + 1}, "passages not listed"),
        ({"ntotal": ROWS - 1}, "vectors not indexed"),
        ({"recall": 0.85}, "recall@10 of the index"),
        (
            {"rows_in": ROWS + 1, "rejected": {"null_text": 1}},
            "rejected rows",
        ),
    ],
)
def test_what_does_not_balance_fails_its_own_gate(tmp_path, changes, name):
    assert failed(write_night(str(tmp_path), answers_of(), **changes)) == [name]


def test_rows_dropped_by_rule_are_no_faults(tmp_path):
    changes = {"rows_in": ROWS + 9, "rejected": {"empty_text": 9}}
    assert failed(write_night(str(tmp_path), answers_of(), **changes)) == []


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.nan, "vectors that are zero, NaN or infinite"),
        (0.0, "vectors that are zero, NaN or infinite"),
        (0.7, "furthest length of a vector from 1"),
    ],
)
def test_unsound_vectors_fail(tmp_path, value, name):
    vectors = clustered(ROWS, DIM)
    vectors[7] *= value
    assert failed(write_night(str(tmp_path), answers_of(), vectors=vectors)) == [name]


def test_a_lost_half_of_the_corpus_fails(tmp_path, night):
    half = write_night(
        f"{tmp_path}/half", answers_of(), vectors=clustered(ROWS, DIM)[:30],
        ntotal=30, rows_in=30, rows_embedded=30, passages=30,
    )  # fmt: skip
    assert failed(half, night) == ["documents lost since the last release"]
    assert failed(half, night, max_document_loss=0.5) == []
    assert failed(night, half) == []


def test_moved_scores_and_other_items_fail(tmp_path, night):
    moved = write_night(f"{tmp_path}/moved", answers_of(shift=1.0))
    assert failed(moved, night) == ["drift of the best scores of answers"]
    others = write_night(f"{tmp_path}/others", answers_of(seed=1))
    assert failed(others, night) == ["overlap of answers with the last release"]
    assert failed(others, night, min_overlap=0) == []


def test_another_model_is_not_compared(night):
    other = night["vectors"].generation
    changed = {**night, "vectors": replace_generation(night["vectors"], other)}
    gates, _ = check_gates(changed, night, GatesConfig())
    assert not [gate for gate in gates if "drift" in gate.name or "overlap" in gate.name]


def replace_generation(table, generation):
    fingerprint = {**generation.fingerprint, "weights_sha256": "other"}
    return replace(table, generation=replace(generation, fingerprint=fingerprint))


def test_keys_are_compared_across_another_number_of_partitions(tmp_path, night):
    write_answers(f"{tmp_path}/other", answers_of(), partitions=5)
    other = {**night, "answers": open_table(f"{tmp_path}/other")}
    gates, _ = check_gates(other, night, GatesConfig())
    assert [g.value for g in gates if "overlap" in g.name or "drift" in g.name] == [0.0, 1.0]


def test_many_keys_are_thinned_out_alike(tmp_path, night, monkeypatch):
    monkeypatch.setattr("qbatch.pipelines.release_gates._MAX_SAMPLED_KEYS", 50)
    write_answers(f"{tmp_path}/other", answers_of(), partitions=5)
    for other in (night, {**night, "answers": open_table(f"{tmp_path}/other")}):
        gates, _ = check_gates(night, other, GatesConfig())
        assert [g.value for g in gates if "overlap" in g.name or "drift" in g.name] == [0.0, 1.0]


def test_answers_are_measured_on_judgements(tmp_path):
    good = {"q1": [("d1", 0.9), ("d2", 0.8)], "q2": [("d3", 0.9)], "q3": []}
    worse = {"q1": [("d2", 0.9), ("d1", 0.8)], "q2": [("d9", 0.9)], "q3": [], "other": [("d1", 1)]}
    (tmp_path / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td3\t1\nq3\td4\t1\nq4\td5\t0\n"
    )
    now, before = write_night(f"{tmp_path}/a", worse), write_night(f"{tmp_path}/b", good)
    config = GatesConfig(qrels=f"{tmp_path}/qrels.tsv", min_ndcg=0.1, min_overlap=0)
    gates, evaluation = check_gates(now, before, replace(config, max_score_drift=1.0))
    discounted = 1 / np.log2(3)
    assert evaluation["metrics"]["ndcg@10"] == pytest.approx(discounted / 4)
    assert evaluation["compared_to"]["ndcg@10"] == pytest.approx(2 / 4)
    assert evaluation["comparison"]["ndcg@10"]["losses"] == 2
    assert [gate.name for gate in gates if not gate.passed] == [
        "drop of ndcg@10 since the last release"
    ]
    assert failed(before, now, qrels=config.qrels, min_overlap=0, max_score_drift=1.0) == []
    _, alone = check_gates(now, None, config)
    assert "compared_to" not in alone


def test_the_distance_of_two_distributions():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=300), rng.normal(0.5, size=200)
    grid = np.concatenate([left, right])
    by_hand = max(abs((left <= x).mean() - (right <= x).mean()) for x in grid)
    assert kolmogorov_smirnov(left, right) == pytest.approx(by_hand)
    assert kolmogorov_smirnov(left, left) == 0
    assert kolmogorov_smirnov(left, left + 100) == 1
    assert kolmogorov_smirnov(left[:0], right) == 1
    assert kolmogorov_smirnov(left[:0], right[:0]) == 0


def test_overlap_is_of_keys_in_both():
    def rows(items: dict[str, list[str]]) -> pa.Table:
        return pa.Table.from_pylist(
            [
                {"key": key, "items": [{"doc_id": d, "score": 1.0} for d in docs]}
                for key, docs in items.items()
            ],
            schema=RECOMMENDATIONS,
        )

    now = rows({"a": ["1", "2"], "b": [], "c": ["5"], "new": ["1"]})
    before = rows({"a": ["2", "3"], "b": [], "c": [], "gone": ["1"]})
    assert mean_overlap(now, before) == pytest.approx((0.5 + 1 + 0) / 3)
    assert mean_overlap(now, before.slice(3)) == 1


def test_a_table_of_gates_names_what_failed():
    gates = [
        Gate(name="norms", value=0.5, rule="at most", threshold=0.02),
        Gate(name="recall", value=0.99, rule="at least", threshold=0.9),
        Gate(name="drift", value=np.nan, rule="at most", threshold=0.2),
    ]
    assert format_gates([gate.as_dict() for gate in gates]) == (
        "gate    value  threshold     verdict\n"
        "norms   0.5    at most 0.02  FAIL\n"
        "recall  0.99   at least 0.9  pass\n"
        "drift   nan    at most 0.2   FAIL"
    )


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"min_overlap is 1.5; give 0 to 1"):
        GatesConfig(min_overlap=1.5)
    with pytest.raises(ConfigError, match="sampled_files is 0"):
        GatesConfig(sampled_files=0)
