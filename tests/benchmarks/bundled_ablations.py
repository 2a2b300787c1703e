"""What each part of the recipe is worth to the bundled embedder.

    python -m tests.benchmarks.bundled_ablations --models bundled-models

After ``make bundled-models``: trains the second stage again without one part each, from the same
first stage, and measures every outcome on the held-out sets, whole and cut to its first components.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.bundled_quality import SETS, measured, retrieval

CONFIG = "jobs/configs/bundled-embedder.toml"
DIMS = (None, 128)
VARIANTS = {
    "without hard negatives": ["--num-negatives", "0"],
    "without the mask": ["--margin", "2"],  # cosines differ by 2 at most
    "without Matryoshka": ["--dims", "384", "--dim-weights", "1"],
}


def main() -> None:
    """Print a line for each variant: nDCG@10 of each set and width."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="of make bundled-models")
    models = parser.parse_args().models
    widths = [f"{name}, {dim or 'all'}" for dim in DIMS for name in SETS]
    print(f"{'nDCG@10':26}" + "".join(f"{width:14}" for width in widths))
    show("as bundled", models, models / "embedder")
    show("without merge", models, models / "trained")
    show("first stage only", models, models / "weakly-trained")
    for name, flags in VARIANTS.items():
        show(name, models, trained(models, name, flags))


def trained(models: Path, name: str, flags: list[str]) -> Path:
    """Return the outcome of the second stage with other flags; a finished one is not repeated."""
    output = models / "ablations" / name.replace(" ", "-")
    command = [sys.executable, "jobs/train_embedder.py", "--config", CONFIG, "--output"]
    subprocess.run([*command, str(output), *flags], check=True, stdout=sys.stderr)
    return output


def show(name: str, models: Path, embedder: Path) -> None:
    figures = []
    for dim in DIMS:
        found = retrieval(measured(models / "texts" / "evaluation", embedder, dim=dim))
        figures += [found[task]["ndcg@10"] for task in SETS]
    print(f"{name:26}" + "".join(f"{figure:<14.3f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
