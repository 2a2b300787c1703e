"""The embedding engine beside sentence-transformers and beside the machine's matrix products.

    python -m tests.benchmarks.bench_embed_engine --num-texts 400 --pairs 5 --json engine.json
    python -m tests.benchmarks.bench_embed_engine --threads 1 --cpu-time     # on a busy machine

Both sides get the same texts, model, dtype and threads, tokenize and embed, and take turns. Speeds
are medians; the spread is that of the ratios of the pairs. The share is of the speed of bare matrix
products in the model's own shapes, measured in turn with the rest.

Qwen3 has the shape of the 0.6B model, cut to six layers with random weights: what is saved outside
the layers weighs more than in the full model, so nothing is saved there. Documents are those of
``--texts`` (JSON lines, fields ``text`` or ``body``), else Debian package descriptions if they are
cached, else the bundled corpus; long documents are pages of the Perl FAQ.
"""

import argparse
import importlib.resources
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import linear
from transformers import AutoModel, Qwen3Config, Qwen3Model

from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.quickstart import assets, bundled
from tests.benchmarks.table import Row
from tests.tiny_models import write_modules

MAX_TOKENS = {"documents": 512, "long documents": 8192}
ANSWERS_OF_A_PAGE = 6
CASES = [
    ("qwen3", "bfloat16"),
    ("qwen3", "float32"),
    ("minilm", "float32"),
    ("minilm", "bfloat16"),
    ("bundled", "float32"),
]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the cases, print a line for each and return their rows."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    texts = TEXTS[options.kind](options)
    clock = "CPU time" if options.cpu_time else "wall time"
    machine = describe_machine(options.threads, len(texts), clock)
    print(machine)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "qwen3": Path(folder),
            "minilm": require("minilm"),
            "bundled": bundled.MODELS / "embedder",
        }
        if "qwen3" in options.models:
            make_qwen3(models["qwen3"], options.layers)
        print(HEADER)
        for name, dtype in CASES:
            if name in options.models and dtype in options.dtypes:
                rows.append(compare(name, models[name], dtype, texts, options))
                print(ROW.format(**rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}))
    return [table_row(found, options) for found in rows]


WHOLE_LAYERS = 28
NAMES = {"qwen3": "0.6B shape", "minilm": "MiniLM", "bundled": "the bundled model"}
GOALS = {("qwen3", "bfloat16"): 2.5, ("qwen3", "float32"): 2.2}


def table_row(found: dict, options: argparse.Namespace) -> Row:
    name = NAMES[found["model"]]
    layers = ""
    if found["model"] == "qwen3":
        is_whole = options.layers == WHOLE_LAYERS
        layers = f", all {WHOLE_LAYERS} layers" if is_whole else f" cut to {options.layers} layers"
    return Row(
        case=f"embedding {options.kind}, {name}{layers}, {found['dtype']}",
        against="sentence-transformers encode",
        unit="tokens/s",
        ours=found["tokens_per_s"],
        theirs=found["other_tokens_per_s"],
        ratios=tuple(found["ratios"]),
        goal=2.0
        if options.kind == "long documents"
        else GOALS.get((found["model"], found["dtype"]), 1.4),
        share=found["share"],
    )


HEADER = (
    f"{'model':8}{'dtype':10}{'tokens':>8}{'tok/s':>9}{'s-t tok/s':>11}{'ratio':>7}{'spread':>14}"
    f"{'GFLOP/s':>9}{'share':>7}{'s-t share':>11}{'padding s-t':>13}{'cosine':>9}"
)
ROW = (
    "{model:8}{dtype:10}{num_tokens:8d}{tokens_per_s:9.0f}{other_tokens_per_s:11.0f}{ratio:7.2f}"
    "{spread:>14}{matmul_gflops:9.0f}{share:7.2f}{other_share:11.2f}{other_padding:13.2f}"
    "{min_cosine:9.5f}"
)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=Path, help="JSON lines; default: see above")
    parser.add_argument("--kind", choices=("documents", "long documents"), default="documents")
    parser.add_argument("--num-texts", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, not the clock")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--models", nargs="+", default=["qwen3", "minilm"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def compare(
    name: str, path: Path, dtype: str, texts: list[str], options: argparse.Namespace
) -> dict[str, object]:
    """Return the figures of one model in one dtype."""
    config = EmbedderConfig(model_path=path, dtype=dtype, token_budget=options.token_budget)
    embedder = config.build()
    max_tokens = min(MAX_TOKENS[options.kind], embedder.spec.max_tokens)
    tokenizer = TextTokenizer.load(path, max_tokens)
    other = load_other(path, dtype, max_tokens)
    weights = layer_weights(path, dtype)

    def ours() -> np.ndarray:
        batch = tokenizer.encode(texts)
        return embedder.embed(batch.ids, batch.lengths)

    def theirs() -> np.ndarray:
        return other.encode(texts, batch_size=32, normalize_embeddings=True)

    cosine = float((ours() * theirs()).sum(1).min())
    clock = time.process_time if options.cpu_time else time.perf_counter
    runs = [
        (
            seconds(ours, clock),
            seconds(theirs, clock),
            matmul_flops(weights, embedder.token_budget, clock),
        )
        for _ in range(options.pairs)
    ]
    own_s, other_s, flops = (statistics.median(column) for column in zip(*runs, strict=True))
    ratios = [b / a for a, b, _ in runs]
    lengths = tokenizer.encode(texts).lengths
    needed = 2 * sum(w.numel() for w in weights) * int(lengths.sum())
    return {
        "model": name,
        "dtype": dtype,
        "num_tokens": int(lengths.sum()),
        "tokens_per_s": lengths.sum() / own_s,
        "other_tokens_per_s": lengths.sum() / other_s,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "spread": f"{min(ratios):.2f}-{max(ratios):.2f}",
        "matmul_gflops": flops / 1e9,
        "share": needed / own_s / flops,
        "other_share": needed / other_s / flops,
        "other_padding": padding_of_other(texts, lengths),
        "min_cosine": cosine,
    }


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return clock() - started


@torch.inference_mode()
def matmul_flops(weights: list[torch.Tensor], num_tokens: int, clock: Callable[[], float]) -> float:
    """Return FLOP/s of one product with each weight, with a pack of tokens on the other side."""
    inputs = {w.shape[1]: torch.randn(num_tokens, w.shape[1]).to(w.dtype) for w in weights}
    elapsed = seconds(lambda: [linear(inputs[w.shape[1]], w) for w in weights], clock)
    return 2 * num_tokens * sum(w.numel() for w in weights) / elapsed


def layer_weights(path: Path, dtype: str) -> list[torch.Tensor]:
    """Return the matrices every token is multiplied with."""
    model = AutoModel.from_pretrained(path, dtype=getattr(torch, dtype))
    modules = [m for name, m in model.named_modules() if "pooler" not in name]
    return [m.weight.data for m in modules if isinstance(m, torch.nn.Linear)]


def load_other(path: Path, dtype: str, max_tokens: int) -> SentenceTransformer:
    options = {"dtype": getattr(torch, dtype)}
    other = SentenceTransformer(str(path), device="cpu", model_kwargs=options)
    other.max_seq_length = max_tokens
    return other


def padding_of_other(texts: list[str], lengths: np.ndarray) -> float:
    """Return the padding of batches of 32 in order of characters, as a share of the real tokens."""
    ordered = lengths[np.argsort([-len(text) for text in texts])]
    batches = [ordered[i : i + 32] for i in range(0, len(ordered), 32)]
    return sum(b.max() * len(b) for b in batches) / lengths.sum() - 1


def make_qwen3(path: Path, num_layers: int) -> None:
    """Write a random model of the 0.6B shape as the released one is laid out."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_669,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    Qwen3Model(config).to(torch.bfloat16).save_pretrained(path)
    source = require("qwen3-tokenizer")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 151_643)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = (source / "tokenizer_config.json").read_text()
    (path / "tokenizer_config.json").write_text(settings)
    pooling = {"word_embedding_dimension": 1024, "pooling_mode_lasttoken": True}
    write_modules(path, pooling, ("Normalize",))


def require(name: str) -> Path:
    path = assets.cached(name)
    if path is None:
        sys.exit(f"needs `python -m qbatch.quickstart.assets {name}`")
    return path


def read_texts(file: Path | None, num_texts: int) -> list[str]:
    """Return a seeded sample of distinct texts."""
    file = file or assets.cached("debian-descriptions")
    bundled = importlib.resources.files("qbatch.quickstart") / "corpus.jsonl"
    lines = (file or bundled).read_text(encoding="utf-8").splitlines()
    texts = sorted(set(texts_of(lines)))
    return random.Random(0).sample(texts, min(num_texts, len(texts)))


def read_pages(options: argparse.Namespace) -> list[str]:
    """Return long documents: neighbouring answers of the Perl FAQ joined."""
    rows = [json.loads(line) for line in require("perlfaq").read_text("utf-8").splitlines()]
    answers = [f"{row['question']}\n\n{row['answer']}" for row in rows]
    starts = range(0, len(answers), ANSWERS_OF_A_PAGE)
    pages = ["\n\n".join(answers[i : i + ANSWERS_OF_A_PAGE]) for i in starts]
    return random.Random(0).sample(pages, min(options.num_texts, len(pages)))


TEXTS = {
    "documents": lambda options: read_texts(options.texts, options.num_texts),
    "long documents": read_pages,
}


def texts_of(lines: list[str]) -> Iterator[str]:
    for line in lines:
        row = json.loads(line)
        yield row.get("text") or row["body"]


def describe_machine(threads: int, num_texts: int, clock: str = "wall time") -> str:
    cpus = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [line.partition(": ")[2] for line in cpus.splitlines() if "model name" in line]
    parts = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        names[0] if names else platform.processor(),
        f"{threads} threads",
        clock,
        f"load {os.getloadavg()[0]:.1f}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"{num_texts} texts",
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
