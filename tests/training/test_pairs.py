"""Which rows make a batch, and what is read of a pairs table."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.errors import BadInputError, NoInputError
from qbatch.manifest import Generation, file_entry, publish
from qbatch.schema import FILES, TRAINING_PAIRS
from qbatch.storage import Storage
from qbatch.training.pairs import PairTable, plan_batches, sample_negatives

TASKS = {0: "find", 1: "compare", 2: None}


def write(path: Path, rows: list[dict], row_group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
    return path


def numbered(count: int) -> list[dict]:
    """Rows of three instructions, unevenly."""
    return [
        {"query": f"q{i}", "document": f"d{i}", "instruction": TASKS[min(2, i % 5)]}
        for i in range(count)
    ]


@pytest.fixture
def table(tmp_path) -> PairTable:
    write(tmp_path / "pairs" / "a.parquet", numbered(60))
    write(tmp_path / "pairs" / "sub" / "b.parquet", numbered(43))
    return PairTable.open(str(tmp_path / "pairs"))


@pytest.mark.parametrize("window_rows", [1, 20, 1000])
@pytest.mark.parametrize("batch_size", [1, 4, 103])
def test_an_epoch_has_every_row_once_but_for_the_last(table, window_rows, batch_size):
    batches = list(plan_batches(table, batch_size=batch_size, seed=[1], window_rows=window_rows))
    assert len(batches) == len(table) // batch_size
    assert {len(batch) for batch in batches} == {batch_size}
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < len(table)


def test_batches_are_of_one_task_as_far_as_its_rows_go(table):
    batches = list(plan_batches(table, batch_size=4, seed=[1]))
    mixed = [batch for batch in batches if len(set(table.tasks[batch].tolist())) > 1]
    assert table.num_tasks == 3
    assert len(mixed) <= 2  # at most three rows are left of each of three tasks


def test_the_order_follows_from_the_seed(table):
    plans = [
        np.concatenate(list(plan_batches(table, batch_size=4, seed=seed, window_rows=20)))
        for seed in ([1, 0], [1, 0], [1, 1])
    ]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert not np.array_equal(plans[0], plans[2])
    assert not np.array_equal(np.sort(plans[0][:20]), np.arange(20))


def test_rows_come_in_the_order_asked_for(table):
    rows = np.array([99, 0, 60, 59, 0])
    taken = table.take(rows)
    assert taken["query"].to_pylist() == ["q39", "q0", "q0", "q59", "q0"]
    assert taken.schema.names == TRAINING_PAIRS.names
    assert taken["negatives"].null_count == len(rows)


def test_a_published_table_is_read_at_its_newest_generation(tmp_path):
    storage = Storage(str(tmp_path / "table"))
    for number in range(2):
        path = write(tmp_path / "table" / "data" / f"{number}.parquet", numbered(5 + number))
        entry = file_entry(f"data/{number}.parquet", 5 + number, path.read_bytes())
        draft = Generation(
            kind="pairs",
            fingerprint={},
            config={},
            counts={},
            files=pa.Table.from_pylist([entry], schema=FILES),
            rejects=FILES.empty_table(),
        )
        publish(storage, draft, after=number)
    table = PairTable.open(storage.uri)
    assert len(table) == 6
    assert table.files[0]["sha256"] == entry["sha256"]


def test_a_single_file_may_be_named(tmp_path):
    assert len(PairTable.open(str(write(tmp_path / "p.parquet", numbered(9))))) == 9


@pytest.mark.parametrize("name", ["nothing", "nothing.parquet"])
def test_no_pairs_are_no_input(tmp_path, name):
    with pytest.raises(NoInputError, match="no pairs in"):
        PairTable.open(str(tmp_path / name))


def test_a_table_without_documents_is_refused(tmp_path):
    path = write(tmp_path / "p.parquet", [{"query": "a", "text": "b"}])
    with pytest.raises(BadInputError, match="has no column 'document'"):
        PairTable.open(str(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": None}, "query is null or empty in 1 rows, such as row 2 of row group 0"),
        ({"document": ""}, "document is null or empty in 1 rows"),
        ({"negatives": ["x", None]}, "a negative is null or empty"),
        ({"negatives": ["x"], "negative_ids": ["1", "2"]}, "negatives and negative_ids differ"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(tmp_path, row, message):
    good = {"query": "q", "document": "d", "negatives": ["n"], "negative_ids": ["1"]}
    if "negative_ids" not in row:
        good["negative_ids"] = None
    path = write(tmp_path / "p.parquet", [good, good, good | row])
    table = PairTable.open(str(path))
    with pytest.raises(BadInputError, match=message):
        table.take(np.array([0]))


def test_negatives_are_drawn_anew_each_epoch():
    np.testing.assert_array_equal(sample_negatives(3, 5, [0, 0, 7]), [0, 1, 2])
    draws = [sample_negatives(20, 4, [0, epoch, 7]) for epoch in range(30)]
    assert all(len(set(draw.tolist())) == 4 for draw in draws)
    assert {i for draw in draws for i in draw.tolist()} == set(range(20))
    np.testing.assert_array_equal(draws[3], sample_negatives(20, 4, [0, 3, 7]))
