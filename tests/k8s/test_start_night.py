"""The program that starts a night and waits for it, as a process against a server on loopback."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.k8s.kube_server import CUT, FINE, KubeServer, kube_server, write_certificate
from tests.k8s.objects import of_kind
from tests.k8s.rendering import overlay
from tests.k8s.schemas import needs_crds, ray_violations
from tests.processes import ROOT

SCRIPT = ROOT / "k8s" / "base" / "start_night.py"
TICK = "qbatch-night-29401500"
NIGHT = "qbatch-night-20251125-1700"
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


@pytest.fixture
def kube(tmp_path) -> Iterator[KubeServer]:
    """A server with the template of production; jobs succeed at once unless told otherwise."""
    with kube_server(tmp_path) as server:
        server.templates["qbatch-night"] = of_kind(overlay("production"), "RayCronJob")[0]
        yield server


def begin(kube: KubeServer, job: str = TICK, *flags: str) -> subprocess.Popen:
    """Start the program with nothing but the standard library."""
    return subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", str(SCRIPT), "--template=qbatch-night"),
            *(f"--credentials={kube.credentials}", "--pause-s=0.01", *flags),
        ],
        env={**kube.environment, "JOB_NAME": job, "JOB_UID": "6e1f"},
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Return exit code and log."""
    _, log = process.communicate(timeout=60)
    return process.returncode, log


def run(kube: KubeServer, job: str = TICK, *flags: str) -> tuple[int, str]:
    return end(begin(kube, job, *flags))


def failed(message: str, **status: str) -> dict:
    return {
        "jobDeploymentStatus": "Failed",
        "jobStatus": "FAILED",
        "reason": "AppFailed",
        "message": message,
    } | status


def test_a_night_is_a_copy_of_the_template(kube):
    kube.statuses = [{}, RUNNING, SUCCEEDED]
    code, log = run(kube)
    assert (code, list(kube.jobs)) == (0, [NIGHT])
    job, template = kube.jobs[NIGHT], kube.templates["qbatch-night"]
    assert job["spec"] == template["spec"]["jobTemplate"]
    assert job["metadata"]["labels"] == template["metadata"]["labels"]
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": TICK, "uid": "6e1f"}
    ]
    assert [line.split("INFO ")[1] for line in log.splitlines()] == [
        f"created RayJob {NIGHT}",
        f"RayJob {NIGHT}: new ",
        f"RayJob {NIGHT}: Running RUNNING",
        f"RayJob {NIGHT}: Complete SUCCEEDED",
    ]
    assert kube.seen[:2] == ["GET /raycronjobs/qbatch-night", "POST /rayjobs"]


@needs_crds
@pytest.mark.parametrize("name", ["dev", "production", "kueue"])
def test_kuberay_accepts_the_copy(kube, name):
    kube.templates["qbatch-night"] = of_kind(overlay(name), "RayCronJob")[0]
    assert run(kube)[0] == 0
    assert list(ray_violations(list(kube.jobs.values()))) == []


def test_a_queue_of_kueue_reaches_the_job(kube):
    kube.templates["qbatch-night"] = of_kind(overlay("kueue"), "RayCronJob")[0]
    kube.statuses = [{"jobDeploymentStatus": "Suspended"}] * 3 + [RUNNING, SUCCEEDED]
    assert run(kube)[0] == 0
    assert kube.jobs[NIGHT]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "qbatch"
    assert kube.jobs[NIGHT]["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("job", "night"),
    [
        ("qbatch-night-29401501", "qbatch-night-20251125-1701"),
        ("qbatch-night-0", "qbatch-night-0"),
        ("try-1", "qbatch-night-try-1"),
        ("other-29401500", "qbatch-night-other-29401500"),
    ],
)
def test_a_night_is_named_by_the_tick_or_by_a_job_made_by_hand(kube, job, night):
    assert run(kube, job)[0] == 0
    assert list(kube.jobs) == [night]


def test_a_name_too_long_for_kuberay_is_refused(kube):
    code, log = run(kube, "a-name-that-somebody-gave-by-hand-to-a-job")
    assert (code, kube.jobs) == (2, {})
    assert "55 characters; KubeRay allows 47" in log


@pytest.mark.parametrize("outcome", [SUCCEEDED, failed("... exit code 7, last logs")])
def test_the_same_night_again_ends_like_the_first_time(kube, outcome):
    kube.statuses = [outcome]
    first, _ = run(kube)
    second, log = run(kube)
    assert first == second
    assert list(kube.jobs) == [NIGHT]
    assert f"RayJob {NIGHT} is there already" in log


def test_two_pods_of_one_night_wait_for_one_job(kube):
    kube.statuses = [RUNNING] * 20 + [SUCCEEDED]
    pods = [begin(kube), begin(kube)]
    codes, logs = zip(*(end(pod) for pod in pods), strict=True)
    assert codes == (0, 0)
    assert list(kube.jobs) == [NIGHT]
    assert sum("created RayJob" in log for log in logs) == 1


def test_a_pod_that_was_killed_has_a_successor_that_waits_on(kube):
    kube.statuses = [RUNNING]
    first = begin(kube)
    while f"GET /rayjobs/{NIGHT}" not in kube.seen:
        assert first.poll() is None
    first.kill()
    first.communicate()
    kube.statuses = [RUNNING, RUNNING, SUCCEEDED]
    assert run(kube)[0] == 0
    assert list(kube.jobs) == [NIGHT]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        # Word for word what Ray 2.60 says.
        (failed("Job entrypoint command failed with exit code 7, last available logs:\nx"), 7),
        (failed("Job entrypoint command failed with exit code 3, last available logs:\nx"), 3),
        (failed("Job entrypoint command failed with exit code 137, last available logs"), 1),
        (failed("Job entrypoint command failed with exit code 75, last available logs"), 1),
        (failed("The head died\nexit code 4"), 1),
        (failed("passed the activeDeadlineSeconds", reason="DeadlineExceeded"), 1),
        (failed("no", jobDeploymentStatus="ValidationFailed", jobStatus=""), 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),
        ({"jobDeploymentStatus": "Failed"}, 1),
    ],
)
def test_a_failed_night_fails_the_pod(kube, status, code):
    kube.statuses = [RUNNING, status]
    returned, log = run(kube)
    assert returned == code
    assert status.get("message", "").partition("\n")[0] in log


def test_a_retry_is_not_the_end(kube):
    retry = failed("exit code 1", jobDeploymentStatus="Retrying")
    kube.statuses = [RUNNING, retry, {}, {"jobDeploymentStatus": "Initializing"}, SUCCEEDED]
    assert run(kube)[0] == 0


def test_a_deleted_night_is_not_begun_again(kube):
    kube.statuses = [RUNNING, None]
    code, log = run(kube)
    assert (code, kube.jobs) == (1, {})
    assert "was deleted before it ended" in log


def test_without_a_template_nothing_begins(kube):
    kube.templates.clear()
    code, log = run(kube)
    assert (code, kube.jobs) == (2, {})
    assert "no RayCronJob 'qbatch-night'" in log


@pytest.mark.parametrize(("answer", "code"), [(422, 2), (400, 2), (403, 75), (401, 75)])
def test_a_refused_job_says_whether_another_try_may_help(kube, answer, code):
    kube.troubles = [FINE, answer]
    returned, log = run(kube)
    assert (returned, kube.jobs) == (code, {})
    assert f"cannot create RayJob {NIGHT}: HTTP {answer}: no" in log


@pytest.mark.parametrize("troubles", [[403], [FINE, FINE, 403]])
def test_a_refused_look_is_no_end_of_the_night(kube, troubles):
    kube.troubles = troubles
    code, log = run(kube)
    assert code == 75
    assert "cannot read Ray" in log


def test_trouble_on_the_way_is_waited_out(kube):
    kube.troubles = [503, FINE, 429, FINE, 500]
    kube.statuses = [RUNNING, SUCCEEDED]
    code, log = run(kube)
    assert (code, list(kube.jobs)) == (0, [NIGHT])
    assert log.count("asking again") == 3


def test_an_answer_that_got_lost_makes_no_second_job(kube):
    kube.troubles = [FINE, CUT]
    kube.statuses = [RUNNING, SUCCEEDED]
    code, log = run(kube)
    assert (code, list(kube.jobs)) == (0, [NIGHT])
    assert kube.seen[1:3] == ["POST /rayjobs", "POST /rayjobs"]
    assert "is there already" in log


def test_a_silent_server_ends_the_patience(kube):
    kube.port = 1  # nobody listens there
    code, log = run(kube, TICK, "--patience-s=0.2")
    assert code == 75
    assert "no answer to GET https://127.0.0.1:1/apis/ray.io" in log


def test_a_new_token_is_used_from_when_it_lies_there(kube):
    kube.new_tokens = ["second-token", "third-token"]
    kube.statuses = [RUNNING, SUCCEEDED]
    assert run(kube)[0] == 0
    assert kube.token == "third-token"


def test_no_token_goes_to_a_server_of_another_authority(kube, tmp_path):
    write_certificate(tmp_path / "unused.pem", kube.credentials / "ca.crt")
    code, log = run(kube, TICK, "--patience-s=0.1")
    assert (code, kube.seen) == (75, [])
    assert "certificate verify failed" in log
