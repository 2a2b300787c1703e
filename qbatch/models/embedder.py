"""Token ids to vectors: only real tokens are computed, and each distinct text once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from qbatch.errors import ConfigError
from qbatch.models.backbone import Backbone, load_backbone
from qbatch.models.devices import check_quantizable, resolve_device, resolve_dtype
from qbatch.models.embed_stats import EmbedStats
from qbatch.models.halving import in_halves, shrunk_budget
from qbatch.models.loading import ModelSpec, load_spec
from qbatch.models.packing import common_prefix, distinct_texts, gather_tokens, plan_packs
from qbatch.schema import ComputeDtype, Weights

_GPU_TOKEN_BUDGET = 32_768
_CPU_TOKEN_BUDGET = 4_096
"""Products of fewer rows are slower: of 1,024 by 4 % in the 0.6B shape (a Xeon with AVX-512)."""

_MIN_SHARED_TOKENS = 8
"""A shorter beginning saves less than the attention across segments costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedderConfig:
    """What an embedding process needs to build its model; it travels, the model does not."""

    model_path: Path
    """What ``resolve_model`` returned."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Of weights and activations; ``auto`` is bfloat16 where the processor computes in it."""
    weights: Weights = "float"
    """int8 rounds those of linear layers and computes on the CPU in float32, named or not."""
    dim: int | None = None
    """Leading components kept (Matryoshka) before normalising; None means all."""
    token_budget: int | None = None
    """Tokens in one forward pass; None means 32,768 on a GPU and 4,096 on a CPU."""
    device: str | None = None
    """A torch device; None means the GPU if there is one."""
    num_threads: int | None = None
    """CPU threads of torch in this process; None leaves torch's setting."""

    def __post_init__(self) -> None:
        for name in ("dim", "token_budget", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} is out of range: {value}; allowed is 1 or more. Raise it, or leave it "
                    "out for the default."
                )
        if self.weights == "int8":
            check_quantizable(self.dtype, self.device)

    def build(self) -> "Embedder":
        """Load the model onto its device and check packed against padded computation.

        Raises:
            ConfigError: The directory is unusable, or ``dim`` exceeds the model's.
        """
        spec = load_spec(self.model_path)
        dim = self.dim or spec.hidden_dim
        if dim > spec.hidden_dim:
            raise ConfigError(
                f"dim is out of range: {dim}; the model in {spec.path} gives 1 to "
                f"{spec.hidden_dim}. Lower dim."
            )
        is_int8 = self.weights == "int8"
        device = resolve_device("cpu" if is_int8 else self.device)
        dtype = getattr(torch, resolve_dtype("float32" if is_int8 else self.dtype, device))
        backbone = load_backbone(spec, dtype, device)
        if is_int8:
            backbone.quantize()
        return Embedder(
            backbone,
            spec,
            dim=dim,
            token_budget=self.token_budget or default_token_budget(device),
            num_threads=self.num_threads,
        )


class Embedder:
    """Embeds texts given as token ids, in any order and number."""

    def __init__(
        self,
        backbone: Backbone,
        spec: ModelSpec,
        *,
        dim: int,
        token_budget: int,
        num_threads: int | None = None,
    ) -> None:
        """Wire up the parts; ``EmbedderConfig.build`` is the way to get one."""
        self._num_threads = num_threads
        self.spec = spec
        self.dim = dim
        self.stats = EmbedStats()
        self._backbone = backbone
        self._token_budget = token_budget

    @property
    def token_budget(self) -> int:
        """Tokens in one forward pass, at most; it falls when memory runs out."""
        return self._token_budget

    @property
    def is_packed(self) -> bool:
        """Whether texts run without padding."""
        return self._backbone.is_packed

    @torch.inference_mode()
    def embed(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        on_pack: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Return one vector per text, in the order given: float32, shape (texts, dim).

        Rows have unit length if ``spec.normalize``. A row is non-finite where the model overflows;
        to reject it is left to the caller.

        Args:
            ids: int32, the texts one after the other, as ``TextTokenizer.encode`` gives them.
            lengths: int32, tokens of each text, 1 to ``spec.max_tokens``.
            on_pack: Called before each forward pass.

        Raises:
            ValueError: ``ids`` and ``lengths`` do not fit each other or the model.
            torch.OutOfMemoryError: Not even a single text fits.
        """
        _check_tokens(ids, lengths, self.spec)
        if len(lengths) == 0:
            return np.empty((0, self.dim), np.float32)
        started = time.perf_counter()
        if self._num_threads is not None:
            # OpenMP keeps the number per calling thread, and actors call from other threads.
            torch.set_num_threads(self._num_threads)
        first, inverse = distinct_texts(ids, lengths)
        num_shared = self._num_shared(ids, lengths) if len(first) > 1 else 0
        # A long beginning must not fill the packs, or it is computed for every few texts again.
        room = max(self._token_budget - num_shared, 3 * num_shared)
        packs = plan_packs(lengths[first] - num_shared, room)
        order = np.concatenate(packs)
        device = self._backbone.device
        texts = _SortedTexts.gather(ids, lengths, first[order], num_shared, device)
        bounds = np.cumsum([0, *map(len, packs)]).tolist()
        embed = partial(self._embed_pack, texts, on_pack)
        shrink = partial(self._shrink, texts)
        vectors = torch.cat([in_halves(embed, *pair, shrink) for pair in pairwise(bounds)])
        matrix: np.ndarray = vectors.cpu().numpy()[np.argsort(order)[inverse]]
        self.stats.num_texts += len(lengths)
        self.stats.num_distinct += len(first)
        self.stats.embed_s += time.perf_counter() - started
        return matrix

    def _num_shared(self, ids: np.ndarray, lengths: np.ndarray) -> int:
        """Return how many tokens, such as those of an instruction, are computed once a pack."""
        if not self._backbone.shares_prefixes:
            return 0
        shared = common_prefix(ids, lengths)
        return shared if shared >= _MIN_SHARED_TOKENS else 0

    def _shrink(self, texts: "_SortedTexts", first: int, stop: int) -> None:
        num_tokens = int(texts.lengths[first:stop].sum())
        self._token_budget = shrunk_budget(self._token_budget, num_tokens)

    def _embed_pack(
        self, texts: "_SortedTexts", on_pack: Callable[[], None], first: int, stop: int
    ) -> torch.Tensor:
        on_pack()
        lengths = texts.lengths[first:stop]
        num_shared = len(texts.shared)
        tokens = slice(texts.starts[first], texts.starts[first] + lengths.sum())
        ids, positions = texts.ids[tokens], texts.positions[tokens]
        self.stats.num_packs += 1
        self.stats.num_tokens += int(lengths.sum()) + num_shared * len(lengths)
        if num_shared:
            positions = torch.cat([torch.arange(num_shared, device=ids.device), positions])
            ids, lengths = torch.cat([texts.shared, ids]), np.append(num_shared, lengths)
            parents = np.append(-1, np.zeros(len(lengths) - 1, np.int64))
            pooled = self._backbone.pool(ids, positions, lengths, parents=parents)[1:]
        else:
            pooled = self._backbone.pool(ids, positions, lengths)
        self.stats.num_computed += self._backbone.num_computed(lengths)
        pooled = pooled[:, : self.dim]
        return normalize(pooled, dim=-1) if self.spec.normalize else pooled


@dataclass(frozen=True, kw_only=True, slots=True)
class _SortedTexts:
    """The distinct texts of one call, in pack order, on the device."""

    shared: torch.Tensor
    """What all of them begin with; the rest is without it."""
    ids: torch.Tensor
    positions: torch.Tensor
    lengths: np.ndarray
    starts: np.ndarray

    @classmethod
    def gather(
        cls,
        ids: np.ndarray,
        lengths: np.ndarray,
        order: np.ndarray,
        num_shared: int,
        device: torch.device,
    ) -> "_SortedTexts":
        """Upload once; packs are then views, and no pack waits for the one before it."""
        tokens, positions = gather_tokens(ids, lengths, order, skip=num_shared)
        lengths = lengths[order].astype(np.int64) - num_shared
        return cls(
            shared=torch.from_numpy(ids[:num_shared].astype(np.int64)).to(device),
            ids=torch.from_numpy(tokens.astype(np.int64)).to(device),
            positions=torch.from_numpy(positions).to(device),
            lengths=lengths,
            starts=np.cumsum(lengths) - lengths,
        )


def default_token_budget(device: torch.device) -> int:
    """Return the tokens of one forward pass where nothing else is asked for."""
    return _GPU_TOKEN_BUDGET if device.type == "cuda" else _CPU_TOKEN_BUDGET


def _check_tokens(ids: np.ndarray, lengths: np.ndarray, spec: ModelSpec) -> None:
    if lengths.sum() != len(ids):
        raise ValueError(f"{len(ids)} ids were given for lengths that add up to {lengths.sum()}")
    if len(lengths) == 0:
        return
    if not 1 <= lengths.min() <= lengths.max() <= spec.max_tokens:
        raise ValueError(
            f"texts have {lengths.min()} to {lengths.max()} tokens; the model takes 1 to "
            f"{spec.max_tokens}; set max_tokens of the tokenizer"
        )
    if not 0 <= ids.min() <= ids.max() < spec.vocab_rows:
        raise ValueError(
            f"token ids go from {ids.min()} to {ids.max()}; the model has {spec.vocab_rows} rows; "
            "use the tokenizer that came with it"
        )
