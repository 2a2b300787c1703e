"""Where the time of embedding goes: matrix products, attention, norms, and everything else.

    python -m tests.benchmarks.profile_forward --model qwen3 --dtype float32 --num-texts 120

A clock runs for one kind of work at a time: entering a module stops its caller's, so the kinds add
up to the whole. It needs work that is done when a call returns, as on a processor; on a GPU use
``torch.profiler``. Beside it stands what bare matrix products of the same shapes take.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AttentionInterface

from qbatch.models.attention import PACKED_ATTENTION, packed_attention
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from tests.benchmarks.bench_embed_engine import (
    MAX_TOKENS,
    describe_machine,
    layer_weights,
    make_qwen3,
    matmul_flops,
    read_texts,
    require,
)

TOKENIZING, OUTSIDE = "tokenizing", "sorting, packing, pooling"
KINDS = (
    ("Linear", "matrix products"),
    ("Embedding", "embedding look-up"),
    ("Norm", "norms"),
    ("RotaryEmbedding", "rotary tables"),
    ("SiLU", "activation"),
    ("GELU", "activation"),
    ("Attention", "rotary, heads and layout"),
    ("MLP", "gate product"),
    ("Layer", "residual sums; in decoders norms and rotary too"),
)
"""By the end of a module's class name, in this order; what fits none is its caller's."""


class Clocks:
    """Seconds by kind of work; of nested kinds only the innermost runs."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._kinds = [OUTSIDE]
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Forget what ran until now."""
        self._charge()
        self.seconds.clear()

    def enter(self, kind: str) -> None:
        self._charge()
        self._kinds.append(kind)

    def leave(self) -> None:
        self._charge()
        self._kinds.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._kinds[-1]] += now - self._since
        self._since = now

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        self.enter(kind)
        yield
        self.leave()

    def wrap(self, kind: str, call: Callable) -> Callable:
        def timed(*args: object, **options: object) -> object:
            with self.running(kind):
                return call(*args, **options)

        return timed


def main() -> None:
    """Print the kinds, largest first."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    texts = read_texts(None, options.num_texts)
    print(describe_machine(options.threads, len(texts)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if options.model == "qwen3":
            make_qwen3(path, options.layers)
        else:
            path = require(options.model)
        found = profile(path, texts, options.dtype)
    print_shares(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("qwen3", "minilm"), default="qwen3")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-texts", type=int, default=120)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def profile(path: Path, texts: list[str], dtype: str) -> dict[str, object]:
    """Embed twice and return the seconds of the second time by kind, and the matmul bound."""
    embedder = EmbedderConfig(model_path=path, dtype=dtype, device="cpu").build()
    tokenizer = TextTokenizer.load(path, min(MAX_TOKENS["documents"], embedder.spec.max_tokens))
    batch = tokenizer.encode(texts)
    embedder.embed(batch.ids, batch.lengths)
    clocks = Clocks()
    watch_modules(embedder._backbone._model, clocks)
    AttentionInterface.register(PACKED_ATTENTION, clocks.wrap("attention", packed_attention))
    clocks.restart()
    with clocks.running(TOKENIZING):
        batch = tokenizer.encode(texts)
    embedder.embed(batch.ids, batch.lengths)
    clocks.enter("the end")
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    weights = layer_weights(path, dtype)
    flops = matmul_flops(weights, embedder.token_budget, time.perf_counter)
    needed = 2 * sum(w.numel() for w in weights) * int(batch.lengths.sum())
    return {"seconds": dict(clocks.seconds), "bound_s": needed / flops}


def watch_modules(model: torch.nn.Module, clocks: Clocks) -> None:
    for module in model.modules():
        name = type(module).__name__
        kind = next((kind for end, kind in KINDS if end in name), None)
        if kind is not None:
            module.register_forward_pre_hook(lambda *_, kind=kind: clocks.enter(kind))
            module.register_forward_hook(lambda *_: clocks.leave())


def print_shares(found: dict) -> None:
    seconds, bound = found["seconds"], found["bound_s"]
    total = sum(seconds.values())
    print(f"{'seconds':>9}{'share':>8}")
    for kind, elapsed in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{elapsed:9.3f}{elapsed / total:8.1%}  {kind}")
    print(f"{total:9.3f}{1:8.1%}  in all, {bound / total:.1%} of which bare products would take")


if __name__ == "__main__":
    main()
