"""A night killed at any durable write and run again releases what an undisturbed one does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qbatch.errors import CommitRaceLostError
from qbatch.pipelines.reindex import PublishStep, ReindexConfig, reindex
from qbatch.pipelines.release_gates import check_gates
from qbatch.release import open_release, release_numbers
from qbatch.storage import Storage
from tests.durable_writes import DyingDriver, Killed
from tests.nights import LOOSE, Corpus, content_of, night_config, served, text_of, write_queries
from tests.processes import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = PublishStep(lease_s=1.5, wait_s=120)


def change(corpus: Corpus) -> None:
    """What the night that is killed finds: an edit, a new document, a lost one and a lost file."""
    corpus.files["001.jsonl"]["d10"] = text_of(10, version=1)
    corpus.files["003.jsonl"]["new"] = text_of(99)
    del corpus.files["002.jsonl"]["d20"]
    del corpus.files["005.jsonl"]
    corpus.write()


@pytest.fixture(scope="module")
def before(ray_cluster, tiny_model, tmp_path_factory) -> str:
    """A place where one night has passed, and the corpus has changed since."""
    uri = str(tmp_path_factory.mktemp("before"))
    write_queries(f"{uri}/queries.jsonl")
    corpus = Corpus(f"{uri}/corpus")
    corpus.write()
    reindex(config_of(uri, tiny_model))
    change(corpus)
    return uri


def config_of(uri: str, model: str) -> ReindexConfig:
    return night_config(uri, model, gates=LOOSE, publish=KILLS)


@pytest.fixture
def place(before) -> str:
    """That place again, for this test alone: manifests name tables by where they lie."""
    kept = f"{before}-kept"
    if not Path(kept).exists():
        shutil.copytree(before, kept)
    shutil.rmtree(before)
    shutil.copytree(kept, before)
    return before


@pytest.fixture(scope="module")
def undisturbed(before, tiny_model, tmp_path_factory) -> tuple[dict, int]:
    """What the next night releases, and how many durable writes its driver makes."""
    kept = f"{before}-kept"
    if not Path(kept).exists():
        shutil.copytree(before, kept)
    with pytest.MonkeyPatch.context() as patch:
        driver = DyingDriver(patch, None)
        reindex(config_of(before, tiny_model))
    return served(before), driver.done


def points(total: int, wanted: int) -> list[int]:
    return sorted({round(i * (total - 1) / (wanted - 1)) for i in range(wanted)})


def kill_drivers(place: str, model: str, undisturbed: tuple[dict, int], wanted: int) -> None:
    """Kill night after night, each a bit later than the last, then let one end."""
    expected, total = undisturbed
    old, config = served(place), config_of(place, model)
    for writes in points(total // 2, wanted):  # each goes on where the last one was killed
        with pytest.MonkeyPatch.context() as patch:
            DyingDriver(patch, writes)
            with pytest.raises(Killed):
                reindex(config)
        assert open_release(config.output).number == 1
        assert served(place) == old
    assert reindex(config)["release"] == 2
    assert served(place) == expected
    assert content_of(open_release(config.output, 1)) == old


def test_a_killed_driver_leaves_the_old_release_and_the_next_night_ends_the_work(
    place, tiny_model, undisturbed
):
    kill_drivers(place, tiny_model, undisturbed, wanted=3)


def test_a_driver_killed_at_any_of_its_writes(place, before, tiny_model, undisturbed):
    """Every write is the last of some night, each from the same start.

    Only reports are written after the release: killed there, the night is released as a whole.
    """
    (expected, total), old, released = undisturbed, served(place), []
    for writes in range(total):
        shutil.rmtree(before)
        shutil.copytree(f"{before}-kept", before)
        with pytest.MonkeyPatch.context() as patch:
            DyingDriver(patch, writes)
            try:
                reindex(config_of(before, tiny_model))
            except Killed as killed:
                number = open_release(f"{before}/night").number
                assert served(before) == (old if number == 1 else expected)
                released += [str(killed)] * (number - 1)
        reindex(config_of(before, tiny_model))
        assert served(before) == expected, f"killed before write {writes} of {total}"
    assert released in ([], ["report.json"], ["report.json", "report.html"])


def run_killed(uri: str, model: str, fatal: int, folder: Path) -> tuple[int, int]:
    """Run a night that dies at a write of any of its processes; return code and writes made."""
    counter = folder / f"counter-{fatal}"
    counter.unlink(missing_ok=True)
    log = (folder / "log").open("ab")
    command = [sys.executable, "-m", "tests.faults.killed_night", uri, model, str(counter)]
    process = subprocess.Popen(
        [*command, str(fatal)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    code = process.wait(timeout=900)
    if code == -signal.SIGKILL:
        time.sleep(5)  # its Ray notices and ends
    return code, counter.stat().st_size


@pytest.mark.timeout(7200)
def test_a_night_killed_at_a_write_of_any_process(place, before, tiny_model, undisturbed, tmp_path):
    (expected, _), old = undisturbed, served(place)
    code, total = run_killed(before, tiny_model, 0, tmp_path)
    assert code == 0, (tmp_path / "log").read_text()[-3000:]
    assert served(before) == expected
    for fatal in points(total, 12):
        shutil.rmtree(before)
        shutil.copytree(f"{before}-kept", before)
        code, _ = run_killed(before, tiny_model, fatal + 1, tmp_path)
        assert code == -signal.SIGKILL
        newest = release_numbers(Storage(f"{before}/night"))[-1]
        assert served(before) == (old if newest == 1 else expected)
        assert newest == 1 or fatal + 1 >= total - 1  # only reports are written after the release
        reindex(config_of(before, tiny_model))
        assert served(before) == expected, f"killed at write {fatal + 1} of {total}"


def test_of_two_nights_without_a_lease_one_releases_and_the_other_loses(
    place, tiny_model, undisturbed, monkeypatch
):
    """Another night does all of its work while this one is about to release."""
    config = replace(config_of(place, tiny_model), publish=PublishStep(lease_s=0))
    other: list[dict] = []
    gates = "qbatch.pipelines.reindex.check_gates"

    def meanwhile(*args):
        monkeypatch.setattr(gates, check_gates)
        other.append(reindex(config))
        return check_gates(*args)

    monkeypatch.setattr(gates, meanwhile)
    with pytest.raises(CommitRaceLostError, match="published by another writer") as caught:
        reindex(config)
    assert caught.value.exit_code == 5
    assert [night["release"] for night in other] == [2]
    assert release_numbers(Storage(config.output)) == [1, 2]
    assert served(place) == undisturbed[0]
