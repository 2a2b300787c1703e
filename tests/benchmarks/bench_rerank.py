"""The reranker beside sentence-transformers and the model card's loop; queries with an instruction.

    python -m tests.benchmarks.bench_rerank --num-queries 4 --pairs 5 --json rerank.json
    python -m tests.benchmarks.bench_rerank --threads 1 --cpu-time        # on a busy machine

All sides get the same texts, model, dtype and threads, tokenize and score, and take turns. Speeds
are medians; the spread is that of the ratios of the turns. Qwen3 has the shape of the 0.6B model
cut to six layers with random weights: what is saved outside the layers weighs more than in the full
model.

``cross-encoder`` is sentence-transformers' CrossEncoder on the same causal checkpoint, with the
prompt as its chat template. ``card`` is the model card's loop: left padding, batches of 16, logits
of the whole vocabulary at every position. ``card, last`` is that loop with logits of the last
position only. ``queries`` embeds short queries with one instruction, ours against sentence-
transformers' ``encode`` with the instruction as its prompt.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from qbatch.models.embedder import EmbedderConfig
from qbatch.models.prompts import qwen3_query_prompt
from qbatch.models.rerank_prompts import JUDGE_END, JUDGE_START, judge_opening
from qbatch.models.rerank_tokens import CandidateGroup
from qbatch.models.reranker import RerankerConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.quickstart import assets
from tests.benchmarks.bench_embed_engine import describe_machine, make_qwen3, require, seconds
from tests.benchmarks.table import Row

YES, NO = 9693, 2152
MAX_TOKENS = 8192

Score = Callable[[], np.ndarray]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the cases, print a line for each opponent and return their rows."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    clock = "CPU time" if options.cpu_time else "wall time"
    groups = read_groups(options)
    num_pairs = sum(len(g.documents) for g in groups)
    machine = describe_machine(options.threads, num_pairs, clock)
    print(machine)
    print(HEADER)
    rows = []
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare_rerankers(Path(folder), dtype, groups, options)
        with tempfile.TemporaryDirectory() as folder:
            rows += compare_queries(Path(folder), dtype, options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}))
    return [table_row(found, options) for found in rows]


def table_row(found: dict, options: argparse.Namespace) -> Row:
    is_query = found["against"] == "queries"
    what = "short queries with an instruction" if is_query else "reranking"
    against, goal = {
        "queries": ("sentence-transformers encode", 4.0),
        "cross-encoder": ("sentence-transformers CrossEncoder", 4.0),
        "card": ("the model card's loop", 8.0),
        "card, last": ("the card's loop, last logits only", 1.0),
    }[found["against"]]
    return Row(
        case=f"{what}, 0.6B shape cut to {options.layers} layers, {found['dtype']}",
        against=against,
        unit="texts/s",
        ours=found["texts_per_s"],
        theirs=found["other_texts_per_s"],
        ratios=tuple(found["ratios"]),
        goal=goal,
    )


HEADER = (
    f"{'against':15}{'dtype':10}{'texts':>7}{'tokens':>8}{'computed':>10}{'ours/s':>9}"
    f"{'theirs/s':>10}{'ratio':>7}{'spread':>14}{'largest difference':>20}"
)
ROW = (
    "{against:15}{dtype:10}{num_texts:7d}{num_tokens:8d}{num_computed:10d}{texts_per_s:9.1f}"
    "{other_texts_per_s:10.1f}{ratio:7.2f}{spread:>14}{difference:20.5f}"
)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-queries", type=int, default=4, help="to rerank candidates for")
    parser.add_argument("--num-candidates", type=int, default=100)
    parser.add_argument("--num-short", type=int, default=400, help="queries to embed")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, not the clock")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument(
        "--against",
        nargs="+",
        default=["cross-encoder", "card", "card, last", "queries"],
        help="opponents to measure",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def read_groups(options: argparse.Namespace) -> list[CandidateGroup]:
    """Return synopses as queries; candidates are their own body and other packages' bodies."""
    rng = np.random.default_rng(0)
    rows = read_packages()
    picks = [rows[i] for i in rng.permutation(len(rows))[: options.num_queries]]
    return [
        CandidateGroup(
            query=row["synopsis"],
            documents=[
                row["body"],
                *(rows[i]["body"] for i in rng.integers(0, len(rows), options.num_candidates - 1)),
            ],
        )
        for row in picks
    ]


def read_packages() -> list[dict[str, str]]:
    """Return the English descriptions, 77 tokens in the mean."""
    file = assets.cached("debian-descriptions")
    if file is None:
        sys.exit("needs `python -m qbatch.quickstart.assets debian-descriptions`")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["synopsis"] and row["id"].endswith(":en")]


def compare_rerankers(
    path: Path, dtype: str, groups: list[CandidateGroup], options: argparse.Namespace
) -> list[dict[str, object]]:
    names = [name for name in options.against if name in OPPONENTS]
    if not names:
        return []
    make_reranker(path, options.layers)
    reranker = RerankerConfig(
        model_path=path, dtype=dtype, token_budget=options.token_budget, device="cpu"
    ).build()
    theirs = {name: OPPONENTS[name](path, dtype, groups) for name in names}

    def ours() -> np.ndarray:
        return np.concatenate(reranker.score(groups))

    keys = ours()
    sizes = {
        "num_texts": len(keys),
        "num_tokens": reranker.stats.num_tokens,
        "num_computed": reranker.stats.num_computed,
    }
    errors = {name: float(np.abs(call() - keys).max()) for name, call in theirs.items()}
    return measure(ours, theirs, sizes, errors, dtype, options)


def compare_queries(path: Path, dtype: str, options: argparse.Namespace) -> list[dict[str, object]]:
    if "queries" not in options.against:
        return []
    make_qwen3(path, options.layers)
    rows, rng = read_packages(), np.random.default_rng(0)
    queries = [rows[i]["synopsis"] for i in rng.permutation(len(rows))[: options.num_short]]
    prompt = qwen3_query_prompt()
    embedder = EmbedderConfig(
        model_path=path, dtype=dtype, token_budget=options.token_budget, device="cpu"
    ).build()
    tokenizer = TextTokenizer.load(path, MAX_TOKENS)
    other = SentenceTransformer(
        str(path), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}
    )

    def ours() -> np.ndarray:
        batch = tokenizer.encode([prompt + query for query in queries])
        return embedder.embed(batch.ids, batch.lengths)

    def theirs() -> np.ndarray:
        return other.encode(queries, prompt=prompt, batch_size=32, normalize_embeddings=True)

    vectors = ours()
    sizes = {
        "num_texts": len(queries),
        "num_tokens": embedder.stats.num_tokens,
        "num_computed": embedder.stats.num_computed,
    }
    errors = {"queries": 1 - float((vectors * theirs()).sum(1).min())}
    return measure(ours, {"queries": theirs}, sizes, errors, dtype, options)


def measure(
    ours: Score,
    theirs: dict[str, Score],
    sizes: dict[str, int],
    errors: dict[str, float],
    dtype: str,
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """Let all take turns, print and return a row for each opponent."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    turns = [
        {"": seconds(ours, clock), **{name: seconds(f, clock) for name, f in theirs.items()}}
        for _ in range(options.pairs)
    ]
    own_s = statistics.median(turn[""] for turn in turns)
    rows = []
    for name in theirs:
        ratios = [turn[name] / turn[""] for turn in turns]
        other_s = statistics.median(turn[name] for turn in turns)
        row = {
            "against": name,
            "dtype": dtype,
            **sizes,
            "texts_per_s": sizes["num_texts"] / own_s,
            "other_texts_per_s": sizes["num_texts"] / other_s,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "spread": f"{min(ratios):.2f}-{max(ratios):.2f}",
            "difference": errors[name],
        }
        print(ROW.format(**row), flush=True)
        rows.append(row)
    return rows


def cross_encoder(path: Path, dtype: str, groups: list[CandidateGroup]) -> Score:
    model = CrossEncoder(
        str(path),
        device="cpu",
        max_length=MAX_TOKENS,
        model_kwargs={"dtype": getattr(torch, dtype)},
        activation_fn=torch.nn.Identity(),
    )
    pairs = [(g.query, document) for g in groups for document in g.documents]
    return lambda: np.asarray(model.predict(pairs, batch_size=32), np.float32)


def card_loop(
    path: Path, dtype: str, groups: list[CandidateGroup], *, keep: int = 0, batch_size: int = 16
) -> Score:
    """Return the loop of the Qwen3-Reranker model card."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    start, end = (tokenizer.encode(x, add_special_tokens=False) for x in (JUDGE_START, JUDGE_END))
    bodies = [
        f"{judge_opening()} {g.query}\n<Document>: {document}"
        for g in groups
        for document in g.documents
    ]

    @torch.no_grad()
    def score() -> np.ndarray:
        scores = []
        for i in range(0, len(bodies), batch_size):
            inputs = tokenizer(
                bodies[i : i + batch_size],
                padding=False,
                truncation="longest_first",
                return_attention_mask=False,
                max_length=MAX_TOKENS - len(start) - len(end),
            )
            inputs["input_ids"] = [start + ids + end for ids in inputs["input_ids"]]
            inputs = tokenizer.pad(inputs, padding=True, return_tensors="pt")
            logits = model(**inputs, logits_to_keep=keep).logits[:, -1, :]
            scores.append((logits[:, YES].float() - logits[:, NO].float()).numpy())
        return np.concatenate(scores)

    return score


OPPONENTS = {
    "cross-encoder": cross_encoder,
    "card": card_loop,
    "card, last": lambda *args: card_loop(*args, keep=1),
}


def make_reranker(path: Path, num_layers: int) -> None:
    """Write a random model of the 0.6B shape as Qwen3-Reranker is laid out, with a chat template.

    The template is that of our prompt, for sentence-transformers, which names roles by side.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_669,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=151_643,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    source = require("qwen3-tokenizer")
    (path / "tokenizer.json").symlink_to(source / "tokenizer.json")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = chat_template()
    settings["padding_side"] = "left"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def chat_template() -> str:
    def literal(text: str) -> str:
        return "{{ " + json.dumps(text) + " }}"

    def field(role: str) -> str:
        return (
            "{%- for m in messages -%}{%- if m.role == '" + role + "' -%}"
            "{{ m.content if m.content is string else m.content[0].text }}"
            "{%- endif -%}{%- endfor -%}"
        )

    parts = [literal(JUDGE_START + judge_opening() + " "), field("query")]
    parts += [literal("\n<Document>: "), field("document"), literal(JUDGE_END)]
    return "".join(parts)


if __name__ == "__main__":
    main()
