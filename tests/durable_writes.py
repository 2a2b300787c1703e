"""Counts what a job makes durable, over all of its processes, and kills the job at a given point.

Every write, create, upload and delete of a Storage counts, wherever it happens: ``install`` runs in
the driver and, as Ray's worker_process_setup_hook, in every worker.
"""

import fcntl
import os
import signal
from collections.abc import Callable
from typing import Any

from qbatch.storage import Storage

METHODS = ("write", "create", "upload", "delete", "delete_all")

COUNTER, FATAL, DRIVER = "QBATCH_TEST_COUNTER", "QBATCH_TEST_FATAL", "QBATCH_TEST_DRIVER"
"""Environment: a file with one byte a write, the write that kills (0: none), the driver's pid."""


def install() -> None:
    """Count every durable write of this process; leases, which beat by the clock, do not count."""
    wrap_writes(counted)


def wrap_writes(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace every durable operation of this process's storages by what is made of it."""
    for name in METHODS:
        setattr(Storage, name, wrap(getattr(Storage, name)))


def counted(method: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: Storage, path: Any, *rest: Any) -> Any:
        is_lease = str(path).startswith("leases/")
        if not is_lease and count(os.environ[COUNTER]) == int(os.environ[FATAL]):
            os.kill(int(os.environ[DRIVER]), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, path, *rest)

    return write


def count(counter: str) -> int:
    """Add one to a file that all processes count in; return how many there were."""
    with open(counter, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b".")
        file.flush()
        return os.stat(file.fileno()).st_size


class Killed(BaseException):
    """Stands for SIGKILL of a driver inside a test's own process."""


class DyingDriver:
    """Lets this process make so many durable writes; from then on every one raises Killed."""

    def __init__(self, monkeypatch: Any, writes: int | None) -> None:
        self.done = 0
        for name in METHODS:
            monkeypatch.setattr(Storage, name, self._limited(getattr(Storage, name), writes))

    def _limited(self, method: Callable[..., Any], writes: int | None) -> Callable[..., Any]:
        def write(storage: Storage, path: Any, *rest: Any) -> Any:
            is_lease = str(path).startswith("leases/")
            if writes is not None and self.done >= writes:
                if is_lease:
                    return None  # the heart of a dead process does not beat
                raise Killed(path)
            self.done += not is_lease
            return method(storage, path, *rest)

        return write
