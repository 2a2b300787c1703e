"""Where the bundled texts and models lie, and how they and the assets are read."""

import json
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).with_name("corpus.jsonl")
QUERIES = Path(__file__).with_name("queries.jsonl")
MODELS = Path(__file__).with_name("models")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
