"""One durable operation of a job fails, wherever it happens: in the driver or in a worker.

``install`` runs in the driver and, as Ray's worker_process_setup_hook, in every worker. The plan is
a file: ``{"kind": a name of KINDS, "at": which durable operation, 0 for none}``.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qbatch.errors import StorageError
from qbatch.storage import Storage
from tests.durable_writes import Killed, count, wrap_writes

PLAN, DRIVER = "QBATCH_TEST_FAULT_PLAN", "QBATCH_TEST_FAULT_DRIVER"

KINDS = ("error", "lost answer", "crash before", "crash after", "late")
"""What happens: it fails; it is done and reported as failed; the process dies before or after it;
it takes half a second."""


def install() -> None:
    """Let the planned operation of this process's storages fail."""
    wrap_writes(_faulty)


def set_plan(kind: str, at: int) -> None:
    """Plan the next fault, and count operations from here."""
    Path(os.environ[PLAN]).write_text(json.dumps({"kind": kind, "at": at}))
    Path(_counter()).write_bytes(b"")


def num_operations() -> int:
    """Return how many durable operations there were since the plan was set."""
    return Path(_counter()).stat().st_size


def _counter() -> str:
    return f"{os.environ[PLAN]}.count"


def _faulty(method: Callable[..., Any]) -> Callable[..., Any]:
    def operate(self: Storage, path: Any, *rest: Any) -> Any:
        plan = json.loads(Path(os.environ[PLAN]).read_text())
        if count(_counter()) != plan["at"]:
            return method(self, path, *rest)
        kind = plan["kind"]
        if kind == "late":
            time.sleep(0.5)
        if kind == "crash before":
            _die(path)
        if kind == "error":
            raise StorageError(f"cannot write {path}: injected")
        answer = method(self, path, *rest)
        if kind == "crash after":
            _die(path)
        if kind == "lost answer":
            raise StorageError(f"cannot write {path}: injected after it was written")
        return answer

    return operate


def _die(path: Any) -> None:
    if os.getpid() == int(os.environ[DRIVER]):
        raise Killed(path)
    os._exit(1)
