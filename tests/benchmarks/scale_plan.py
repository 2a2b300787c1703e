"""What planning and publishing cost as a corpus grows, without computing anything.

    python -m tests.benchmarks.scale_plan --files 10000 100000 1000000

For each number of input files: the time and memory to list them, group them into units and write
the plan; and the time to publish and to read back a generation of as many output files.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.units import plan_units
from qbatch.manifest import Generation, latest_generation, publish
from qbatch.pipelines.embed_resume import Plan
from qbatch.schema import FILES
from qbatch.storage import Storage
from tests.benchmarks.watching import peak_bytes, told_by_process

_FILES_PER_FOLDER = 1000
UNIT_BYTES = 16 * 2**10
"""What opening an object counts for: each file is a unit of its own."""


def write_files(folder: Path, num_files: int) -> None:
    """Write as many small inputs; hard links, since their content does not matter here."""
    first = folder / "first.jsonl"
    first.write_text('{"text": "a"}\n')
    for i in range(num_files):
        place = folder / "corpus" / f"{i // _FILES_PER_FOLDER:05d}"
        if i % _FILES_PER_FOLDER == 0:
            place.mkdir(parents=True)
            source = place / "000.jsonl"
            source.write_bytes(first.read_bytes())  # a disk limits the links to one file
        else:
            os.link(source, place / f"{i % _FILES_PER_FOLDER:03d}.jsonl")


def measure_plan(folder: Path) -> dict[str, float]:
    """Plan the corpus below a folder; in a process of its own, so that its memory is known."""
    started = time.perf_counter()
    config = resolve_config(CorpusConfig(input=f"{folder}/corpus", unit_bytes=UNIT_BYTES))
    plan = Plan(plan_units(config), "fingerprint")
    return {
        "units": len(plan),
        "plan_s": round(time.perf_counter() - started, 1),
        "plan_peak_mib": round(peak_bytes() / 2**20),
    }


def measure_publish(folder: Path, num_files: int) -> dict[str, float]:
    """Publish a generation that lists as many files, and read it back."""
    storage = Storage(f"{folder}/table")
    names = [f"data/{i:032x}-{i:016x}.parquet" for i in range(num_files)]
    files = pa.table(
        [names, [1000] * num_files, [10_000] * num_files, [f"{i:064x}" for i in range(num_files)]],
        schema=FILES,
    )
    none = FILES.empty_table()
    draft = Generation(
        kind="vectors", fingerprint={}, config={}, counts={}, files=files, rejects=none
    )
    started = time.perf_counter()
    publish(storage, draft, after=0)
    published = time.perf_counter()
    newest = latest_generation(storage)
    assert newest is not None
    assert newest.files.num_rows == num_files
    done = time.perf_counter()
    return {
        "publish_s": round(published - started, 2),
        "read_back_s": round(done - published, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only-plan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_plan:
        print(json.dumps(measure_plan(options.only_plan)))
        return
    print("| files | plan | peak memory | publish | read back |\n|---|---|---|---|---|")
    for num_files in options.files:
        with tempfile.TemporaryDirectory(prefix="qbatch-scale-") as name:
            write_files(Path(name), num_files)
            plan = told_by_process("tests.benchmarks.scale_plan", "--only-plan", name)
            assert plan["units"] == num_files, plan
            made = measure_publish(Path(name), num_files)
        print(
            f"| {num_files:,} | {plan['plan_s']} s | {plan['plan_peak_mib']} MiB "
            f"| {made['publish_s']} s | {made['read_back_s']} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
