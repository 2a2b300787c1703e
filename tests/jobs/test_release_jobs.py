"""Status, rollback and vacuum as users start them: flags, streams and exit codes."""

import pytest

from qbatch.lease import hold_lease
from qbatch.storage import Storage
from tests.pipelines.test_vacuum import age, release_night
from tests.processes import Job


@pytest.fixture
def nights(tmp_path) -> str:
    uri = str(tmp_path / "night")
    for night in (1, 2, 3):
        release_night(uri, night)
    age(uri)
    return uri


def run_job(script: str, tmp_path, **flags) -> tuple[int, dict | None, str]:
    job = Job(script, flags, tmp_path / f"{script}.log")
    code, summary = job.wait()
    return code, summary, job.log()


def test_from_status_over_rollback_to_vacuum(nights, tmp_path):
    code, shown, log = run_job("status.py", tmp_path, output=nights)
    assert (code, shown["serving"]) == (0, 3), log
    assert "* 3  " in log
    assert "model-0123abcd/vectors@3" in log
    code, made, log = run_job("rollback.py", tmp_path, output=nights, release=2)
    assert (code, made["release"], made["content_of"]) == (0, 4, 2), log
    age(nights)
    code, gone, log = run_job("vacuum.py", tmp_path, output=nights, keep=1)
    assert (code, gone["releases"]) == (0, [4]), log
    assert f"removed {gone['objects']} objects" in log
    code, shown, log = run_job("status.py", tmp_path, output=nights)
    assert [release["release"] for release in shown["releases"]] == [4]
    assert "(rolled back)" in log


def test_exit_codes(nights, tmp_path):
    assert run_job("status.py", tmp_path, output=tmp_path / "nowhere")[:2] == (3, None)
    assert run_job("rollback.py", tmp_path, output=nights, release=9)[:2] == (3, None)
    assert run_job("rollback.py", tmp_path, output=nights, release=0)[:2] == (2, None)
    assert run_job("vacuum.py", tmp_path, output=nights, keep=0)[:2] == (2, None)
    with hold_lease(Storage(nights), holder="a night", lease_s=600):
        code, _, log = run_job("vacuum.py", tmp_path, output=nights)
    assert code == 5
    assert "a night works in" in log
