"""Seeded faults in every job: run it, let something fail, run it again, count the rows.

    python -m tests.faults.harness --cases 200
    python -m tests.faults.harness --cases 8 --jobs embed --broken     # must find what is broken

Each case makes one durable operation fail somewhere in the job's processes, or a share of the HTTP
requests between the job and an S3 server. The job then ends well, with an error of its own, or
dies; whatever it has published must be whole. A second, undisturbed run must publish everything:
no row lost, none doubled. Ray, the S3 server, models and FAISS are real; only the stages of embed
and rerank run inside the driver, so that no case waits for an actor to import torch (kills of those
actors are in test_embed_kills.py and test_rerank_kills.py).

The table counts; the exit code is 1 if a row was lost or doubled or an error was not one of ours.
"""

import argparse
import gc
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
import s3fs

from qbatch.errors import QbatchError
from tests.durable_writes import Killed
from tests.faults import injection, proxy
from tests.faults.broken_protocol import append_everything
from tests.faults.jobs_under_test import JOBS, JobUnderTest
from tests.faults.local_stages import stages_in_this_process
from tests.processes import ROOT, free_port, wait_for_url

HTTP_SHARE = 0.05
"""Of the requests fail: clients that repeat a request a few times mostly get through."""

HTTP_JOBS = ("embed", "search")
"""Jobs that also run against the failing S3 server."""


@dataclass(kw_only=True)
class Tally:
    """What became of the cases of one job and one kind of fault."""

    cases: int = 0
    injected: int = 0
    runs: int = 0
    unharmed: int = 0
    """First runs that published in spite of the fault."""
    lost: int = 0
    doubled: int = 0
    wrong: list[str] = field(default_factory=list)
    """What must not happen, in words."""


@contextmanager
def faulty_cluster(folder: Path) -> Iterator[None]:
    """Run a Ray whose workers, like this process, meet the planned fault."""
    settings = {
        injection.PLAN: f"{folder}/plan.json",
        injection.DRIVER: str(os.getpid()),
        "PYTHONPATH": str(ROOT),
    }
    os.environ.update(settings)
    injection.set_plan("error", 0)
    hook = {"worker_process_setup_hook": "tests.faults.injection.install", "env_vars": settings}
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=2**28,
        include_dashboard=False,
        runtime_env=hook,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    injection.install()
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def failing_s3(folder: Path) -> Iterator[Path]:
    """Run an S3 server behind the proxy and point this process and its children there."""
    ports = [free_port(), free_port()]
    plan = folder / "http.json"
    set_http_plan(plan, "slow", 0.0, 0)
    url = f"http://127.0.0.1:{ports[1]}"
    os.environ.update(
        {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    )
    log = folder / "s3.log"
    modules = (
        ["moto.server", "-H", "127.0.0.1", "-p", str(ports[0])],
        ["tests.faults.proxy", str(ports[1]), str(ports[0]), str(plan)],
    )
    with log.open("wb") as output:
        servers = [
            subprocess.Popen([sys.executable, "-m", *module], stdout=output, stderr=output)
            for module in modules
        ]
    try:
        wait_for_url(f"{url}/moto-api/data.json", log)
        s3fs.S3FileSystem().mkdir("faults")
        yield plan
    finally:
        for server in servers:
            server.kill()
            server.wait()


def set_http_plan(plan: Path, kind: str, share: float, seed: int) -> None:
    staged = plan.with_suffix(".new")
    staged.write_text(json.dumps({"kind": kind, "share": share, "seed": seed}))
    staged.replace(plan)
    plan.with_suffix(".count").write_text("0")


def run_once(job: JobUnderTest, output: str, tally: Tally) -> bool:
    """Run the job; tell whether it ended well. Only our own errors and death are allowed."""
    tally.runs += 1
    try:
        job.run(output)
    except (QbatchError, Killed):
        return False
    except Exception as error:  # noqa: BLE001 - the table is to say so
        tally.wrong.append(f"{type(error).__name__}: {str(error)[:300]}")
        return False
    finally:
        gc.collect()  # frames of a failed run hold actors, and those hold processors
    return True


def check(job: JobUnderTest, output: str, tally: Tally, *, must_exist: bool) -> None:
    """Compare what is published, if anything is, with the input."""
    if not job.has_published(output):
        if must_exist:
            tally.wrong.append("the second run published nothing")
        return
    found = Counter(job.rows(output))
    expected = set(job.expected())
    tally.lost += len(expected - found.keys())
    tally.doubled += sum(found.values()) - len(found)
    if found.keys() - expected:
        tally.wrong.append(f"rows from nowhere: {sorted(found.keys() - expected)[:3]}")


def run_case(job: JobUnderTest, kind: str, number: int, seed: int, place: str, plan: Path) -> Tally:
    """Run one case; ``kind`` is one of injection's or of the proxy's."""
    tally, rng = Tally(cases=1), random.Random(f"{seed} {job.name} {kind} {number}")
    is_http = kind in proxy.KINDS
    output = f"s3://faults/{job.name}-{kind}-{number}" if is_http else f"{place}/{kind}-{number}"
    if is_http:
        set_http_plan(plan, kind, HTTP_SHARE, rng.randrange(10**6))
    else:
        injection.set_plan(kind, rng.randint(1, job.num_operations))
    tally.unharmed += run_once(job, output, tally)
    if is_http:
        tally.injected += int(plan.with_suffix(".count").read_text())
        set_http_plan(plan, kind, 0.0, 0)
    else:
        tally.injected += 1
        injection.set_plan("error", 0)
    check(job, output, tally, must_exist=False)
    if not run_once(job, output, tally):
        tally.wrong.append("the second run failed")
    check(job, output, tally, must_exist=True)
    return tally


def shares(names: list[str], num_cases: int) -> Iterator[tuple[str, str, int]]:
    """Yield (job, kind, number) so that jobs and kinds take turns; embed comes twice as often."""
    rounds = [
        (name, kind)
        for name in [*names, *(n for n in names if n == "embed")]
        for kind in (*injection.KINDS, *(proxy.KINDS if name in HTTP_JOBS else ()))
    ]
    for number in range(num_cases):
        yield *rounds[number % len(rounds)], number


def print_table(tallies: dict[tuple[str, str], Tally], seconds: float) -> None:
    head = ("job", "fault", "cases", "injected", "runs", "unharmed", "rows lost", "rows doubled")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for (name, kind), t in sorted(tallies.items()):
        cells = (name, kind, t.cases, t.injected, t.runs, t.unharmed, t.lost, t.doubled)
        print("| " + " | ".join(map(str, cells)) + " |")
    total = {n: sum(getattr(t, n) for t in tallies.values()) for n in vars(Tally()) if n != "wrong"}
    print(
        f"\n{total['cases']} cases, {total['injected']} faults, {total['runs']} runs in "
        f"{seconds:.0f} s: {total['lost']} rows lost, {total['doubled']} rows doubled"
    )
    for (name, kind), tally in sorted(tallies.items()):
        for text in tally.wrong:
            print(f"WRONG {name}, {kind}: {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=sorted(JOBS), default=sorted(JOBS))
    parser.add_argument("--broken", action="store_true", help="with a protocol that doubles rows")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    tallies: dict[tuple[str, str], Tally] = {}
    with (
        tempfile.TemporaryDirectory(prefix="qbatch-faults-") as name,
        failing_s3(Path(name)) as plan,
        faulty_cluster(Path(name)),
        stages_in_this_process(),
        append_everything(is_on=options.broken),
    ):
        jobs = {job: JOBS[job](Path(name)) for job in options.jobs}
        for job in jobs.values():
            injection.set_plan("error", 0)
            job.run(f"{name}/{job.name}/undisturbed")
            job.num_operations = injection.num_operations()
        for job_name, kind, number in shares(options.jobs, options.cases):
            job = jobs[job_name]
            found = run_case(job, kind, number, options.seed, f"{name}/{job_name}", plan)
            known = tallies.setdefault((job_name, kind), Tally())
            for key, value in vars(found).items():
                setattr(known, key, getattr(known, key) + value)
    print_table(tallies, time.perf_counter() - started)
    return int(any(t.lost or t.doubled or t.wrong for t in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
