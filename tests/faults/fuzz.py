"""Damaged input for every reader: whatever comes in, rows are accounted for or the error is ours.

    python -m tests.faults.fuzz --inputs 10000

Valid objects of each format are damaged from a seed: bits flip, bytes go, are doubled or replaced
by ones that mean something to a parser, pieces of two objects are joined. Each is planned and read
as a job does. Allowed are documents and rejects that add up, or an error of qbatch. A process that
dies or hangs is a failure too; the table names the number, which gives the same bytes again.
"""

import argparse
import faulthandler
import gzip
import io
import json
import logging
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units
from qbatch.errors import QbatchError
from qbatch.manifest import latest_generation
from qbatch.storage import Storage
from tests.unit_rows import check_invariants

_INPUTS_PER_PROCESS = 250
_HANGS_S = 60
_WORDS = (
    *("", "a", "naïve", "日本語のテキスト", "🙂", "x" * 300, 'say "hi", twice'),
    *("two\nlines", "0", "null"),
)
_TOKENS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\r\n", b"\t", b"\0", b"\\u0000", b"\\ud800"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"NaN", b"1e999", b"PAR1", b"\x1f\x8b"),
    *(b"\x28\xb5\x2f\xfd", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00", b"[" * 2000, b"9" * 400),
)


def _rows(rng: random.Random) -> list[dict[str, object]]:
    return [
        {"doc_id": rng.choice([str(i), None]), "text": " ".join(rng.choices(_WORDS, k=5)), "n": i}
        for i in range(rng.randint(1, 30))
    ]


def _jsonl(rng: random.Random) -> bytes:
    return "".join(
        json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in _rows(rng)
    ).encode()


def _csv(rng: random.Random) -> bytes:
    quoted = [
        ",".join('"' + str(row[name] or "").replace('"', '""') + '"' for name in ("doc_id", "text"))
        for row in _rows(rng)
    ]
    return "\n".join(["doc_id,text", *quoted]).encode()


def _text(rng: random.Random) -> bytes:
    return "\n".join(str(row["text"]) for row in _rows(rng)).encode()


def _parquet(rng: random.Random) -> bytes:
    rows, sink = _rows(rng), io.BytesIO()
    table = pa.table({name: [row[name] for row in rows] for name in ("doc_id", "text", "n")})
    codec = rng.choice(["none", "snappy", "zstd"])
    pq.write_table(table, sink, row_group_size=rng.randint(1, 20), compression=codec)
    return sink.getvalue()


def _manifest(rng: random.Random) -> bytes:
    files = [
        {"path": f"data/{i:032x}-{i:016x}.parquet", "rows": i, "bytes": i, "sha256": f"{i:064x}"}
        for i in range(rng.randint(0, 5))
    ]
    return json.dumps({**_MANIFEST, "files": files}).encode()


_MANIFEST = {
    "generation": 1,
    "nonce": "0" * 32,
    "kind": "vectors",
    "created": "2026-01-01T00:00:00+00:00",
    "single_writer": False,
    "fingerprint": {"dims": [3]},
    "config": {},
    "counts": {"rows_in": 3},
    "details": {},
    "plan": None,
    "rejects": [],
}

CORPORA: dict[str, tuple[Callable[[random.Random], bytes], dict[str, object]]] = {
    "jsonl": (_jsonl, {}),
    "jsonl.gz": (lambda rng: gzip.compress(_jsonl(rng), mtime=0), {}),
    "jsonl.zst": (lambda rng: zstandard.compress(_jsonl(rng)), {}),
    "csv": (_csv, {}),
    "txt": (_text, {}),
    "lines": (_text, {"format": "text-lines"}),
    "parquet": (_parquet, {"keep_columns": ("n",)}),
    "manifest": (_manifest, {}),
}
"""Extension or kind, a valid object, and the settings to read it with."""


def damage(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return a damaged object; ``other`` is a second valid one."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(6)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[at : at + rng.randint(1, 200)]
        elif kind == 2:
            made[at:at] = rng.choice(_TOKENS)
        elif kind == 3:
            made[at : at + rng.randint(0, 8)] = rng.choice(_TOKENS)
        elif kind == 4:
            made[at:at] = made[at : at + rng.randint(1, 500)]
        else:
            made[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(made)


def read_corpus(path: Path, settings: dict[str, object]) -> str:
    """Read a damaged object as a job does; return what became of it, after checking the counts."""
    config = CorpusConfig(input=str(path), unit_bytes=4000, **settings)
    outcome = "read"
    for unit in plan_units(config):
        rows = read_unit(unit, config)
        check_invariants(rows, config)
        for text in rows.documents["text"].to_pylist():
            text.encode()
        if len(rows.rejects):
            outcome = "rejects"
    return outcome


def read_manifest(folder: Path) -> str:
    newest = latest_generation(Storage(str(folder)))
    if newest is not None:
        newest.files.num_rows  # noqa: B018 - lists are read when asked for
    return "read"


def run_inputs(name: str, first: int, stop: int, seed: int, found: multiprocessing.Queue) -> None:
    """Try inputs in this process; say before each which it is."""
    make, settings = CORPORA[name]
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="qbatch-fuzz-") as folder:
        for number in range(first, stop):
            faulthandler.dump_traceback_later(_HANGS_S, exit=True)
            rng = random.Random(f"{seed} {name} {number}")
            data = damage(make(rng), make(rng), rng)
            is_manifest = name == "manifest"
            path = Path(folder, "manifests/00000001.json" if is_manifest else f"a.{name}")
            path = path.with_suffix(".txt") if name == "lines" else path
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            try:
                outcome = (
                    read_manifest(Path(folder)) if is_manifest else read_corpus(path, settings)
                )
            except QbatchError as error:
                outcome = type(error).__name__
            except Exception as error:  # noqa: BLE001 - the table is to say so
                outcome = f"WRONG {type(error).__name__}: {str(error)[:200]}"
            found.put((number, outcome))


def fuzz(name: str, num_inputs: int, seed: int) -> Counter[str]:
    """Return how many inputs had which outcome."""
    outcomes: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    first = 0
    while first < num_inputs:
        stop = min(first + _INPUTS_PER_PROCESS, num_inputs)
        found = context.SimpleQueue()
        process = context.Process(target=run_inputs, args=(name, first, stop, seed, found))
        process.start()
        while process.is_alive() or not found.empty():
            if found.empty():
                time.sleep(0.01)
                continue
            number, outcome = found.get()
            outcomes[outcome if not outcome.startswith("WRONG") else f"{outcome} (#{number})"] += 1
            first = number + 1
        process.join()
        if process.exitcode:
            outcomes[f"WRONG the process ended with {process.exitcode} (#{first})"] += 1
            first += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--readers", nargs="+", choices=sorted(CORPORA), default=sorted(CORPORA))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    is_wrong = False
    print(
        "| reader | inputs | read | with rejects | our errors | wrong | seconds |\n"
        + "|---" * 7
        + "|"
    )
    for name in options.readers:
        started = time.perf_counter()
        outcomes = fuzz(name, options.inputs, options.seed)
        wrong = [text for text in outcomes if text.startswith("WRONG")]
        plain = outcomes["read"], outcomes["rejects"]
        ours = outcomes.total() - sum(plain) - sum(outcomes[text] for text in wrong)
        cells = (name, outcomes.total(), *plain, ours, sum(outcomes[t] for t in wrong))
        print(
            f"| {' | '.join(map(str, cells))} | {time.perf_counter() - started:.0f} |", flush=True
        )
        for text in wrong[:10]:
            print(f"{name}: {text}", file=sys.stderr)
        is_wrong |= bool(wrong)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
