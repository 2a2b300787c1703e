"""A job on a Ray of its own, for bench_index: ``index_job build_index '{"flags": ...}'``.

Prints one JSON object.
"""

import json
import logging
import sys

import ray

from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from tests.benchmarks.plain_faiss import timed

JOBS = {
    "build_index": (build_index, BuildIndexConfig),
    "search_index": (search_index, SearchIndexConfig),
}


def run_job(name: str, flags: dict, threads: int) -> dict:
    """Run a job, or none for another name, on a Ray of its own with so many processors."""
    seconds: dict[str, float] = {}
    summary = None
    with timed(seconds, "start"):
        ray.init(num_cpus=threads, logging_level=logging.WARNING, include_dashboard=False)
    with timed(seconds, "job"):
        if name in JOBS:
            run, config = JOBS[name]
            summary = run(config(**flags))
    with timed(seconds, "stop"):
        ray.shutdown()
    return {"seconds": seconds, "summary": summary}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    print(json.dumps(run_job(sys.argv[1], **json.loads(sys.argv[2]))))
