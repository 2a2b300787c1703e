"""The filter job in this process against a plain loop over all pairs."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from qbatch.errors import BadInputError, ConfigError, NoInputError
from qbatch.pipelines.filter_pairs import FilterPairsConfig, cosine_histogram, filter_pairs
from qbatch.pipelines.pair_decisions import _KEYS, find_duplicates, with_duplicates
from qbatch.schema import TRAINING_PAIRS
from qbatch.storage import Storage
from qbatch.tables import open_table
from qbatch.training.near_duplicates import normalised
from tests.pair_tables import embed_one_by_one, random_words, write_json_lines
from tests.vector_tables import clustered, rows_table, write_vectors

NUM_FILES, ROWS = 4, 30
LEAKED = "what will the evaluation ask of us in the end"


def make_rows() -> list[dict]:
    rng = np.random.default_rng(0)
    rows = [
        {"query": random_words(rng, 6), "doc_id": f"d{i}", "document": random_words(rng, 30)}
        for i in range(NUM_FILES * ROWS)
    ]
    rows[17] = {**rows[3], "query": rows[3]["query"].upper() + "!"}  # the same, in another file
    rows[40] = {**rows[3]}
    rows[50] = {**rows[9], "document": rows[9]["document"] + " x"}  # nearly the same
    rows[70] = {**rows[9], "query": random_words(rng, 6)}  # another question to one document
    rows[5]["query"] = LEAKED.title() + "?"
    rows[90]["query"] = LEAKED + " "
    rows[60]["query"] = None
    rows[61]["document"] = ""
    for row in rows[100:]:
        row.update(negatives=["one", "two"], negative_ids=["n1", "n2"], lang="en")
    return rows


def write_pairs(uri: str, rows: list[dict]) -> None:
    for i in range(NUM_FILES):
        write_json_lines(f"{uri}/pairs", f"{i}.jsonl", rows[i * ROWS : (i + 1) * ROWS])
    write_json_lines(f"{uri}/beir", "queries.jsonl", [{"_id": "q1", "text": LEAKED}])


def make_config(uri: str, model: str, **settings) -> FilterPairsConfig:
    return FilterPairsConfig(
        pairs=f"{uri}/pairs",
        output=f"{uri}/good",
        model=model,
        dtype="float32",
        **{
            "unit_bytes": 2000,
            "max_bad_fraction": 0.05,
            "quantile": 0.3,
            "evaluation": (f"{uri}/beir",),
            **settings,
        },
    )


def expected(rows: list[dict], model: str, config: FilterPairsConfig) -> dict[int, str]:
    """Outcome of every row by a loop; near-duplicates are the ones that were planted."""
    bad = {60: "missing_query", 61: "empty_text"}
    good = [i for i in range(len(rows)) if i not in bad]
    queries = embed_one_by_one(model, [rows[i]["query"] for i in good])
    documents = embed_one_by_one(model, [rows[i]["document"] for i in good])
    cosines = dict(zip(good, (queries * documents).sum(axis=1).tolist(), strict=True))
    threshold = config.min_cosine
    if config.quantile is not None:
        threshold = np.quantile(list(cosines.values()), config.quantile)
    outcomes, seen = dict(bad), set()
    for i in good:
        texts = (normalised(rows[i]["query"]), normalised(rows[i]["document"]))
        if texts[0] == normalised(LEAKED):
            outcomes[i] = "evaluation_leak"
        elif not cosines[i] > threshold:
            outcomes[i] = "low_cosine"
        elif texts in seen:
            outcomes[i] = "exact_duplicate"
        else:
            seen.add(texts)
            outcomes[i] = "kept"
    if outcomes[9] == "kept" and outcomes[50] == "kept":
        outcomes[50] = "near_duplicate"
    return outcomes


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_stays_is_what_a_loop_keeps_and_a_second_run_makes_nothing(s3_bucket, tiny_model):
    rows = make_rows()
    write_pairs(s3_bucket, rows)
    config = make_config(s3_bucket, tiny_model, keep_columns=("lang",))
    summary = filter_pairs(config)
    outcomes = expected(rows, tiny_model, config)
    wanted = Counter(outcomes.values())
    assert wanted["low_cosine"] > 20
    assert {"near_duplicate", "exact_duplicate", "evaluation_leak"} <= wanted.keys()
    assert summary["rows_out"] == wanted.pop("kept")
    assert summary["rejected"] == dict(sorted(wanted.items()))
    assert summary["rows_in"] == len(rows)
    assert sum(summary["cosines"].values()) == len(rows) - 2

    table = open_table(config.output)
    kept = table.to_table()
    assert kept.schema.names == [*TRAINING_PAIRS.names, "lang"]
    assert kept.select(TRAINING_PAIRS.names).schema == TRAINING_PAIRS
    texts = {(row["query"], row["document"]): i for i, row in reversed(list(enumerate(rows)))}
    found = [texts[row["query"], row["document"]] for row in kept.to_pylist()]
    assert sorted(found) == sorted(i for i, what in outcomes.items() if what == "kept")
    row = next(row for row in kept.to_pylist() if row["lang"] == "en")
    assert (row["negatives"], row["negative_ids"]) == (["one", "two"], ["n1", "n2"])
    oracle = embed_one_by_one(tiny_model, [row["query"], row["document"]])
    assert row["score"] == pytest.approx(float(oracle[0] @ oracle[1]), abs=1e-5)
    low = [r for r in table.rejects().to_pylist() if r["reason"] == "low_cosine"]
    assert "is not above" in low[0]["detail"]

    before = [(o.path, o.version) for o in Storage(config.output).iter_objects("data")]
    again = filter_pairs(config)
    assert (again["generation"], again["units_scored"]) == (1, 0)
    assert [(o.path, o.version) for o in Storage(config.output).iter_objects("data")] == before
    assert json.loads(Storage(config.output).read("report.json")) == again

    # Another threshold needs no model; the output can be filtered again.
    loose = filter_pairs(replace(config, quantile=None, min_cosine=-1.0))
    assert (loose["generation"], loose["units_scored"]) == (2, 0)
    assert "low_cosine" not in loose["rejected"]
    twice = filter_pairs(
        replace(config, pairs=config.output, output=f"{s3_bucket}/twice", quantile=0.5)
    )
    assert twice["rows_in"] == loose["rows_out"]
    assert twice["rejected"].keys() <= {"low_cosine"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_changed_file_is_scored_alone(tmp_path, tiny_model):
    rows = make_rows()
    write_pairs(str(tmp_path), rows)
    config = make_config(str(tmp_path), tiny_model, unit_bytes=10)
    first = filter_pairs(config)
    write_json_lines(f"{tmp_path}/pairs", "0.jsonl", rows[: ROWS - 1])
    second = filter_pairs(config)
    assert 0 < second["units_scored"] < first["units_scored"]
    assert second["rows_in"] == first["rows_in"] - 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_too_many_bad_pairs_publish_nothing(tmp_path, tiny_model):
    write_pairs(str(tmp_path), make_rows())
    config = make_config(str(tmp_path), tiny_model, max_bad_fraction=0.001)
    with pytest.raises(BadInputError, match="1 bad pairs among 120"):
        filter_pairs(config)
    assert not Storage(config.output).exists("manifests/00000001.json")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_no_pairs_and_other_tables_are_refused(tmp_path, tiny_model):
    with pytest.raises(NoInputError, match="no object to read"):
        filter_pairs(make_config(str(tmp_path), tiny_model, evaluation=()))
    write_vectors(f"{tmp_path}/pairs", {"a": rows_table(clustered(3, 4), ["a", "b", "c"])})
    with pytest.raises(ConfigError, match="holds vectors, not pairs"):
        filter_pairs(make_config(str(tmp_path), tiny_model, evaluation=()))


def test_duplicates_are_those_of_a_loop_whatever_the_parts():
    rng = np.random.default_rng(0)
    rows = np.empty(4000, _KEYS)
    rows["key"] = rng.integers(0, 500, len(rows))
    rows["pair"] = (rng.integers(0, 3, len(rows)) << 32) + rng.integers(0, 300, len(rows))
    rows["is_near"] = rng.random(len(rows)) < 0.5
    wanted: dict[bool, set[int]] = {False: set(), True: set()}
    for row in rows:
        same = rows[(rows["key"] == row["key"]) & (rows["is_near"] == row["is_near"])]
        if (same["pair"] < row["pair"]).any():
            wanted[bool(row["is_near"])].add(int(row["pair"]))
    for num_parts in (1, 7):
        parts = [rows[rows["key"] % num_parts == p] for p in range(num_parts)]
        found = [find_duplicates(part[::2], part[1::2]) for part in parts]
        exact, near = (np.concatenate(side) for side in zip(*found, strict=True))
        assert (set(exact.tolist()), set(near.tolist())) == (wanted[False], wanted[True])
    codes = [np.zeros(300, np.int8) for _ in range(3)]
    final = with_duplicates(codes, exact, near)
    assert {(u << 32) + int(i) for u in range(3) for i in np.flatnonzero(final[u] == 4)} == wanted[
        False
    ]


def test_histogram():
    values = np.array([0.7, 0.72, 0.749, 0.75, -0.01, np.nan], np.float32)
    assert cosine_histogram(values) == {"-0.05": 1, "0.70": 3, "0.75": 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"min_cosine": 2.0}, "min_cosine is 2.0; give -1 to 1"),
        ({"quantile": 1.0}, "quantile is 1.0; give 0 to below 1"),
        ({"stall_timeout_s": 0}, "stall_timeout_s is 0"),
        ({"max_bad_files": -1}, "max_bad_files is -1"),
        ({"max_bad_fraction": 3}, "max_bad_fraction is 3"),
    ],
)
def test_bad_settings_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        FilterPairsConfig(pairs="p", output="o", model="m", **flags)


def test_dry_run_starts_nothing(tmp_path, tiny_model):
    write_pairs(str(tmp_path), make_rows())
    config = make_config(str(tmp_path), tiny_model, dry_run=True)
    summary = filter_pairs(config)
    assert summary["dry_run"]
    assert summary["units"] >= NUM_FILES
    assert not (tmp_path / "good").exists()
