"""What a process and everything it started take: processor seconds, and peak memory by title."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Watch:
    """Looks at a process and its descendants ten times a second, while the block runs.

    Ray's processes name themselves after the task they run, ``ray::build_shard``. Peak memory is
    the kernel's own (VmHWM), set back when a process takes a new title, so that each task answers
    for itself. Object store pages that a task maps count as its memory.
    """

    def __init__(self, pid: int, interval_s: float = 0.1) -> None:
        self._pid = pid
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._cpu_s: dict[int, float] = {}
        self._titles: dict[int, str] = {}
        self.peak_bytes: defaultdict[str, int] = defaultdict(int)
        """By title."""

    @property
    def cpu_s(self) -> float:
        """Of all processes seen, user and system."""
        return sum(self._cpu_s.values())

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            for pid in descendants(self._pid):
                try:
                    self._look(Path("/proc", str(pid)))
                except OSError:  # it ended meanwhile
                    continue
            time.sleep(self._interval_s)

    def _look(self, process: Path) -> None:
        pid = int(process.name)
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        self._cpu_s[pid] = (int(fields[11]) + int(fields[12])) * _TICK_S
        command = (process / "cmdline").read_bytes().split(b"\0")[0].decode().split(" ")[0]
        title = command if command.startswith("ray::") else Path(command).name
        if self._titles.get(pid) != title:
            self._titles[pid] = title
            (process / "clear_refs").write_text("5")
            return
        self.peak_bytes[title] = max(self.peak_bytes[title], peak_bytes(process))


def told_by_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module in a process of its own; return the JSON of its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def peak_bytes(process: Path = Path("/proc/self")) -> int:
    """Return the most memory a process has had, 0 where the kernel does not say any more."""
    status = (process / "status").read_text()
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM 0 kB")
    return int(peak.split()[1]) * 1024


def descendants(pid: int) -> Iterator[int]:
    """Yield a process and all that it started, and they did."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children[int(fields[1])].append(int(stat.parent.name))
    waiting = [pid]
    while waiting:
        found = waiting.pop()
        yield found
        waiting += children[found]
