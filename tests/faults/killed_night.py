"""A night in a process of its own, killed at a given durable write, for test_night_kills.py.

python -m tests.faults.killed_night URI MODEL COUNTER_FILE WRITE
"""

import os
import sys

import ray

from qbatch.pipelines.reindex import PublishStep, reindex
from tests.durable_writes import COUNTER, DRIVER, FATAL, install
from tests.nights import LOOSE, night_config


def main(uri: str, model: str, counter: str, fatal: str) -> None:
    settings = {COUNTER: counter, FATAL: fatal, DRIVER: str(os.getpid())}
    os.environ.update(settings)
    hook = {"worker_process_setup_hook": "tests.durable_writes.install", "env_vars": settings}
    ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=2**29, runtime_env=hook)
    install()
    publish = PublishStep(lease_s=2, wait_s=120)
    print(reindex(night_config(uri, model, gates=LOOSE, publish=publish)))


if __name__ == "__main__":
    main(*sys.argv[1:])
