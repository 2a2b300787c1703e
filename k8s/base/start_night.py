"""Start the night's RayJob and wait for its end; runs in the pods of the CronJob.

    python start_night.py --template qbatch-night

The RayJob is a copy of a suspended RayCronJob's template. Its name comes from the tick of the
CronJob, so a second pod for the same night finds the first one's RayJob and waits for that. It
belongs to the pod's Job and is deleted with it.

Exit codes: 0 done; the job's own code when it failed (1 when it has none below 75); 2 a template
that cannot work; 75 no usable answer from the API server, where another try may help.
"""

import argparse
import http.client
import json
import logging
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

BAD_TEMPLATE = 2
TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h; the CronJob's podFailurePolicy starts another pod for it."""

MAX_NAME = 47
"""KubeRay refuses longer RayJob names: it makes names of clusters and Services of them."""

_TICK = re.compile(r"\d{8,9}")
"""What the CronJob controller appends to the name of a Job: its time in minutes since 1970."""

_EXIT_CODE = re.compile(r"exit code (\d+)")
"""In the message of a Ray job whose entrypoint failed."""

_ENDED = {"Complete", "Failed", "ValidationFailed"}
"""Values of jobDeploymentStatus that never change again."""

log = logging.getLogger("start_night")


class Api:
    """The API server as seen from a pod: its address, and the account's token and namespace."""

    def __init__(self, credentials: Path, *, pause_s: float, patience_s: float) -> None:
        """Name the server; nothing is sent yet.

        Args:
            credentials: Directory with ``token``, ``ca.crt`` and ``namespace``.
            pause_s: Seconds between two requests.
            patience_s: Seconds without any answer after which the process ends.
        """
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        namespace = (credentials / "namespace").read_text().strip()
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._base = f"https://{authority}/apis/ray.io/v1/namespaces/{namespace}"
        self._token = credentials / "token"
        self._tls = ssl.create_default_context(cafile=str(credentials / "ca.crt"))
        self.pause_s = pause_s
        self._patience_s = patience_s

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Send a request until the server answers it; return HTTP status and answer.

        Asking again is safe for every request of this program: a create that was carried out
        without our hearing of it comes back as a conflict.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return self._ask_once(method, path, body)
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                if time.monotonic() > deadline:
                    give_up(TRY_AGAIN, f"no answer to {method} {self._base}{path}: {error}")
                log.warning("%s %s: %s; asking again", method, path, error)
                time.sleep(self.pause_s)

    def _ask_once(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            f"{self._base}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            # The token is read anew each time: the kubelet replaces it every hour.
            headers={
                "Authorization": f"Bearer {self._token.read_text().strip()}",
                "Content-Type": "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.TOO_MANY_REQUESTS or error.code >= 500:
                raise
            return error.code, json.load(error)


def give_up(code: int, reason: str) -> NoReturn:
    """End the process with a code, saying why."""
    log.error("%s", reason)
    sys.exit(code)


def name_of_night(template: str, job: str) -> str:
    """Return the RayJob's name: the CronJob's tick in UTC, or the name of a Job made by hand."""
    suffix = job.removeprefix(f"{template}-")
    if suffix != job and _TICK.fullmatch(suffix):
        suffix = datetime.fromtimestamp(int(suffix) * 60, UTC).strftime("%Y%m%d-%H%M")
    name = f"{template}-{suffix}"
    if len(name) > MAX_NAME:
        give_up(
            BAD_TEMPLATE,
            f"the RayJob would be called {name!r}, {len(name)} characters; KubeRay allows "
            f"{MAX_NAME}. Give the Job a shorter name",
        )
    return name


def ray_job(template: Mapping[str, Any], name: str, owner: Mapping[str, str]) -> dict[str, Any]:
    """Return the RayJob of a template; labels are copied, for a queue may be named there."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "labels": template["metadata"].get("labels", {}),
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", **owner}],
        },
        "spec": template["spec"]["jobTemplate"],
    }


def start(api: Api, template_name: str, name: str, owner: Mapping[str, str]) -> None:
    """Create the night's RayJob unless it is there already."""
    status, template = api.ask("GET", f"/raycronjobs/{template_name}")
    if status == HTTPStatus.NOT_FOUND:
        give_up(BAD_TEMPLATE, f"there is no RayCronJob {template_name!r} to take as a template")
    if status != HTTPStatus.OK:
        give_up(TRY_AGAIN, f"cannot read RayCronJob {template_name!r}: {_reason(status, template)}")
    status, answer = api.ask("POST", "/rayjobs", ray_job(template, name, owner))
    if status == HTTPStatus.CREATED:
        log.info("created RayJob %s", name)
    elif status == HTTPStatus.CONFLICT:
        log.info("RayJob %s is there already", name)
    else:
        refused = status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
        give_up(
            BAD_TEMPLATE if refused else TRY_AGAIN,
            f"cannot create RayJob {name}: {_reason(status, answer)}",
        )


def wait(api: Api, name: str) -> int:
    """Follow a RayJob to its end and return the exit code that tells how it went."""
    seen: tuple[str, str] | None = None
    while True:
        code, answer = api.ask("GET", f"/rayjobs/{name}")
        if code == HTTPStatus.NOT_FOUND:
            give_up(1, f"RayJob {name} was deleted before it ended")
        if code != HTTPStatus.OK:
            give_up(TRY_AGAIN, f"cannot read RayJob {name}: {_reason(code, answer)}")
        status = answer.get("status", {})
        now = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        if now != seen:
            log.info("RayJob %s: %s %s", name, now[0] or "new", now[1])
            seen = now
        if now[0] in _ENDED:
            return outcome(status)
        time.sleep(api.pause_s)


def outcome(status: Mapping[str, Any]) -> int:
    """Return the exit code of a RayJob that has ended.

    Args:
        status: ``status`` of the RayJob. A stopped job is ``Complete`` without having succeeded.
    """
    if status["jobDeploymentStatus"] == "Complete" and status.get("jobStatus") == "SUCCEEDED":
        return 0
    message = status.get("message", "")
    log.error("%s %s", status.get("reason", status.get("jobStatus", "")), message)
    found = _EXIT_CODE.search(message.partition("\n")[0])
    return int(found[1]) if found and 0 < int(found[1]) < TRY_AGAIN else 1


def _reason(status: int, answer: Mapping[str, Any]) -> str:
    return f"HTTP {status}: {answer.get('message', answer)}"


def main() -> None:
    """Start the night named by JOB_NAME and end as it ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--template", required=True, help="RayCronJob to copy")
    parser.add_argument(
        "--credentials",
        type=Path,
        default=Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        help="directory of the service account",
    )
    parser.add_argument("--pause-s", type=float, default=15, help="between two requests")
    parser.add_argument("--patience-s", type=float, default=1800, help="without any answer")
    flags = parser.parse_args()
    job = {"name": os.environ["JOB_NAME"], "uid": os.environ["JOB_UID"]}
    api = Api(flags.credentials, pause_s=flags.pause_s, patience_s=flags.patience_s)
    name = name_of_night(flags.template, job["name"])
    start(api, flags.template, name, job)
    sys.exit(wait(api, name))


if __name__ == "__main__":
    main()
