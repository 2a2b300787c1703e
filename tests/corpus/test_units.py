import itertools
import json
import tracemalloc

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.units import Span, Unit, plan_objects
from qbatch.storage import ObjectInfo

UNIT_BYTES = 1000 * 1000


def synthetic(name: str, size: int = 5000, version: str = "v") -> ObjectInfo:
    return ObjectInfo(f"s3://bucket/corpus/{name}", name, size, version)


def plan(objects, unit_bytes=UNIT_BYTES) -> list[Unit]:
    return list(plan_objects(objects, CorpusConfig(input="unused", unit_bytes=unit_bytes)))


spans = st.builds(
    Span,
    uri=st.text(min_size=1),
    size=st.integers(0, 2**50),
    version=st.text(),
    kind=st.sampled_from(["whole", "bytes", "rows"]),
).map(lambda s: s if s.kind == "whole" else Span(s.uri, s.size, s.version, s.kind, 3, 1, 9))


@given(st.lists(spans, min_size=1, max_size=5).map(tuple).map(Unit))
def test_json_round_trip(unit):
    assert Unit.from_json(unit.to_json()) == unit
    assert json.loads(unit.to_json())  # plain JSON, readable by any tool


def test_the_key_depends_on_spans_and_fingerprint_only():
    unit = Unit((Span("a", 1, "v"), Span("b", 2, "v")))
    others = [
        Unit((Span("a", 1, "v"),)),
        Unit((Span("b", 2, "v"), Span("a", 1, "v"))),
        Unit((Span("a", 1, "w"), Span("b", 2, "v"))),
        Unit((Span("a", 1, "v"), Span("b", 2, "v", "bytes", -1, 0, 2))),
    ]
    keys = {u.key("f") for u in [unit, *others]} | {unit.key("g")}
    assert len(keys) == 6
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)
    assert Unit.from_json(unit.to_json()).key("f") == unit.key("f")


def test_known_key():  # a changed key would make every finished unit look new
    unit = Unit((Span("s3://b/x.jsonl", 10, "etag", "bytes", -1, 0, 5),))
    assert unit.key("{}") == "f09883c1f7ad54d8c6dca0fab4576b05"


@given(st.lists(st.integers(0, 3 * UNIT_BYTES), max_size=60))
def test_every_object_is_planned_once(sizes):
    objects = [synthetic(f"{i:04d}.csv", size) for i, size in enumerate(sizes)]
    planned = sorted(span.uri for unit in plan(objects) for span in unit.spans)
    assert planned == [info.uri for info in objects]


names = st.lists(st.text("abcdef", min_size=4, max_size=12), min_size=2, max_size=400, unique=True)


@given(names, st.data())
def test_one_more_object_changes_at_most_two_units(names, data):
    extra = data.draw(st.sampled_from(names))
    size = data.draw(st.integers(0, 20_000))
    objects = [synthetic(f"{name}.txt") for name in sorted(names)]
    with_extra = [
        synthetic(info.path, size, "new") if info.path == f"{extra}.txt" else info
        for info in objects
    ]
    without = [info for info in objects if info.path != f"{extra}.txt"]
    for other in (with_extra, without):
        before, after = set(plan(objects)), set(plan(other))
        assert len(before - after) <= 2
        assert len(after - before) <= 2


def test_units_have_about_the_configured_size():
    objects = [synthetic(f"{i:06d}.jsonl", 20_000) for i in range(20_000)]
    units = plan(objects)
    sizes = [sum(span.size for span in unit.spans) for unit in units]
    assert 0.3 * UNIT_BYTES < sum(sizes) / len(sizes) < 1.5 * UNIT_BYTES
    assert max(sizes) <= 4 * UNIT_BYTES


def test_caps_hold_where_hashes_give_no_border():
    tiny = plan((synthetic(f"{i}.txt", 0) for i in range(30_000)), unit_bytes=2**40)
    assert [len(unit.spans) for unit in tiny[:-1]] == [4096] * 7
    halves = plan([synthetic(f"{i}.txt", UNIT_BYTES // 2) for i in range(1000)])
    assert max(len(unit.spans) for unit in halves) <= 8


def test_planning_is_lazy():
    endless = (synthetic(f"{i:09d}.txt") for i in itertools.count())
    units = plan_objects(endless, CorpusConfig(input="unused"))
    assert len(list(itertools.islice(units, 100))) == 100
    units.close()


def test_planning_200_000_objects_is_flat_in_memory():
    def peak_while_planning(num_objects: int) -> int:
        objects = (synthetic(f"part-{i:09d}.jsonl", 20_000) for i in range(num_objects))
        tracemalloc.reset_peak()
        config = CorpusConfig(input="unused", unit_bytes=UNIT_BYTES)
        num_planned = sum(len(unit.spans) for unit in plan_objects(objects, config))
        assert num_planned == num_objects
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        small, large = peak_while_planning(20_000), peak_while_planning(200_000)
    finally:
        tracemalloc.stop()
    assert large < 1.5 * small
    assert large < 8 * 2**20


@pytest.mark.parametrize("name", ["big.jsonl.gz", "big.csv", "big.jsonl.zst"])
def test_a_very_large_object_that_cannot_be_cut_is_named_in_a_warning(name, caplog):
    (unit,) = plan([synthetic(name, 9 * UNIT_BYTES)])
    assert unit.spans[0].kind == "whole"
    assert name in caplog.text
    caplog.clear()
    plan([synthetic(name, 7 * UNIT_BYTES)])
    assert caplog.text == ""


def test_lines_are_cut_into_equal_byte_ranges_without_being_read():
    units = plan([synthetic("big.jsonl", 5 * UNIT_BYTES + 1)])
    spans = [unit.spans[0] for unit in units]
    assert len(spans) == 6
    assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
    assert spans[-1].stop == 5 * UNIT_BYTES + 1
    assert {s.kind for s in spans} == {"bytes"}
