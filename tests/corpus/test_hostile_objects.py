"""What hostile objects cost: the memory of reading them follows the plan, not what they claim.

Each is read in a process of its own, one unit after the other; what its peak grew by is compared.
"""

import gzip
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units
from tests.benchmarks.watching import peak_bytes, told_by_process

MIB = 2**20
MOST = 384 * MIB
"""Room for a line of 64 MiB, the longest that is parsed, or for 32 MiB of Parquet at once, while
it becomes documents; less than the whole object takes in each case."""


def write_huge_line(path: Path) -> None:
    line = json.dumps({"doc_id": "huge", "text": "x" * 400 * MIB})
    path.write_text(f'{{"doc_id": "a", "text": "one"}}\n{line}\n{{"doc_id": "b", "text": "two"}}\n')


def write_huge_text(path: Path) -> None:
    path.write_text("all one document " * (400 * MIB // 17))


def write_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1000):
            file.write(b"\0" * MIB)


def write_nested(path: Path) -> None:
    deep = "[" * 40 * MIB
    path.write_text(f'{{"doc_id": "a", "text": "one"}}\n{{"doc_id": "b", "text": {deep}\n')


def write_huge_row_group(path: Path) -> None:
    texts = [random.Random(i).randbytes(200).hex() for i in range(450_000)]
    table = pa.table({"doc_id": [str(i) for i in range(len(texts))], "text": texts})
    pq.write_table(table, path, row_group_size=len(texts), use_dictionary=False)


def write_many_columns(path: Path) -> None:
    columns = {f"column{i}": ["not asked for " * 40] * 10 for i in range(10_000)}
    pq.write_table(pa.table({**columns, "text": ["one"] * 10}), path, use_dictionary=False)


@pytest.mark.parametrize(
    ("name", "write", "documents", "rejects"),
    [
        ("line.jsonl", write_huge_line, 2, ["line_too_long"]),
        ("document.txt", write_huge_text, 1, []),
        ("bomb.jsonl.gz", write_bomb, 0, ["corrupt_file"]),
        ("nested.jsonl", write_nested, 1, ["bad_json"]),
        ("group.parquet", write_huge_row_group, 450_000, []),
        ("columns.parquet", write_many_columns, 10, []),
    ],
    ids=["line", "document", "bomb", "nested", "row group", "columns"],
)
def test_memory_follows_the_plan(tmp_path, name, write, documents, rejects):
    for folder in ("harmless", "hostile"):
        (tmp_path / folder).mkdir()
    write_harmless(tmp_path / "harmless")
    write(tmp_path / "hostile" / name)
    told = told_by_process(
        "tests.corpus.test_hostile_objects", *(str(tmp_path / f) for f in ("harmless", "hostile"))
    )
    assert told["documents"] == documents
    assert sorted(set(told["rejects"])) == rejects
    assert told["bytes"] < MOST, f"{told['bytes'] / MIB:.0f} MiB"


def write_harmless(folder: Path) -> None:
    """Write an object of each kind, whose reading loads what a process loads once."""
    (folder / "a.jsonl").write_text('{"doc_id": "a", "text": "one"}\n')
    (folder / "b.txt").write_text("one")
    with gzip.open(folder / "c.jsonl.gz", "wb") as file:
        file.write(b'{"doc_id": "c", "text": "one"}\n')
    pq.write_table(pa.table({"text": ["one"]}), folder / "d.parquet")


def read_all(path: str) -> dict[str, object]:
    """Read a corpus and keep nothing but counts."""
    documents, rejects = 0, []
    config = CorpusConfig(input=path)
    for unit in plan_units(config):
        rows = read_unit(unit, config)
        documents += len(rows.documents)
        rejects += rows.rejects["reason"].to_pylist()
    return {"documents": documents, "rejects": rejects}


def main(harmless: str, hostile: str) -> None:
    """Print what a hostile corpus holds, and by how much it raised the peak of memory."""
    read_all(harmless)
    before = peak_bytes()
    told = read_all(hostile)
    print(json.dumps({**told, "bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
