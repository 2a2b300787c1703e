"""Jobs as real processes, to be timed, killed and raced."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Job:
    """A running job, on a Ray of its own unless the address of another is given.

    Its processes can be found by a mark they inherit.
    """

    def __init__(
        self, script: str, flags: dict[str, object], log: Path, *, ray_address: str = "local"
    ) -> None:
        self._mark = f"QBATCH_TEST_JOB={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        self._log = log
        arguments = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / script), *arguments],
            env={**os.environ, name: value, "RAY_ADDRESS": ray_address, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            text=True,
        )

    def wait(self, timeout_s: float = 240) -> tuple[int, dict | None]:
        """Return the exit code and the summary, None without one."""
        stdout, _ = self.process.communicate(timeout=timeout_s)
        lines = stdout.splitlines()
        return self.process.returncode, json.loads(lines[-1]) if lines else None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self, *, patience_s: float = 20) -> None:
        """SIGKILL the driver, then whatever of its Ray is left after a while."""
        self.process.kill()
        self.process.communicate()
        deadline = time.monotonic() + patience_s
        while (left := self.pids("")) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            _kill(pid)

    def kill_actor(self, name: str = "EmbedActor") -> bool:
        """SIGKILL one actor of a pool; False when none runs."""
        return self.kill_worker(f"ray::MapWorker(MapBatches({name}))")

    def kill_worker(self, title: str) -> bool:
        """SIGKILL one process whose title begins like this; False when none runs."""
        return any(_kill(pid) for pid in self.pids(title))

    def pids(self, title: str) -> list[int]:
        """Return the processes of this job whose command line begins with ``title``."""
        return [int(p.name) for p in Path("/proc").glob("[0-9]*") if self._is_mine(p, title)]

    def _is_mine(self, process: Path, title: str) -> bool:
        try:
            mine = self._mark.encode() in (process / "environ").read_bytes().split(b"\0")
            return mine and (process / "cmdline").read_bytes().startswith(title.encode())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_url(url: str, log: Path) -> None:
    """Wait until a server answers; TimeoutError with the end of its log."""
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing answers at {url}:\n{log.read_text(errors='replace')[-3000:]}")


def wait_until(condition: Callable[[], object], job: Job, timeout_s: float = 120) -> bool:
    """Wait for a condition; False when the job ends first."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if job.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"condition not met in {timeout_s} s; log:\n{job.log()[-2000:]}")
        time.sleep(0.02)
    return True
