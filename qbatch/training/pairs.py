"""The pairs table on its way to training: which rows make a batch, and reading just those.

The order of an epoch follows from the seed and from the sizes and instructions of the row groups,
not from the number of processes; so any process can go on at any step.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.errors import BadInputError, NoInputError
from qbatch.manifest import latest_generation
from qbatch.schema import TRAINING_PAIRS
from qbatch.storage import Storage, parent_of

_WINDOW_ROWS = 2**20
"""Rows among which an epoch shuffles; whole row groups, themselves in random order."""

_TASK_COLUMNS = ("instruction", "document_instruction", "task")
"""Rows that agree on these share batches."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A part of a Parquet file that is read at once."""

    path: str
    number: int
    num_rows: int


class PairTable:
    """A pairs table: Parquet files of TRAINING_PAIRS, published or just lying in a directory."""

    def __init__(self, storage: Storage, files: Sequence[Mapping[str, Any]]) -> None:
        """Read what the files say about themselves; ``open`` is the way to get one.

        Args:
            storage: Where they are.
            files: ``path`` of each, and what names its content.
        """
        self._storage = storage
        self.files = [dict(file) for file in files]
        self.groups: list[RowGroup] = []
        self._columns: dict[str, list[str]] = {}
        codes: dict[tuple[str | None, ...], int] = {}
        self._tasks = [np.empty(0, np.int32)]
        for file in files:
            self._add_file(file["path"], codes)
        self.tasks = np.concatenate(self._tasks)
        """int32, shape (rows,): rows of one instruction and task have one number."""
        self.num_tasks = len(codes)
        self._starts = np.cumsum([0, *(group.num_rows for group in self.groups)])
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    @classmethod
    def open(cls, uri: str) -> "PairTable":
        """Open the newest generation of a published table, or the Parquet files of a directory.

        Raises:
            NoInputError: There are no rows.
            BadInputError: A file has other columns.
        """
        storage = Storage(uri)
        if uri.endswith(".parquet"):
            storage, name = parent_of(uri)
            found = [storage.info(name)] if storage.exists(name) else []
        elif (generation := latest_generation(storage)) is not None:
            entries = generation.files.select(["path", "bytes", "sha256"]).to_pylist()
            return cls(storage, entries)._with_rows(uri)
        else:
            found = [o for o in storage.iter_objects() if o.path.endswith(".parquet")]
        files = [{"path": o.path, "bytes": o.size, "version": o.version} for o in found]
        return cls(storage, files)._with_rows(uri)

    def _with_rows(self, uri: str) -> "PairTable":
        if not len(self):
            raise NoInputError(
                f"no pairs in {uri}; give a published pairs table, a Parquet file or a directory "
                "of them, with at least the columns query and document"
            )
        return self

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.tasks)

    def _add_file(self, path: str, codes: dict[tuple[str | None, ...], int]) -> None:
        with self._storage.open(path) as stream:
            file = pq.ParquetFile(stream)
            names = file.schema_arrow.names
            missing = [name for name in ("query", "document") if name not in names]
            if missing:
                raise BadInputError(
                    f"{self._storage.object_uri(path)} has no column {missing[0]!r}, its columns "
                    f"are {names}; a pairs table needs query and document. Rename its columns"
                )
            self._columns[path] = [name for name in TRAINING_PAIRS.names if name in names]
            task_columns = [name for name in _TASK_COLUMNS if name in names]
            for number in range(file.num_row_groups):
                num_rows = file.metadata.row_group(number).num_rows
                self.groups.append(RowGroup(path, number, num_rows))
                tasks = file.read_row_group(number, columns=task_columns) if task_columns else None
                self._tasks.append(_task_codes(tasks, num_rows, codes))

    def take(self, rows: np.ndarray) -> pa.Table:
        """Return rows by number, in the order given: TRAINING_PAIRS, with nulls for what is absent.

        Raises:
            BadInputError: A row has no query or document, or its negatives do not fit their ids.
        """
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(owners, kind="stable")
        parts = []
        for owner in np.unique(owners):
            own = rows[order[owners[order] == owner]] - self._starts[owner]
            parts.append(self._read(int(owner)).take(pa.array(own)))
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_tables(parts).take(pa.array(back))

    def _read(self, number: int) -> pa.Table:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        group = self.groups[number]
        with self._storage.open(group.path) as stream:
            table = pq.ParquetFile(stream).read_row_group(
                group.number, columns=self._columns[group.path]
            )
        table = _checked(_completed(table), self._storage.object_uri(group.path), group.number)
        self._cache[number] = table
        while sum(len(t) for t in self._cache.values()) > 2 * _WINDOW_ROWS and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return table


def _task_codes(
    table: pa.Table | None, num_rows: int, codes: dict[tuple[str | None, ...], int]
) -> np.ndarray:
    found = {} if table is None else table.to_pydict()
    columns = [found.get(name, [None] * num_rows) for name in _TASK_COLUMNS]
    keys = zip(*columns, strict=True)
    return np.fromiter((codes.setdefault(key, len(codes)) for key in keys), np.int32, num_rows)


def _completed(table: pa.Table) -> pa.Table:
    """Return the columns of TRAINING_PAIRS in its types."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in TRAINING_PAIRS
    ]
    return pa.table(columns, names=TRAINING_PAIRS.names)


def _checked(table: pa.Table, uri: str, number: int) -> pa.Table:
    problems = {
        "query is null or empty": _is_blank(table["query"]),
        "document is null or empty": _is_blank(table["document"]),
        "negatives and negative_ids differ in number": pc.fill_null(
            pc.not_equal(
                pc.list_value_length(table["negatives"]),
                pc.list_value_length(table["negative_ids"]),
            ),
            False,
        ),
    }
    for problem, is_bad in problems.items():
        if pc.any(is_bad).as_py():
            row = pc.index(is_bad, True).as_py()
            raise BadInputError(
                f"{uri} cannot be trained on: {problem} in {pc.sum(is_bad).as_py()} rows, such as "
                f"row {row} of row group {number}. Remove them"
            )
    if pc.any(_is_blank(pc.list_flatten(table["negatives"]))).as_py():
        raise BadInputError(
            f"{uri} cannot be trained on: a negative is null or empty in row group {number}. "
            "Remove it from its list"
        )
    return table


def _is_blank(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(pc.binary_length(column), 0), True)


def plan_batches(
    table: PairTable, *, batch_size: int, seed: Sequence[int], window_rows: int = _WINDOW_ROWS
) -> Iterator[np.ndarray]:
    """Yield the row numbers of each batch of an epoch: ``len(table) // batch_size`` batches.

    A batch has rows of one task as far as these go; what is left of the tasks is mixed. Rows that
    fill no batch at the end are left out.

    Args:
        table: Sizes of row groups and tasks of rows; nothing is read.
        batch_size: Rows of a batch.
        seed: Of this epoch.
        window_rows: Rows are shuffled among as many, in whole row groups.
    """
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *(group.num_rows for group in table.groups)])
    window = [np.empty(0, np.int64)]
    order = rng.permutation(len(table.groups))
    for i, number in enumerate(order):
        window.append(np.arange(starts[number], starts[number + 1]))
        if sum(map(len, window)) < window_rows and i + 1 < len(order):
            continue
        rows = rng.permutation(np.concatenate(window))
        batches, rest = _cut_by_task(rows, table.tasks, batch_size)
        for j in rng.permutation(len(batches)):
            yield batches[j]
        window = [rest]


def _cut_by_task(
    rows: np.ndarray, tasks: np.ndarray, batch_size: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return batches of one task, then mixed ones; and the rows that fill none."""
    batches: list[np.ndarray] = []
    leftovers = [np.empty(0, np.int64)]
    own = tasks[rows]
    for task in np.unique(own):
        batches += _cut(rows[own == task], batch_size)
        leftovers.append(batches.pop())
    mixed = _cut(np.concatenate(leftovers), batch_size)
    rest = mixed.pop()
    return batches + mixed, rest


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Return parts of ``size`` rows and, last, the rest, which may be empty."""
    return np.split(rows, np.arange(size, len(rows) + 1, size))


def sample_negatives(count: int, num_wanted: int, seed: Sequence[int]) -> np.ndarray:
    """Return which of a row's negatives an epoch uses: at most ``num_wanted``, in rising order."""
    if count <= num_wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, num_wanted, replace=False))
