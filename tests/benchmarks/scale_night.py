"""What a night that finds no change costs as a corpus grows: its embed job, unit by unit.

    python -m tests.benchmarks.scale_night --units 10000 100000

For each number of units: a real embed job of a tiny random model fills the vectors table once, each
unit one small object of its own; then the same job runs again, in a fresh process that has nothing
to embed. Its time counts from a started Ray to the published generation; its memory is that of the
driver, which holds whatever grows with the number of units, above what it had before the job.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from tests.benchmarks.scale_plan import UNIT_BYTES, write_files
from tests.benchmarks.watching import peak_bytes, told_by_process
from tests.tiny_models import write_tiny_encoder

_MODULE = "tests.benchmarks.scale_night"


def config_for(folder: Path) -> EmbedCorpusConfig:
    """Return the job over the corpus below a folder."""
    return EmbedCorpusConfig(
        input=f"{folder}/corpus",
        output=f"{folder}/vectors",
        model=f"{folder}/model",
        dtype="float32",
        unit_bytes=UNIT_BYTES,
        max_actors=1,
    )


def measure_job(folder: Path) -> dict[str, Any]:
    """Run the embed job; in a process of its own, so that its memory is known."""
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=2**29,
        include_dashboard=False,
        log_to_driver=False,
    )
    before = peak_bytes()
    started = time.perf_counter()
    summary = embed_corpus(config_for(folder))
    return {
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
        "grown_bytes": peak_bytes() - before,
        **{name: summary[name] for name in ("units_made", "units_reused", "passages_embedded")},
    }


def table_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "vectors").rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--units", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--only-job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_job:
        print(json.dumps(measure_job(options.only_job)))
        return
    print(
        "| units | first night | night without a change | ms a unit | peak memory | of it the job "
        "| table |\n|---|---|---|---|---|---|---|"
    )
    for num_units in options.units:
        with tempfile.TemporaryDirectory(prefix="qbatch-scale-") as name:
            folder = Path(name)
            write_tiny_encoder(folder / "model")
            write_files(folder, num_units)
            first, again = (told_by_process(_MODULE, "--only-job", name) for _ in range(2))
            size = table_bytes(folder)
        assert first["units_made"] == again["units_reused"] == num_units, (first, again)
        assert again["units_made"] == again["passages_embedded"] == 0, again
        print(
            f"| {num_units:,} | {first['seconds']:.1f} s | {again['seconds']:.1f} s "
            f"| {1000 * again['seconds'] / num_units:.2f} | {again['peak_bytes'] / 2**20:.0f} MiB "
            f"| {again['grown_bytes'] / 2**20:.0f} MiB | {size / 2**20:.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
