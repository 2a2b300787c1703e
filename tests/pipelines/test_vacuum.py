"""The vacuum over small hand-made tables: what goes, what stays, and in which order."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest

from qbatch.errors import ConfigError, IntegrityError, LeaseHeldError, NoInputError
from qbatch.lease import hold_lease, latest_lease
from qbatch.manifest import Generation, latest_generation, publish
from qbatch.pipelines.kept_files import referenced_files
from qbatch.pipelines.rollback import RollbackConfig, rollback
from qbatch.pipelines.status import StatusConfig, status
from qbatch.pipelines.unit_files import store_plan
from qbatch.pipelines.vacuum import VacuumConfig, vacuum
from qbatch.release import (
    Release,
    TableRef,
    latest_release,
    open_release,
    publish_release,
    release_numbers,
)
from qbatch.schema import FILES
from qbatch.storage import Storage
from tests.test_manifest import put_table

MODEL = "model-0123abcd"
WEEK_S = 7 * 86400


def put(storage: Storage, path: str) -> dict:
    """Write a small file that is like no other; return its FILES entry."""
    return put_table(storage, path, pa.table({"x": [path]}))


def publish_table(uri: str, kind: str, entries: list[dict], plan: pa.Table, **fields) -> TableRef:
    storage = Storage(uri)
    current = latest_generation(storage)
    made = publish(
        storage,
        Generation(
            kind=kind,
            fingerprint={},
            config={},
            counts={"rows_embedded": len(entries)},
            files=pa.Table.from_pylist(entries, schema=FILES),
            rejects=FILES.empty_table(),
            plan=store_plan(storage, plan),
            **fields,
        ),
        after=current.number if current else 0,
    )
    path = f"{MODEL}/{uri.rpartition('/')[2]}"
    return TableRef(path=path, generation=made.number)


def release_night(uri: str, night: int) -> Release:
    """Make the tables of one night as the jobs lay them out, and release them.

    Every night brings one vectors file of its own, keeps the one of the night before, and has an
    index whose plan still rests on a vectors file of the first night.
    """
    root, base = Storage(uri), f"{uri}/{MODEL}"
    vectors = Storage(f"{base}/vectors")
    entries = [put(vectors, f"data/night{n}.parquet") for n in (night, max(1, night - 1))]
    unit = {"unit_key": "u", **entries[0], "rejects": put(vectors, f"rejects/night{night}.parquet")}
    refs = {"vectors": publish_table(f"{base}/vectors", "vectors", entries, rows([unit]))}

    index = Storage(f"{base}/index")
    shard = {
        name: put(index, f"{name}/night{night}.parquet") for name in ("index", "ids", "probes")
    }
    shard["parts"] = [put(vectors, "data/night1.parquet"), entries[0]]
    template = put(index, f"templates/night{night}.faiss")
    index.write(f"training/night{night}.json", json.dumps({"template": template}).encode())
    details = {
        "vectors": {"uri": vectors.uri, "generation": refs["vectors"].generation},
        "training": {"template": template},
    }
    refs["index"] = publish_table(
        f"{base}/index", "index", [shard["index"], shard["ids"]], rows([shard]), details=details
    )

    answers = Storage(f"{base}/answers")
    delta = {"delta": {"files": [put(answers, f"delta/night{night}.parquet")]}}
    entry = put(answers, f"data/night{night}.parquet")
    refs["answers"] = publish_table(
        f"{base}/answers", "recommendations", [entry], rows([entry]), details=delta
    )
    run = Storage(f"{base}/answers/run")
    entry = put(run, f"data/night{night}.parquet")
    publish_table(f"{base}/answers/run", "run", [entry], rows([{"spans": "{}", **entry}]))
    for path in ("partials/x.arrow", "join/x.parquet", ".probe/x", "data/killed.parquet"):
        put(answers, path)
    answers.write("report.json", b"{}")
    answers.write("report.html", b"<p>")
    vectors.write("calibrations/0.json", b"{}")
    return publish_release(root, refs, current=latest_release(root), config={}, gates=[])


def rows(values: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(values)


def age(uri: str) -> None:
    """Make all files a week older."""
    for path in Path(uri).rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - WEEK_S
            os.utime(path, (then, then))


def paths(uri: str) -> set[str]:
    return {o.path for o in Storage(uri).iter_objects()}


def read_fully(release: Release) -> dict[str, list]:
    """Read every file that a release needs, by the manifests alone, checking every hash."""
    found = {}
    for name in release.tables:
        table = release.open(name)
        found[name] = [*table.iter_tables(), table.rejects()]
        if name == "index":
            vectors = release.open("vectors")
            assert vectors.generation.number == table.generation.details["vectors"]["generation"]
            plan = table.storage.read(table.generation.plan["path"])
            for shard in pa.parquet.read_table(pa.BufferReader(plan)).to_pylist():
                found["parts"] = [vectors.read_file(part) for part in shard["parts"]]
                found["probes"] = [table.read_file(shard["probes"])]
            found["template"] = [table.read_file(table.generation.details["training"]["template"])]
        if name == "answers":
            delta = table.generation.details["delta"]["files"]
            found["delta"] = [table.read_file(entry) for entry in delta]
    return found


@pytest.fixture
def nights(tmp_path) -> str:
    """Six nights, a week apart: by now all of them are old."""
    uri = str(tmp_path / "night")
    for night in range(1, 7):
        release_night(uri, night)
        age(uri)
    return uri


def test_what_no_kept_release_needs_goes_and_nothing_else(nights):
    config = VacuumConfig(output=nights, keep=2)
    before = {number: read_fully(open_release(nights, number)) for number in (5, 6)}
    opened = open_release(nights, 5)
    planned = vacuum(VacuumConfig(output=nights, keep=2, dry_run=True))
    everything = paths(nights)
    summary = vacuum(config)
    gone = everything - paths(nights)
    assert summary == {**planned, "dry_run": False}
    assert (summary["objects"], summary["releases"]) == (len(gone), [5, 6])
    assert sum(summary["bytes_by_directory"].values()) == summary["bytes"] > 0
    assert release_numbers(Storage(nights)) == [5, 6]
    for number, content in before.items():
        assert read_fully(open_release(nights, number)) == content
    assert read_fully(opened) == before[5]
    left = paths(f"{nights}/{MODEL}")
    assert {p for p in left if p.startswith("vectors/data/")} == {
        f"vectors/data/night{n}.parquet"
        for n in (1, 4, 5, 6)  # 1: the index rests on it
    }
    assert {p for p in left if p.startswith("answers/run/")} == {
        "answers/run/manifests/00000006.json",
        "answers/run/data/night6.parquet",
        *(p for p in left if p.startswith("answers/run/plans/")),
    }
    assert {p for p in left if "training/" in p} == {
        f"index/training/night{n}.json" for n in (5, 6)
    }
    assert not [p for p in left if "partials" in p or "join" in p or "killed" in p or "probe/" in p]
    assert {"answers/report.json", "answers/report.html", "vectors/calibrations/0.json"} <= left
    again = vacuum(config)
    assert (again["objects"], again["bytes"]) == (0, 0)
    assert (rollback(RollbackConfig(output=nights, release=5)))["release"] == 7
    assert [r["release"] for r in status(StatusConfig(output=nights))["releases"]] == [5, 6, 7]


def test_the_young_stays(nights):
    release_night(nights, 7)
    young = {p for p in paths(nights) if time.time() - Path(nights, p).stat().st_mtime < 3600}
    summary = vacuum(VacuumConfig(output=nights, keep=1))
    assert summary["releases"] == [7]
    assert "model-0123abcd/answers/data/killed.parquet" in young
    assert young <= paths(nights)
    storage = Storage(f"{nights}/{MODEL}/vectors")
    age(nights)
    put(storage, "data/tonight.parquet")
    vacuum(VacuumConfig(output=nights, keep=1))
    assert storage.exists("data/tonight.parquet")


def test_a_young_generation_keeps_its_old_files(nights):
    """It may be what a night in progress is pinned to, though no release names it."""
    vectors = Storage(f"{nights}/{MODEL}/vectors")
    entry = put(vectors, "data/night2.parquet")
    age(nights)
    publish_table(vectors.uri, "vectors", [entry], rows([entry]))
    publish_table(vectors.uri, "vectors", [], rows([{"x": 1}]))
    vacuum(VacuumConfig(output=nights, keep=1))
    assert vectors.exists("data/night2.parquet")


def test_it_works_over_s3(s3_bucket):
    uri = f"{s3_bucket}/night"
    for night in range(1, 4):
        release_night(uri, night)
    time.sleep(1.1)  # S3 tells whole seconds
    before = read_fully(open_release(uri))
    assert vacuum(VacuumConfig(output=uri, keep=1))["objects"] == 0
    summary = vacuum(VacuumConfig(output=uri, keep=1, min_age_hours=0))
    assert summary["objects"] > 10
    assert release_numbers(Storage(uri)) == [3]
    assert read_fully(open_release(uri)) == before
    assert not Storage(f"{uri}/{MODEL}/vectors").exists("rejects/night2.parquet")


def test_what_others_wrote_beside_the_tables_stays(nights):
    Path(nights, "corpus").mkdir()
    Path(nights, "corpus/a.jsonl").write_text("{}")
    Path(nights, "notes.txt").write_text("mine")
    age(nights)
    vacuum(VacuumConfig(output=nights, keep=1))
    assert {"corpus/a.jsonl", "notes.txt"} <= paths(nights)


def test_tables_of_an_abandoned_model_go_only_when_asked_for(nights):
    other = Path(nights, "model-ffffffff")
    Path(nights, MODEL).rename(Path(nights, "moved"))
    refs = release_tables_alone(nights, "model-ffffffff")
    Path(nights, "moved").rename(Path(nights, MODEL))
    age(nights)
    vacuum(VacuumConfig(output=nights))
    assert Storage(refs).exists("manifests/00000001.json")
    summary = vacuum(VacuumConfig(output=nights, drop_unreleased_models=True, dry_run=True))
    assert summary["objects"] == len([p for p in other.rglob("*") if p.is_file()])
    put(Storage(refs), "data/young.parquet")
    age_all_but = vacuum(VacuumConfig(output=nights, drop_unreleased_models=True))
    assert age_all_but["objects"] == summary["objects"]
    assert not Storage(refs).exists("manifests/00000001.json")


def release_tables_alone(uri: str, model: str) -> str:
    """Publish a vectors table of another model that no release names."""
    storage = Storage(f"{uri}/{model}/vectors")
    entry = put(storage, "data/a.parquet")
    publish_table(storage.uri, "vectors", [entry], rows([entry]))
    storage.write("calibrations/0.json", b"{}")
    return storage.uri


def test_it_leaves_while_a_night_is_running(nights):
    everything = paths(nights)
    with (
        hold_lease(Storage(nights), holder="the night", lease_s=60),
        pytest.raises(LeaseHeldError, match="the night works in") as caught,
    ):
        vacuum(VacuumConfig(output=nights, keep=1))
    assert caught.value.exit_code == 5
    assert paths(nights) - everything == {"leases/00000001.json"}
    vacuum(VacuumConfig(output=nights, keep=1))
    age(nights)
    vacuum(VacuumConfig(output=nights, keep=1))
    assert latest_lease(Storage(nights)).number == 3
    assert [p for p in paths(nights) if p.startswith("leases/")] == ["leases/00000003.json"]


@pytest.mark.parametrize("requests", [1, 2])
def test_a_vacuum_that_dies_leaves_no_list_of_files_that_are_gone(nights, monkeypatch, requests):
    done = 0
    delete_all = Storage.delete_all

    def dying(self, gone):
        nonlocal done
        if done == requests:
            raise KeyboardInterrupt
        done += 1
        delete_all(self, gone)

    monkeypatch.setattr(Storage, "delete_all", dying)
    with pytest.raises(KeyboardInterrupt):
        vacuum(VacuumConfig(output=nights, keep=2))
    for name in ("", *(f"{MODEL}/{t}" for t in ("vectors", "index", "answers", "answers/run"))):
        storage = Storage(f"{nights}/{name}".rstrip("/"))
        for listed in list(storage.iter_objects("manifests")):
            manifest = json.loads(storage.read(listed.path))
            for entry in manifest["files"]:
                assert storage.exists(entry["path"])
    for record in Path(nights, MODEL, "index/training").iterdir():
        template = json.loads(record.read_text())["template"]["path"]
        assert Path(nights, MODEL, "index", template).exists()
    monkeypatch.undo()
    vacuum(VacuumConfig(output=nights, keep=2))
    for number in (5, 6):
        read_fully(open_release(nights, number))


def test_a_damaged_manifest_ends_it_before_anything_goes(nights):
    path = Path(nights, MODEL, "answers/run/manifests/00000006.json")
    path.write_text("{")
    everything = paths(nights)
    with pytest.raises(IntegrityError, match="is not a manifest"):
        vacuum(VacuumConfig(output=nights, keep=2))
    assert everything <= paths(nights)


def test_nothing_is_removed_before_the_first_release(tmp_path):
    release_tables_alone(str(tmp_path), MODEL)
    with pytest.raises(NoInputError, match="nothing was released"):
        vacuum(VacuumConfig(output=str(tmp_path), min_age_hours=0))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="keep is 0; give 1 or more"):
        VacuumConfig(output="x", keep=0)
    with pytest.raises(ConfigError, match="min_age_hours is -1"):
        VacuumConfig(output="x", min_age_hours=-1)


def test_entries_are_found_wherever_they_stand(tmp_path):
    storage = Storage(str(tmp_path))

    def entry(name: str) -> dict:
        return {"path": name, "rows": 1, "bytes": 1, "sha256": "0"}

    plan = store_plan(
        storage,
        pa.table(
            {
                "spans": ["{}", "no json", None],
                "struct": [entry("a"), None, None],
                "lists": [[entry("b"), entry("c")], [], None],
                "deep": [{"inner": [{"more": entry("d")}]}, None, None],
                "facts": [json.dumps({"x": [{"y": entry("e")}]}), "{}", None],
            }
        ),
    )
    manifest = {"files": [entry("f")], "plan": plan, "details": {"new": {"place": [entry("g")]}}}
    assert referenced_files(storage, manifest) == {*"abcdefg", plan["path"]}
