"""Queries, a corpus and a run in every form in which the rerank job takes them."""

import json
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.storage import Storage


@dataclass
class Candidates:
    """Rows are (query id, document id, rank, score)."""

    queries: dict[str, str]
    documents: dict[str, str]
    rows: list[tuple[str, str, int, float]] = field(default_factory=list)

    def of(self, query_id: str) -> list[str]:
        """Return the candidates of a query in retrieval order."""
        own = [row for row in self.rows if row[0] == query_id]
        return [doc_id for _, doc_id, _, _ in sorted(own, key=lambda row: row[2])]


def make_candidates(num_queries: int, num_candidates: int, num_documents: int) -> Candidates:
    """Return random candidates with texts of a few words, two documents of one text among them."""
    rng = np.random.default_rng(0)
    words = [f"w{i}x" for i in range(50)]

    def text(size: int) -> str:
        return " ".join(rng.choice(words, size))

    documents = {f"d{i}": text(int(rng.integers(2, 12))) for i in range(num_documents)}
    documents["d1"] = documents["d0"]
    made = Candidates({f"q{i}": text(3) for i in range(num_queries)}, documents)
    for query_id in made.queries:
        chosen = rng.permutation(num_documents)[:num_candidates]
        for rank, document in enumerate(chosen.tolist(), 1):
            made.rows.append((query_id, f"d{document}", rank, round(20 - 0.1 * rank, 3)))
    return made


def write_lines(uri: str, rows: list[dict]) -> None:
    storage, _, name = uri.rpartition("/")
    Storage(storage).write(name, "\n".join(json.dumps(row) for row in rows).encode())


def write_parquet(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage, _, name = uri.rpartition("/")
    Storage(storage).write(name, memoryview(sink.getvalue()))


def write_run(uri: str, made: Candidates, num_files: int = 3) -> dict[str, str]:
    """Write TREC files, queries and a corpus below a directory; return the flags that name them."""
    for i in range(num_files):
        lines = [f"{q} Q0 {d} {rank} {score} tag" for q, d, rank, score in made.rows[i::num_files]]
        Storage(f"{uri}/run").write(f"{i}.trec", "\n".join(lines).encode())
    write_lines(
        f"{uri}/queries.jsonl", [{"query_id": q, "text": t} for q, t in made.queries.items()]
    )
    items = list(made.documents.items())
    for i in range(num_files):
        rows = [{"doc_id": d, "text": t} for d, t in items[i::num_files]]
        write_lines(f"{uri}/corpus/{i}.jsonl", rows)
    return {
        "run": f"{uri}/run",
        "queries": f"{uri}/queries.jsonl",
        "corpus": f"{uri}/corpus",
    }


def long_rows(made: Candidates) -> list[dict]:
    return [
        {
            "query_id": q,
            "query": made.queries[q],
            "doc_id": d,
            "text": made.documents[d],
            "rank": rank,
            "score": score,
        }
        for q, d, rank, score in made.rows
    ]


def nested_rows(made: Candidates) -> list[dict]:
    rows = []
    for query_id, query in made.queries.items():
        documents = [
            {"doc_id": d, "text": made.documents[d], "rank": rank, "score": score}
            for q, d, rank, score in made.rows
            if q == query_id
        ]
        rows.append({"query_id": query_id, "query": query, "documents": documents})
    return rows


def parallel_rows(made: Candidates) -> list[dict]:
    names = ("doc_id", "text", "rank", "score")
    return [
        {"query_id": row["query_id"], "query": row["query"]}
        | {f"{name}s": [document[name] for document in row["documents"]] for name in names}
        for row in nested_rows(made)
    ]
