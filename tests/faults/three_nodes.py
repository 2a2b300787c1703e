"""Three Ray nodes of one processor each on this machine, of which one is lost when asked.

    RAY_TMPDIR=FOLDER python -m tests.faults.three_nodes

Prints the address; for each title on stdin it kills a node, one that runs a process of that title
if it can, and says so; at the end of stdin all end. A process of its own, since
``ray.cluster_utils.Cluster`` changes which cluster its process is connected to.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.benchmarks.watching import descendants

_NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 2**27}


def processes_of(node: Any) -> list[int]:
    """Return the raylet of a node and what it started: its workers."""
    return list(descendants(node.all_processes["raylet"][0].process.pid))


def titles(pids: list[int]) -> Iterator[bytes]:
    for pid in pids:
        try:
            yield Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue


def lose(cluster: Cluster, title: str) -> None:
    """Kill all of a node at once, as when its machine is gone; never the head."""
    processes = {node: processes_of(node) for node in cluster.worker_nodes}
    victim = max(
        processes,
        key=lambda node: any(t.startswith(title.encode()) for t in titles(processes[node])),
    )
    for pid in processes[victim]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cluster.remove_node(victim, allow_graceful=False)


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**_NODE, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**_NODE)
        print(cluster.address, flush=True)
        for line in sys.stdin:
            lose(cluster, line.strip())
            print("lost", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
