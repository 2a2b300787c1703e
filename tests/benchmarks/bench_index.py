"""The index and search jobs beside FAISS called directly in one process, and beside autofaiss.

    python -m tests.benchmarks.bench_index --rows 1000000 --factory IVF4096,SQ8 --json index.json
    python -m tests.benchmarks.bench_index --threads 1 --pairs 5      # on a busy machine

Both sides read the same Parquet files, train on as many vectors with the same seed, use the same
number of threads and write an index; they take turns, each in processes of its own. Processor
seconds are those of all processes of a side. The first ``--train-pairs`` pairs train, the others
take the template of the first: training is the same FAISS call on both sides. The job besides
finds the exact neighbours of 1000 probes, searches them with rising effort, checks every byte it
reads and publishes.

Both searches then visit the same lists of the same template, so what they find has to be equal.
Vectors are clustered: Gaussian around centres in few dimensions, turned into ``--dim``.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.index.columns import VectorColumn
from qbatch.index.memory import MemoryPlan
from qbatch.index.stored import stored_shards
from qbatch.index.training import num_training_rows
from qbatch.manifest import latest_generation
from qbatch.pipelines.search_schedule import needed_bytes
from qbatch.storage import Storage
from qbatch.tables import open_table
from tests.benchmarks.bench_embed_engine import describe_machine
from tests.benchmarks.peer_autofaiss import run_autofaiss
from tests.benchmarks.plain_faiss import read_vectors
from tests.benchmarks.table import Row
from tests.benchmarks.watching import Watch
from tests.vector_tables import rows_table, write_vectors

ROOT = Path(__file__).parents[2]
NUM_PROBES = 1000
NUM_CHECKED = 1000
"""Queries whose true neighbours are computed, to tell recall."""


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the pairs, print the tables and return their rows."""
    options = parse_options(arguments)
    machine = describe_machine(options.threads, options.rows, "wall and CPU time")
    print(machine.replace(" texts", f" vectors of {options.dim}, {options.factory}"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        write_tables(folder, options)
        idle = run_side("index_job", "none", {"flags": {}, "threads": options.threads})
        builds = [build_pair(folder, options, i) for i in range(options.pairs)]
        print_builds(builds, idle)
        searches = search_pairs(folder, options)
        print_searches(searches, idle)
        memory = compare_memory(folder, options, [p["job"] for p in (*builds, *searches)])
        peer = autofaiss(folder, options) if options.autofaiss else None
        recalls = print_recalls(folder, options, peer)
    if options.json:
        found = {"machine": machine, "idle": idle, "builds": builds, "memory": memory}
        found |= {"searches": searches, "autofaiss": peer, "recalls": recalls}
        options.json.write_text(json.dumps(found, indent=1))
    rows = [build_row(builds, idle, options)] if options.train_pairs else []
    searched = search_row(searches, options)
    peers = [] if peer is None else peer_rows(builds[0]["job"], searched.ours, peer, options)
    return [*rows, searched, *peers]


def build_row(builds: list[dict], idle: dict, options: argparse.Namespace) -> Row:
    """Return the row of the pairs that train, in processor seconds of all processes but Ray's."""
    trained = [pair for pair in builds if pair["trains"]]
    return Row.of_turns(
        [(pair["job"]["cpu_s"] - idle["cpu_s"], pair["plain"]["cpu_s"]) for pair in trained],
        options.rows,
        case=f"building {options.factory} of {options.rows:,} x {options.dim}",
        against="FAISS in one process",
        unit="vectors/CPU s",
        goal=0.95,
    )


def peer_rows(build: dict, ours: float, peer: dict, options: argparse.Namespace) -> list[Row]:
    """Return the rows of autofaiss: reading and building, then searching at its own settings.

    ``ours`` is what the search job answers, in queries/s.
    """
    if "failed" in peer:
        return []
    size = f"{options.rows:,} x {options.dim}"
    build_row = Row.of_turns(
        [(build["seconds"]["job"] + startup_s(build), peer["build_s"])],
        options.rows,
        case=f"building {options.factory} of {size}, start of Ray included",
        against="autofaiss",
        unit="vectors/s",
        goal=1.0,
    )
    search = Row(
        case=f"searching {size}, each at the effort it chose",
        against="autofaiss",
        unit="queries/s",
        ours=ours,
        theirs=peer["queries_per_s"],
        ratios=(ours / peer["queries_per_s"],),
        goal=1.0,
    )
    return [build_row, search]


def search_row(searches: list[dict], options: argparse.Namespace) -> Row:
    return Row.of_turns(
        [
            (pair["job"]["summary"]["seconds"]["searching"], pair["plain"]["seconds"]["search"])
            for pair in searches
        ],
        options.queries,
        case=f"searching it, {options.queries:,} queries in {options.shards} shards",
        against="FAISS in one process",
        unit="queries/s",
        goal=0.9,
    )


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--factory", default="IVF4096,SQ8")
    parser.add_argument("--target-recall", type=float, default=0.95)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--train-pairs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--autofaiss", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, help="where tables are kept for the next run")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


class Files(Mapping[str, pa.Table]):
    """Vectors files that are made when they are asked for, so that never two are held."""

    def __init__(self, rows: int, dim: int, num_files: int, seed: int) -> None:
        rng = np.random.default_rng(0)
        self._centres = rng.standard_normal((2000, 32), np.float32)
        self._turn = rng.standard_normal((32, dim), np.float32) / np.float32(32**0.5)
        self._bounds = np.linspace(0, rows, num_files + 1).astype(int)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[str]:
        return (f"{i:03d}.jsonl" for i in range(len(self)))

    def __getitem__(self, name: str) -> pa.Table:
        number = int(name[:3])
        start, stop = self._bounds[number : number + 2]
        rng = np.random.default_rng([self._seed, number])
        chosen = self._centres[rng.integers(0, len(self._centres), stop - start)]
        inner = chosen + np.float32(0.7) * rng.standard_normal(chosen.shape, np.float32)
        vectors = inner @ self._turn
        vectors += np.float32(0.1) * rng.standard_normal(vectors.shape, np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return rows_table(vectors, [f"d{i}" for i in range(start, stop)])


def write_tables(folder: Path, options: argparse.Namespace) -> None:
    """Publish vectors and queries, unless they are there."""
    for name, rows, files, seed in (
        ("vectors", options.rows, options.files, 1),
        ("queries", options.queries, 1, 2),
    ):
        if latest_generation(Storage(f"{folder}/{name}")) is None:
            write_vectors(f"{folder}/{name}", Files(rows, options.dim, files, seed))


def run_side(module: str, side: str, arguments: dict) -> dict:
    """Run a side; return what it printed, its processor seconds and peaks of memory."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.benchmarks.{module}", side, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with Watch(process.pid) as watch:
        printed, log = process.communicate()
    if process.returncode:
        sys.exit(f"{side} failed:\n{log[-4000:]}")
    found = json.loads(printed.splitlines()[-1])
    return {**found, "cpu_s": watch.cpu_s, "peak_bytes": dict(watch.peak_bytes)}


def table_files(uri: Path) -> list[str]:
    """Return the paths of a published table's files."""
    return [f"{uri}/{entry['path']}" for entry in open_table(str(uri)).generation.files.to_pylist()]


def build_pair(folder: Path, options: argparse.Namespace, number: int) -> dict:
    """Build with both sides; return their figures."""
    trains = number < options.train_pairs
    template, index = folder / "template.faiss", folder / "index"
    kept = folder / "training"
    shutil.rmtree(index, ignore_errors=True)
    if trains:
        template.unlink(missing_ok=True)
    else:
        for name in ("training", "templates", "probes"):
            shutil.copytree(kept / name, index / name)
    plain = {
        "files": table_files(folder / "vectors"),
        "factory": options.factory,
        "sample_rows": min(options.rows, num_training_rows(options.factory, options.dim, "l2")),
        "threads": options.threads,
        "output": f"{folder}/plain.faiss",
        "template": str(template),
    }
    flags = {
        "vectors": f"{folder}/vectors",
        "output": str(index),
        "factory": options.factory,
        "num_shards": options.shards,
        "num_probes": NUM_PROBES,
        "target_recall": options.target_recall,
    }
    found = {"trains": trains, "plain": run_side("plain_faiss", "build", plain)}
    job = run_side("index_job", "build_index", {"flags": flags, "threads": options.threads})
    found["job"] = job | {"stages": shard_seconds(index)}
    if trains:
        shutil.rmtree(kept, ignore_errors=True)
        for name in ("training", "templates", "probes"):
            shutil.copytree(index / name, kept / name)
    print_build(found)
    return found


def shard_seconds(index: Path) -> dict[str, float]:
    """Return the seconds of all shard tasks together by stage."""
    generation = open_table(str(index)).generation
    plan = pq.read_table(f"{index}/{generation.plan['path']}", columns=["facts"])
    seconds = [json.loads(facts.as_py())["seconds"] for facts in plan["facts"]]
    return {stage: round(sum(s.get(stage, 0) for s in seconds), 2) for stage in seconds[0]}


def print_build(found: dict) -> None:
    plain, job = found["plain"], found["job"]
    rounded = {name: round(value, 2) for name, value in plain["seconds"].items()}
    print(f"plain build  cpu {plain['cpu_s']:.1f} s, wall {rounded}")
    print(
        f"job          cpu {job['cpu_s']:.1f} s, wall {job['summary']['seconds']}, Ray start "
        f"{job['seconds']['start']:.2f}; stages over all shards {job['stages']}",
        flush=True,
    )


def print_builds(builds: list[dict], idle: dict) -> None:
    """Print plain FAISS over the job, 1 for equal cost: the goal is 0.95."""
    print(f"Ray alone: start {idle['seconds']['start']:.1f} s, {idle['cpu_s']:.1f} CPU s")
    print(f"{'build':28}{'plain s':>9}{'job s':>9}{'ratio':>7}{'with Ray s':>12}{'ratio':>7}")
    for trains, name in ((True, "trained"), (False, "with a given template")):
        chosen = [pair for pair in builds if pair["trains"] is trains]
        if not chosen:
            continue
        walls = [
            (sum(p["plain"]["seconds"].values()), p["job"]["seconds"]["job"], startup_s(p["job"]))
            for p in chosen
        ]
        cpus = [
            (p["plain"]["cpu_s"], p["job"]["cpu_s"] - idle["cpu_s"], idle["cpu_s"]) for p in chosen
        ]
        for clock, rows in (("wall", walls), ("CPU", cpus)):
            plain, job, start = (statistics.median(column) for column in zip(*rows, strict=True))
            ratio = statistics.median(a / b for a, b, _ in rows)
            whole = statistics.median(a / (b + c) for a, b, c in rows)
            print(
                f"{name + ', ' + clock:28}{plain:9.1f}{job:9.1f}{ratio:7.2f}"
                f"{job + start:12.1f}{whole:7.2f}",
                flush=True,
            )


def startup_s(job: dict) -> float:
    """Return the seconds of starting and stopping Ray."""
    return job["seconds"]["start"] + job["seconds"]["stop"]


def compare_memory(folder: Path, options: argparse.Namespace, jobs: list[dict]) -> list[dict]:
    """Print the memory plan beside the peak of each kind of process over all pairs."""
    vectors, shards = open_table(f"{folder}/vectors").generation, stored_shards_of(folder / "index")
    plan = MemoryPlan.of(
        options.factory,
        VectorColumn.of(vectors.fingerprint),
        ntotal=options.rows,
        shard_rows=max(shard.rows for shard in shards),
        part_rows=max(vectors.files["rows"].to_pylist()),
        num_probes=NUM_PROBES,
    )
    planned = {
        "ray::_fit": plan.training,
        "ray::build_shard": plan.shard,
        "ray::SearchActor": needed_bytes(shards),
    }
    rows = []
    print(f"{'process':20}{'plan MiB':>10}{'peak MiB':>10}{'share':>7}")
    for title, needed in planned.items():
        peaks = [
            peak
            for job in jobs
            for name, peak in job["peak_bytes"].items()
            if name.startswith(title)
        ]
        if peaks:
            rows.append({"process": title, "plan_bytes": needed, "peak_bytes": max(peaks)})
            mib = f"{needed / 2**20:10.0f}{max(peaks) / 2**20:10.0f}"
            print(f"{title:20}{mib}{max(peaks) / needed:7.2f}", flush=True)
    return rows


def stored_shards_of(index: Path) -> list:
    table = open_table(str(index))
    return stored_shards(table.storage, table.generation)


def search_pairs(folder: Path, options: argparse.Namespace) -> list[dict]:
    """Search with both sides in turn; return their figures."""
    index = folder / "index"
    nprobe = open_table(str(index)).generation.details["search"]["nprobe"]
    merge_shards(index, folder / "merged.faiss")
    plain = {
        "files": table_files(folder / "queries"),
        "index": f"{folder}/merged.faiss",
        "top_k": options.top_k,
        "nprobe": nprobe,
        "threads": options.threads,
        "output": f"{folder}/plain.npz",
    }
    flags = {
        "index": str(index),
        "queries": f"{folder}/queries",
        "output": f"{folder}/run",
        "top_k": options.top_k,
    }
    found = []
    for _ in range(options.pairs):
        shutil.rmtree(folder / "run", ignore_errors=True)
        arguments = {"flags": flags, "threads": options.threads}
        found.append(
            {
                "nprobe": nprobe,
                "queries": options.queries,
                "plain": run_side("plain_faiss", "search", plain),
                "job": run_side("index_job", "search_index", arguments),
                "equal": share_equal(folder, options),
            }
        )
    return found


def merge_shards(index: Path, output: Path) -> None:
    """Write one index of all shards, rows counted over all of them."""
    merged = None
    for shard in stored_shards_of(index):
        part = faiss.read_index(f"{index}/{shard.index['path']}")
        if merged is None:
            merged = part
        else:
            merged.merge_from(part, shard.row_base)
    faiss.write_index(merged, str(output))


def document_numbers(index: Path) -> np.ndarray:
    """Return the number in the id of each row's document, in row order."""
    ids = [
        pq.read_table(f"{index}/{shard.ids['path']}", columns=["doc_id"])["doc_id"]
        for shard in stored_shards_of(index)
    ]
    return np.concatenate([numbers_of(column) for column in ids])


def numbers_of(ids: pa.ChunkedArray) -> np.ndarray:
    return np.array([int(i[1:]) for i in ids.to_pylist()])


def found_by_job(folder: Path, options: argparse.Namespace) -> np.ndarray:
    """Return the documents of the run: int64, (queries, top_k), -1 for none."""
    run = open_table(f"{folder}/run").to_table(["query_id", "doc_id", "rank"])
    rows = np.full((options.queries, options.top_k), -1)
    rows[numbers_of(run["query_id"]), run["rank"].to_numpy() - 1] = numbers_of(run["doc_id"])
    return rows


def found_by_plain(folder: Path) -> np.ndarray:
    rows = np.load(f"{folder}/plain.npz")["rows"]
    return np.where(rows < 0, -1, document_numbers(folder / "index")[rows])


def share_equal(folder: Path, options: argparse.Namespace) -> float:
    """Return the share of places in which both sides found the same document."""
    return float((found_by_plain(folder) == found_by_job(folder, options)).mean())


def print_searches(searches: list[dict], idle: dict) -> None:
    """Print queries per second: the goal for the job is 0.90 of plain FAISS."""
    queries, nprobe = searches[0]["queries"], searches[0]["nprobe"]
    equal = min(pair["equal"] for pair in searches)
    print(
        f"search, nprobe {nprobe}, equal places {equal:.6f}; job stages "
        f"{searches[-1]['job']['summary']['seconds']}"
    )
    print(f"{'search':28}{'plain q/s':>11}{'job q/s':>9}{'ratio':>7}    range")
    figures = {
        "searching, wall": lambda p: (
            p["plain"]["seconds"]["search"],
            p["job"]["summary"]["seconds"]["searching"],
        ),
        "job without Ray start, wall": lambda p: (
            sum(p["plain"]["seconds"].values()),
            p["job"]["seconds"]["job"],
        ),
        "all, wall": lambda p: (
            sum(p["plain"]["seconds"].values()),
            p["job"]["seconds"]["job"] + startup_s(p["job"]),
        ),
        "all but Ray start, CPU": lambda p: (
            p["plain"]["cpu_s"],
            p["job"]["cpu_s"] - idle["cpu_s"],
        ),
    }
    for name, figure in figures.items():
        pairs = [figure(pair) for pair in searches]
        plain, job = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [a / b for a, b in pairs]
        line = f"{name:28}{queries / plain:11.0f}{queries / job:9.0f}"
        print(f"{line}{statistics.median(ratios):7.2f}    {min(ratios):.2f}-{max(ratios):.2f}")


def autofaiss(folder: Path, options: argparse.Namespace) -> dict:
    """Run the peer on the same files and print its figures."""
    peer = run_autofaiss(
        table_files(folder / "vectors"),
        table_files(folder / "queries")[0],
        options,
        output=f"{folder}/autofaiss",
        checked=NUM_CHECKED,
    )
    if "failed" not in peer:
        print(
            f"autofaiss: read and build {peer['build_s']:.1f} s ({peer['build_cpu_s']:.1f} CPU s), "
            f"nprobe {peer['nprobe']}, {peer['queries_per_s']:.0f} q/s"
        )
    return peer


def print_recalls(folder: Path, options: argparse.Namespace, peer: dict | None) -> dict:
    """Print recall@10 of both sides and of autofaiss on real queries."""
    queries = read_vectors(table_files(folder / "queries"))[:NUM_CHECKED]
    exact = exact_documents(folder, queries)
    found = {
        "plain FAISS": found_by_plain(folder)[:NUM_CHECKED, :10],
        "job": found_by_job(folder, options)[:NUM_CHECKED, :10],
    }
    if peer and "rows" in peer:
        found["autofaiss"] = documents_in_file_order(folder)[np.array(peer.pop("rows"))]
    recalls = {name: recall(rows, exact) for name, rows in found.items()}
    for name, value in recalls.items():
        print(f"recall@10 of {len(queries)} queries, {name}: {value:.4f}")
    return recalls


def recall(rows: np.ndarray, exact: np.ndarray) -> float:
    shared = [len(np.intersect1d(a, b)) for a, b in zip(rows, exact, strict=True)]
    return float(np.mean(shared) / exact.shape[1])


def documents_in_file_order(folder: Path) -> np.ndarray:
    files = table_files(folder / "vectors")
    columns = [pq.read_table(file, columns=["doc_id"])["doc_id"] for file in files]
    return np.concatenate([numbers_of(column) for column in columns])


def exact_documents(folder: Path, queries: np.ndarray) -> np.ndarray:
    """Return the true ten nearest documents of some queries."""
    heap = faiss.ResultHeap(len(queries), 10)
    first = 0
    for file in table_files(folder / "vectors"):
        vectors = read_vectors([file])
        distances, rows = faiss.knn(queries, vectors, 10)
        heap.add_result(distances, rows + first)
        first += len(vectors)
    heap.finalize()
    return documents_in_file_order(folder)[heap.I]


if __name__ == "__main__":
    main()
