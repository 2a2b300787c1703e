"""A loaded model and the fastest way through it that keeps the model's own numbers."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack, cast

import numpy as np
import torch
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from qbatch.errors import ConfigError
from qbatch.models.attention import (
    PACKED_ATTENTION,
    PackLayout,
    UnsupportedAttentionError,
    register_packed_attention,
)
from qbatch.models.decoder_layer import streamline
from qbatch.models.loading import ModelSpec, Pooling, position_offset, read_config
from qbatch.models.quantization import quantize_linears

logger = logging.getLogger(__name__)

_CHECK_LENGTHS = np.array([9, 5, 5, 2, 1])
_MIN_COSINE: dict[torch.dtype, float] = {
    torch.float32: 0.9999,
    torch.bfloat16: 0.98,
    torch.float16: 0.99,
}
"""Packed against padded at start-up; a text that sees its neighbour falls far below."""


_MAX_ERROR: dict[torch.dtype, float] = {
    torch.float32: 1e-4,
    torch.bfloat16: 6e-2,
    torch.float16: 1e-2,
}
"""Of states relative to their length, where the same sums are only grouped otherwise."""


class StateOptions(TypedDict, total=False):
    """What some models and packs need besides tokens."""

    parents: np.ndarray | None
    """For each segment the earlier one it continues, or -1; None means that each is a whole text.
    Needs ``Backbone.shares_prefixes``."""
    type_ids: torch.Tensor | None
    """Token types, shape (tokens,); None means the model's default."""


class Backbone:
    """Turns packs of token ids into pooled hidden states.

    Runs packed if the model's attention allows it and its own padded computation agrees, else
    padded, with one warning.
    """

    def __init__(self, model: PreTrainedModel, pooling: Pooling) -> None:
        """Take over a loaded model; a few short texts go through it."""
        self._model = model
        self._pooling = pooling
        self._position_offset = position_offset(model.config)
        self.is_packed = self._switch_to_packed()
        self._ends_early = self.is_packed and pooling == "last" and self._streamline_layers()
        self.shares_prefixes = self.is_packed and pooling == "last" and self._agrees_on_prefixes()
        """Whether ``parents`` may be given: in causal models, where packs run without padding."""

    def quantize(self) -> None:
        """Round the weights of linear layers to int8; what the checks found in float32 stays."""
        quantize_linears(self._model)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._model.device

    def pool(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        lengths: np.ndarray,
        **options: Unpack[StateOptions],
    ) -> torch.Tensor:
        """Return one hidden state per segment: float32, (segments, hidden_dim), not normalised.

        The arguments are those of ``states``.
        """
        if not self._ends_early:
            return _POOL[self._pooling](*self.states(ids, positions, lengths, **options))
        layout = PackLayout.from_lengths(lengths, self.device, options.get("parents"))
        layout = replace(layout, ends_early=True)
        return self._packed_states(ids, positions, layout, options.get("type_ids")).float()

    def states(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        lengths: np.ndarray,
        **options: Unpack[StateOptions],
    ) -> tuple[torch.Tensor, PackLayout]:
        """Return the last hidden states, shape (tokens, hidden_dim), and where segments lie.

        Args:
            ids: Integers, the segments one after the other, shape (sum of ``lengths``,).
            positions: Of each token in its text, from 0, same shape.
            lengths: Tokens of each segment; equal neighbours are computed together.
            options: See ``StateOptions``.
        """
        parents, type_ids = options.get("parents"), options.get("type_ids")
        layout = PackLayout.from_lengths(lengths, self.device, parents)
        if self.is_packed:
            return self._packed_states(ids, positions, layout, type_ids), layout
        return self._padded_states(ids, lengths, type_ids), layout

    def num_computed(self, lengths: np.ndarray) -> int:
        """Return how many tokens ``pool`` computes for these lengths, padding included."""
        return int(lengths.sum() if self.is_packed else lengths.max() * len(lengths))

    def _packed_states(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        layout: PackLayout,
        type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        position_ids = positions[None] + self._position_offset
        types = {} if type_ids is None else {"token_type_ids": type_ids[None]}
        output = self._model(input_ids=ids[None], position_ids=position_ids, pack=layout, **types)
        return cast("torch.Tensor", output.last_hidden_state[0])

    def _padded_states(
        self, ids: torch.Tensor, lengths: np.ndarray, type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the states of the real tokens, as the packed way would."""
        sizes = lengths.tolist()
        pad_id = self._model.config.pad_token_id or 0
        input_ids = _pad(ids, sizes, pad_id)
        types = {} if type_ids is None else {"token_type_ids": _pad(type_ids, sizes, 0)}
        mask = np.arange(lengths.max()) < lengths[:, None]
        attention_mask = torch.from_numpy(mask).to(self.device)
        output = self._model(input_ids=input_ids, attention_mask=attention_mask, **types)
        return cast("torch.Tensor", output.last_hidden_state[attention_mask])

    def _switch_to_packed(self) -> bool:
        model = self._model
        if not model._supports_attention_backend:
            return False
        default = model.config._attn_implementation
        register_packed_attention()
        try:
            cosine = self._cosine_to_packed()
            if cosine >= _MIN_COSINE[model.dtype]:
                return True
            reason = f"its hidden states differ, cosine {cosine:.5f}"
        except (UnsupportedAttentionError, TypeError) as e:  # TypeError: the layout is not let in
            reason = str(e)
        model.set_attn_implementation(default)
        name = type(model).__name__
        logger.warning("%s runs padded, which is slower than packed: %s", name, reason)
        return False

    @torch.inference_mode()
    def _cosine_to_packed(self) -> float:
        """Return the worst agreement of a few texts; the model is left in packed attention."""
        ids, positions, layout = self._check_pack()
        padded = self._padded_states(ids, _CHECK_LENGTHS)
        self._model.set_attn_implementation(PACKED_ATTENTION)
        packed = self._packed_states(ids, positions, layout)
        return float(cosine_similarity(packed.float(), padded.float()).min())

    @torch.inference_mode()
    def _streamline_layers(self) -> bool:
        """Let packs run through the layers in fewer passes; return whether that is the same.

        What is pooled needs one state a text, and of others only keys and values: the rest of the
        last layer, nine tenths of its work in Qwen3, is then computed for those tokens alone.
        """
        layers = getattr(self._model, "layers", None)
        if not layers:
            return False
        ids, positions, layout = self._check_pack()
        expected = self._packed_states(ids, positions, layout)
        restore = streamline(layers)
        try:
            found = self._packed_states(ids, positions, layout)
            last = self._packed_states(ids, positions, replace(layout, ends_early=True))
            same = _agree(found, expected) and _agree(last, expected[layout.last_tokens])
        except (AttributeError, TypeError, RuntimeError) as error:
            logger.info("%s runs as it is: %s", type(layers[-1]).__name__, error)
            same = False
        if not same:
            restore()
        return same

    @torch.inference_mode()
    def _agrees_on_prefixes(self) -> bool:
        """Return whether a text cut into a prefix and equal tails keeps its states."""
        whole, lengths = np.array([9]), np.array([2, 2, 5, 5])
        parents = np.array([-1, 0, 1, 1])
        ids, positions = self._ordinary_tokens(9), torch.arange(9, device=self.device)
        twice = torch.cat([torch.arange(9), torch.arange(4, 9)]).to(self.device)
        expected = self._packed_states(ids, positions, PackLayout.from_lengths(whole, self.device))
        layout = PackLayout.from_lengths(lengths, self.device, parents)
        try:
            states = self._packed_states(ids[twice], positions[twice], layout)
        except UnsupportedAttentionError:
            return False
        cosine = float(cosine_similarity(states.float(), expected[twice].float()).min())
        return bool(cosine >= _MIN_COSINE[self._model.dtype])

    def _check_pack(self) -> tuple[torch.Tensor, torch.Tensor, PackLayout]:
        """Return ids, positions and layout of a few whole texts."""
        layout = PackLayout.from_lengths(_CHECK_LENGTHS, self.device)
        positions = torch.cat([torch.arange(n) for n in _CHECK_LENGTHS]).to(self.device)
        return self._ordinary_tokens(len(positions)), positions, layout

    def _ordinary_tokens(self, count: int) -> torch.Tensor:
        """Return ids from the middle of the vocabulary; padding and its like lie at the ends."""
        half = int(self._model.config.vocab_size) // 2
        return (half + torch.arange(count) % half).to(self.device)


def load_backbone(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Backbone:
    """Load weights in ``dtype`` onto ``device``; a language-model head is left out.

    Raises:
        ConfigError: The weights are incomplete.
    """
    model = load_weights(AutoModel, spec.path, dtype, device, may_miss="pooler.")
    return Backbone(model, spec.pooling)


def load_weights(
    auto_class: type,
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    may_miss: str | None = None,
) -> PreTrainedModel:
    """Load a model in ``dtype`` onto ``device``, ready for inference, without code of its own.

    Args:
        auto_class: transformers' AutoModel or one of its kin with a head.
        path: Directory of config.json and safetensors files.
        dtype: Of weights and activations.
        device: Where it computes.
        may_miss: Weights whose names begin so may be absent; they are random then.

    Raises:
        ConfigError: The weights are incomplete.
    """
    config = read_config(path)
    config.use_cache = False
    # A bar for every actor would drown a job's log.
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    model, info = auto_class.from_pretrained(  # type: ignore[attr-defined]  # any Auto class
        path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    missing = sorted(
        key for key in info["missing_keys"] if not (may_miss and key.startswith(may_miss))
    )
    if missing:
        raise ConfigError(
            f"Weights are missing in {path}: {missing[:5]} and so on, {len(missing)} in all; "
            f"{config.model_type!r} needs them. Copy the model again."
        )
    return cast("PreTrainedModel", model.eval().to(device))


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether states are the same but for the order in which sums were taken."""
    if found.shape != expected.shape:
        return False
    distance = torch.linalg.vector_norm(found.float() - expected.float(), dim=-1)
    length = torch.linalg.vector_norm(expected.float(), dim=-1)
    return bool((distance / length).max() < _MAX_ERROR[found.dtype])


def _pad(ids: torch.Tensor, sizes: list[int], value: int) -> torch.Tensor:
    return pad_sequence(list(torch.split(ids, sizes)), batch_first=True, padding_value=value)


def _pool_last(hidden: torch.Tensor, layout: PackLayout) -> torch.Tensor:
    return hidden[layout.cu_lengths[1:] - 1].float()


def _pool_cls(hidden: torch.Tensor, layout: PackLayout) -> torch.Tensor:
    return hidden[layout.cu_lengths[:-1]].float()


def _pool_mean(hidden: torch.Tensor, layout: PackLayout) -> torch.Tensor:
    runs = torch.split(hidden, [length * count for length, count in layout.runs])
    means = [
        run.view(count, length, -1).mean(1, dtype=torch.float32)
        for run, (length, count) in zip(runs, layout.runs, strict=True)
    ]
    return torch.cat(means)


_POOL = {"last": _pool_last, "cls": _pool_cls, "mean": _pool_mean}
