"""autofaiss on the same vectors, in a virtual environment of its own: it needs another FAISS.

It cannot tune scalar quantisers ("we don't have heuristics"), so its lists hold whole vectors.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ENVIRONMENT = Path("~/.cache/qbatch/peers-autofaiss").expanduser()

SCRIPT = """
import json, sys, time
import faiss, numpy as np, pyarrow.parquet as pq
from autofaiss import build_index
o = json.loads(sys.argv[1])
def read(file):
    return pq.read_table(file, columns=["vector"])["vector"].combine_chunks().values.to_numpy()
started, cpu = time.perf_counter(), time.process_time()
vectors = np.concatenate([read(f).reshape(-1, o["dim"]) for f in o["files"]])
index, facts = build_index(vectors, save_on_disk=True, index_path=o["output"] + ".faiss",
    index_infos_path=o["output"] + ".json", index_key=o["factory"],
    metric_type="l2",
    nb_cores=o["threads"], max_index_memory_usage="4GB", current_memory_available="6GB",
    use_gpu=False, verbose=30)
built, built_cpu = time.perf_counter() - started, time.process_time() - cpu
queries = read(o["queries"]).reshape(-1, o["dim"])
faiss.omp_set_num_threads(o["threads"])
started = time.perf_counter()
rows = index.search(queries, 10)[1]
searched = time.perf_counter() - started
nprobe = getattr(faiss.downcast_index(index), "nprobe", 0)
print(json.dumps({"build_s": built, "build_cpu_s": built_cpu, "nprobe": nprobe,
    "queries_per_s": len(queries) / searched, "rows": rows[:o["checked"]].tolist()}))
"""


def run_autofaiss(
    vectors: list[str], queries: str, options: argparse.Namespace, *, output: str, checked: int
) -> dict:
    """Build and search with autofaiss; return its figures, or why there are none."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    # It holds numpy below 2, which newer pyarrow refuses.
    install = [str(python), "-m", "pip", "install", "--quiet", "autofaiss", "pyarrow<21"]
    arguments = {
        "files": vectors,
        "queries": queries,
        "dim": options.dim,
        "factory": options.factory.partition(",")[0] + ",Flat",
        "threads": options.threads,
        "output": output,
        "checked": checked,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment.pop("PYTHONPATH", None)
    try:
        subprocess.run(install, check=True, capture_output=True, text=True)
        done = subprocess.run(
            [str(python), "-c", SCRIPT, json.dumps(arguments)],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:]
        print(f"autofaiss: not measured, {reason}", file=sys.stderr)
        return {"failed": reason}
    return json.loads(done.stdout.splitlines()[-1])
