"""The whole embed job beside scripts that people write for the same work.

    python -m tests.benchmarks.bench_embed_peers --num-texts 3000 --turns 3 --json peers.json

All sides embed the same descriptions by MiniLM in float32 with the same number of threads, read
them from JSON lines and write Parquet, and take turns. The clock runs from the start of a side's
process to its end, so the start of Ray, imports and the loading of the model are in it. The texts
are those that the model takes whole: of longer ones the scripts would embed the beginning only,
where the job embeds all of it, passage by passage.

``sentence-transformers`` is its ``encode``; ``Ray Data`` is ``map_batches`` with an actor of it;
``Daft`` is its ``embed_text``, in an environment of its own on top of this one's packages.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import pyarrow.parquet as pq

from qbatch.models.loading import load_spec
from qbatch.models.tokenization import TextTokenizer
from tests.benchmarks.bench_embed_engine import describe_machine, read_texts, require
from tests.benchmarks.embed_job import job_command, job_environment, write_corpus
from tests.benchmarks.table import Row

DAFT = Path("~/.cache/qbatch/peers-daft").expanduser()
GOALS = {"sentence-transformers": 1.4, "Daft": 1.4, "Ray Data": 2.0}

SENTENCE_TRANSFORMERS = """
import json, pathlib, sys
import pyarrow as pa, pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
model, corpus, output = sys.argv[1:]
files = sorted(pathlib.Path(corpus).iterdir())
rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
vectors = SentenceTransformer(model, device="cpu").encode([row["text"] for row in rows])
table = {"doc_id": [row["doc_id"] for row in rows], "vector": list(vectors)}
pathlib.Path(output).mkdir()
pq.write_table(pa.table(table), f"{output}/vectors.parquet")
"""

RAY_DATA = """
import os, sys
import ray
from sentence_transformers import SentenceTransformer
model, corpus, output = sys.argv[1:]
class Embed:
    def __init__(self):
        self.model = SentenceTransformer(model, device="cpu")
    def __call__(self, batch):
        batch["vector"] = self.model.encode(list(batch["text"]))
        del batch["text"]
        return batch
ray.init(num_cpus=int(os.environ["OMP_NUM_THREADS"]), include_dashboard=False)
ray.data.read_json(corpus).map_batches(Embed, batch_size=256, concurrency=1).write_parquet(output)
"""

DAFT_SCRIPT = """
import sys
import daft
from daft.functions import embed_text
model, corpus, output = sys.argv[1:]
vectors = embed_text(daft.col("text"), provider="transformers", model=model)
frame = daft.read_json(f"{corpus}/*.jsonl").with_column("vector", vectors)
frame.select("doc_id", "vector").write_parquet(output)
"""

SCRIPTS = {
    "sentence-transformers": SENTENCE_TRANSFORMERS,
    "Daft": DAFT_SCRIPT,
    "Ray Data": RAY_DATA,
}


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the turns, print a line for each, and return a row for each opponent."""
    options = parse_options(arguments)
    model = require("minilm")
    texts = read_fitting_texts(model, options.num_texts)
    print(describe_machine(options.threads, len(texts)))
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        write_corpus(corpus, texts)
        sides = commands(model, corpus, options.against)
        turns = [run_turn(sides, Path(folder), len(texts), options) for _ in range(options.turns)]
    rows = [
        Row.of_turns(
            [(turn["qbatch"], turn[name]) for turn in turns],
            len(texts),
            case=f"whole job, {len(texts):,} documents, MiniLM float32",
            against=name,
            unit="documents/s",
            goal=GOALS[name],
        )
        for name in options.against
    ]
    if options.json:
        options.json.write_text(json.dumps([row.to_json() for row in rows], indent=1))
    return rows


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-texts", type=int, default=3000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--against", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def read_fitting_texts(model: Path, num_texts: int) -> list[str]:
    """Return texts that are shorter than the model's limit."""
    texts = read_texts(None, 2 * num_texts)
    limit = load_spec(model).max_tokens
    lengths = TextTokenizer.load(model, limit).encode(texts).lengths
    return [text for text, n in zip(texts, lengths, strict=True) if n < limit][:num_texts]


def commands(model: Path, corpus: Path, against: list[str]) -> dict[str, list[str]]:
    """Return the command of each side; the output directory is still to be added."""
    sides = {"qbatch": job_command(corpus, model, "float32")}
    for name in against:
        python = daft_python() if name == "Daft" else sys.executable
        sides[name] = [python, "-c", SCRIPTS[name], str(model), str(corpus)]
    return sides


def daft_python() -> str:
    """Return a Python that has Daft, and this environment's packages beneath it."""
    python = DAFT / "bin" / "python"
    if not python.exists():
        venv.create(DAFT, with_pip=True)
        packages = next((DAFT / "lib").glob("python*/site-packages"))
        (packages / "beneath.pth").write_text(sysconfig.get_path("purelib"))
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "daft"]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return str(python)


def run_turn(
    sides: dict[str, list[str]], folder: Path, num_texts: int, options: argparse.Namespace
) -> dict[str, float]:
    """Run all sides once; return the seconds of each."""
    environment = job_environment(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1")
    seconds = {}
    for name, command in sides.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            output = f"{place}/out"
            last = f"--output={output}" if name == "qbatch" else output
            started = time.perf_counter()
            done = subprocess.run(
                [*command, last], env=environment, capture_output=True, text=True, check=False
            )
            seconds[name] = time.perf_counter() - started
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
            check(Path(output), num_texts, name)
    print({name: f"{num_texts / elapsed:.1f}/s" for name, elapsed in seconds.items()}, flush=True)
    return seconds


def check(output: Path, num_texts: int, name: str) -> None:
    """End with a message when a side did not write a vector for each text."""
    folder = output / "vectors" if (output / "vectors").is_dir() else output
    rows = sum(pq.read_metadata(file).num_rows for file in folder.rglob("*.parquet"))
    if rows < num_texts:
        sys.exit(f"{name} wrote {rows} vectors of {num_texts} texts")


if __name__ == "__main__":
    main()
