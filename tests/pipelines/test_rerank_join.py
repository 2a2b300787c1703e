"""The join without a cluster: every pair and text arrives once, in units of whole queries."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.units import plan_units
from qbatch.errors import IntegrityError
from qbatch.pipelines.embed_task import unit_table
from qbatch.pipelines.rerank_join import (
    JoinInputs,
    RerankUnit,
    join_part,
    order_candidates,
    stored_units,
    unit_stats,
)
from qbatch.pipelines.rerank_lists import NestedColumns
from qbatch.pipelines.rerank_shuffle import (
    collect_wanted,
    shuffle_candidates,
    shuffle_documents,
    shuffle_queries,
    stable_hashes,
)
from qbatch.pipelines.rerank_sources import run_pairs, run_source
from qbatch.pipelines.segment_files import (
    find_segment,
    list_segments,
    read_segment,
    table_of,
    write_segments,
)
from qbatch.storage import Storage
from tests.candidate_tables import Candidates, make_candidates, write_run

NUM_PARTS = 8
COLUMNS = NestedColumns(
    query_id="query_id",
    doc_id="doc_id",
    text="text",
    rank="rank",
    score="score",
    documents="documents",
)


def join(uri: str, made: Candidates, unit_pairs: int) -> tuple[Storage, list[RerankUnit]]:
    """Run all steps of the join in this process."""
    flags, storage = write_run(uri, made), Storage(f"{uri}/out")
    sized = lambda path: (path, storage.info(path).size)  # noqa: E731
    source = run_source(flags["run"], COLUMNS)
    candidates = []
    for i, (part, _) in enumerate(source.parts()):
        shuffle_candidates(storage, f"c{i}", part, source=source, num_parts=NUM_PARTS)
        candidates.append(sized(f"c{i}"))
    wanted = collect_wanted(storage, candidates, NUM_PARTS)
    corpus = CorpusConfig(input=flags["corpus"], unit_bytes=2000)
    documents = []
    for i, unit in enumerate(plan_units(corpus)):
        path, units = f"d{i}", [unit.to_json()]
        shuffle_documents(storage, path, units, corpus=corpus, wanted=wanted, num_parts=NUM_PARTS)
        documents.append(sized(path))
    queries = CorpusConfig(input=flags["queries"], id_column="query_id")
    units = [unit.to_json() for unit in plan_units(queries)]
    shuffle_queries(storage, "q", units, queries=queries, num_parts=NUM_PARTS)
    inputs = JoinInputs(
        candidates=tuple(candidates),
        queries=(sized("q"),),
        documents=tuple(documents),
        num_parts=NUM_PARTS,
        has_texts=False,
    )
    joined = []
    for part in range(NUM_PARTS):
        units = join_part(storage, f"u{part}", part, inputs, unit_pairs)
        assert stored_units(storage, f"u{part}", sized(f"u{part}")[1]) == units
        assert [RerankUnit.from_json(unit.to_json()) for unit in units] == units
        joined += units
    return storage, joined


def rows_of(storage: Storage, unit: RerankUnit) -> tuple[list[dict], list[dict], dict]:
    row = table_of(read_segment(storage, unit.segment))
    tables = [unit_table(row, name).to_pylist() for name in ("pairs", "rejects")]
    return tables[0], tables[1], unit_stats(row)


@pytest.fixture
def made() -> Candidates:
    made = make_candidates(num_queries=80, num_candidates=7, num_documents=150)
    made.rows += [("q5", f"d{i}", 100 + i, 0.0) for i in range(120)]
    made.rows += [("q6", "gone", 50, 0.0), ("nobody", "d1", 1, 1.0), ("nobody", "gone", 2, 1.0)]
    return made


def test_every_candidate_arrives_once_with_its_texts(store_uri, made):
    storage, units = join(store_uri, made, unit_pairs=40)
    pairs, reasons, seen, counted = [], Counter(), Counter(), 0
    for unit in units:
        own, rejects, stats = rows_of(storage, unit)
        assert unit.pairs == stats["pairs"] == len(own)
        queries = list(dict.fromkeys(pair["query_id"] for pair in own))
        assert len(own) <= 40 or len(queries) == 1
        seen.update(queries)
        reasons.update(reject["reason"] for reject in rejects)
        pairs += own
        counted += stats["pairs_in"]
    assert counted == len(made.rows)
    assert set(seen.values()) == {1}  # a query is in one unit
    assert reasons == {"missing_document": 1, "missing_query": 2}
    wanted = {(q, d) for q, d, _, _ in made.rows if q != "nobody" and d != "gone"}
    assert Counter((p["query_id"], p["doc_id"]) for p in pairs) == Counter(wanted)
    for pair in pairs:
        assert pair["text"] == made.documents[pair["doc_id"]]
        assert pair["query"] == made.queries[pair["query_id"]]
    assert len(units) > 15


def test_a_changed_query_changes_its_own_unit_and_a_moved_run_none(tmp_path, made):
    _, units = join(str(tmp_path / "a"), made, unit_pairs=40)
    _, moved = join(str(tmp_path / "moved"), made, unit_pairs=40)
    # Units with rejects name the objects these stood in, which did move.
    assert len({u.content for u in units} - {u.content for u in moved}) <= 2
    made.queries["q9"] += " more"
    _, changed = join(str(tmp_path / "moved"), made, unit_pairs=40)
    assert len({u.content for u in moved} - {u.content for u in changed}) == 1


def test_order_follows_ranks_then_scores_and_repeats_count():
    run = pa.table(
        {
            "query_id": ["b", "a", "b", "b", "a"],
            "doc_id": ["x", "y", "z", "x", "w"],
            "score": pa.array([1.0, 5.0, 3.0, 9.0, 5.0], pa.float32()),
        }
    )
    ordered, repeats = order_candidates(run_pairs(run, "uri"))
    rows = [(r["query_id"], r["doc_id"], r["retrieval_rank"]) for r in ordered.to_pylist()]
    assert rows == [("b", "x", 1), ("b", "z", 2), ("a", "w", 1), ("a", "y", 2)]
    assert repeats.tolist() == [1, 0, 0, 0]


def test_hashes_of_ids_never_change():
    ids = pa.chunked_array([["a", "b"], ["a"]], pa.large_string())
    assert stable_hashes(ids).tolist() == [
        3_405_396_810_240_292_928,
        8_453_121_595_177_857_668,
        3_405_396_810_240_292_928,
    ]


def test_segments_read_back_and_damage_is_found(store_uri):
    storage = Storage(store_uri)
    segments = [b"one", b"", b"three" * 1000]
    written = write_segments(storage, "a/file", segments)
    size = storage.info("a/file").size
    assert list_segments(storage, "a/file", size) == written
    for i, data in enumerate(segments):
        found = find_segment(storage, "a/file", size, number=i, count=3)
        assert found == written[i]
        assert read_segment(storage, found) == data
    storage.write("a/file", storage.read("a/file").replace(b"one", b"two"))
    with pytest.raises(IntegrityError, match=r"bytes 0 to 3 of .* are damaged"):
        read_segment(storage, written[0])
    assert write_segments(storage, "a/none", iter(())) == []
    assert list_segments(storage, "a/none", storage.info("a/none").size) == []


def test_tokens_travel_as_they_are():
    from qbatch.models.rerank_tokens import CandidateTokens  # noqa: PLC0415
    from qbatch.pipelines.rerank_task import tokens_of, tokens_table  # noqa: PLC0415

    groups = [
        CandidateTokens(
            before=np.array([1, 2], np.int32),
            after=np.array([3], np.int32),
            ids=np.arange(size * 2, dtype=np.int32),
            lengths=np.full(size, 2, np.int32),
            num_scored=size,
        )
        for size in (2, 0, 3)
    ]
    for a, b in zip(groups, tokens_of(tokens_table(groups)), strict=True):
        for name in ("before", "after", "ids", "lengths"):
            assert getattr(a, name).tolist() == getattr(b, name).tolist()
            assert getattr(b, name).dtype == np.int32
        assert a.num_scored == b.num_scored
    assert groups[2].take(np.array([2, 0])).ids.tolist() == [4, 5, 0, 1]
