"""Three ways to score a pack of pairs: yes against no, likelihood of the query, a classifier."""

import logging
from typing import Protocol, cast

import numpy as np
import torch
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from qbatch.errors import ConfigError
from qbatch.models.backbone import Backbone, load_weights
from qbatch.models.rerank_head import read_answer_row
from qbatch.models.rerank_loading import RerankerSpec
from qbatch.models.rerank_packing import PairPack

logger = logging.getLogger(__name__)

_LOGIT_ROWS = 128
"""Positions projected onto the vocabulary at once: 78 MB in float32 with 151,669 rows."""


class Scorer(Protocol):
    """Turns packs into one number per pair; higher is better."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""

    @property
    def is_packed(self) -> bool:
        """Whether pairs run without padding."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether packs may have segments that continue others."""

    def score(self, pack: PairPack) -> torch.Tensor:
        """Return float32 of shape (pairs,) on the device."""


class YesNoScorer:
    """Log-odds of the answer yes against no, read after the last token of a pair."""

    def __init__(self, backbone: Backbone, row: torch.Tensor) -> None:
        """Take over a causal model without head; ``row`` is float32 of shape (hidden_dim,)."""
        self._backbone = backbone
        self._row = row.to(backbone.device)
        self.device = backbone.device
        self.is_packed = backbone.is_packed
        self.shares_prefixes = backbone.shares_prefixes

    def score(self, pack: PairPack) -> torch.Tensor:
        """Return the log-odds of each pair, float32."""
        pooled = self._backbone.pool(
            *_upload(pack, self.device), pack.lengths, parents=pack.parents
        )
        return pooled[torch.from_numpy(pack.pairs).to(self.device)] @ self._row


class LikelihoodScorer:
    """Mean log-likelihood of a query's tokens after a passage, in nats; at most 0."""

    def __init__(self, backbone: Backbone, head: torch.Tensor) -> None:
        """Take over a causal model and its head of shape (vocab_rows, hidden_dim)."""
        self._backbone = backbone
        self._head = head
        self.device = backbone.device
        self.is_packed = backbone.is_packed
        self.shares_prefixes = backbone.shares_prefixes

    def score(self, pack: PairPack) -> torch.Tensor:
        """Return the mean log-likelihood of each pair's query, float32."""
        ids, positions = _upload(pack, self.device)
        hidden, _ = self._backbone.states(ids, positions, pack.lengths, parents=pack.parents)
        ends = np.cumsum(pack.lengths)[pack.pairs]
        rows = [np.arange(end - n, end) for end, n in zip(ends, pack.num_scored, strict=True)]
        targets = torch.from_numpy(np.concatenate(rows)).to(self.device)
        likelihoods = self._log_likelihoods(hidden[targets - 1], ids[targets])
        totals = torch.zeros(len(rows), device=self.device)
        owners = np.repeat(np.arange(len(rows)), pack.num_scored)
        totals.index_add_(0, torch.from_numpy(owners).to(self.device), likelihoods)
        return totals / torch.from_numpy(pack.num_scored).to(self.device)

    def _log_likelihoods(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return log p of each target given the state before it, both of shape (targets, ...)."""
        parts = []
        for states, ids in zip(
            torch.split(hidden, _LOGIT_ROWS), torch.split(targets, _LOGIT_ROWS), strict=True
        ):
            logits = (states @ self._head.T).float()
            parts.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(parts)


class CrossEncoderScorer:
    """The one logit of an encoder trained as a classifier of pairs.

    Packed where the model's head reads the first token only and ours agrees with the model's own
    padded computation, else padded.
    """

    shares_prefixes = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Take over a sequence-classification model; a few short pairs go through it."""
        self._model = model
        self._has_types = getattr(model.config, "type_vocab_size", 0) > 1
        self.device = model.device
        default = model.config._attn_implementation
        check = _check_pack(model.config.vocab_size)
        expected = self._padded_logits(check)
        self._backbone = Backbone(_base(model), "cls")
        self.is_packed = self._backbone.is_packed and self._agrees(check, expected)
        if not self.is_packed:
            model.set_attn_implementation(default)

    def score(self, pack: PairPack) -> torch.Tensor:
        """Return the logit of each pair, float32."""
        return self._packed_logits(pack) if self.is_packed else self._padded_logits(pack)

    def _packed_logits(self, pack: PairPack) -> torch.Tensor:
        pooled = self._backbone.pool(
            *_upload(pack, self.device), pack.lengths, type_ids=self._types(pack)
        )
        # Heads of transformers read the first token of (texts, tokens, hidden_dim).
        states = pooled.to(self._model.dtype)[:, None]
        pooler = getattr(_base(self._model), "pooler", None)
        states = states if pooler is None else pooler(states)
        classifier = cast("torch.nn.Module", self._model.classifier)
        return cast("torch.Tensor", classifier(states)[:, 0].float())

    def _padded_logits(self, pack: PairPack) -> torch.Tensor:
        sizes = pack.lengths.tolist()
        ids, _ = _upload(pack, self.device)
        mask = torch.from_numpy(np.arange(max(sizes)) < pack.lengths[:, None]).to(self.device)
        types = self._types(pack)
        extras = {} if types is None else {"token_type_ids": _pad(types, sizes, 0)}
        pad_id = self._model.config.pad_token_id or 0
        output = self._model(input_ids=_pad(ids, sizes, pad_id), attention_mask=mask, **extras)
        return cast("torch.Tensor", output.logits[:, 0].float())

    def _types(self, pack: PairPack) -> torch.Tensor | None:
        if pack.type_ids is None or not self._has_types:
            return None
        return torch.from_numpy(pack.type_ids).to(self.device)

    @torch.inference_mode()
    def _agrees(self, pack: PairPack, expected: torch.Tensor) -> bool:
        name = type(self._model).__name__
        try:
            logits = self._packed_logits(pack)
        except (AttributeError, TypeError, IndexError) as e:
            logger.warning("%s runs padded, its head is unknown: %s", name, e)
            return False
        tolerance = 1e-3 if self._model.dtype == torch.float32 else 0.1
        error = float((logits - expected).abs().max())
        if error > tolerance * max(1.0, float(expected.abs().max())):
            logger.warning("%s runs padded: packed, its logits differ by %.4f", name, error)
            return False
        return True


def load_scorer(spec: RerankerSpec, dtype: torch.dtype, device: torch.device) -> Scorer:
    """Load the weights of a reranker onto ``device``, with the part of the head that is needed.

    Raises:
        ConfigError: Weights are missing, or the model does more with its logits than we do.
    """
    if spec.scorer == "yes-no":
        model = load_weights(AutoModel, spec.path, dtype, device)
        return YesNoScorer(Backbone(model, "last"), read_answer_row(spec))
    if spec.scorer == "query-likelihood":
        model = load_weights(AutoModelForCausalLM, spec.path, dtype, device)
        return _likelihood_scorer(model, spec)
    return CrossEncoderScorer(
        load_weights(AutoModelForSequenceClassification, spec.path, dtype, device)
    )


@torch.inference_mode()
def _likelihood_scorer(model: PreTrainedModel, spec: RerankerSpec) -> LikelihoodScorer:
    """Return the scorer after a look whether the head alone gives the model's own logits."""
    ids = torch.from_numpy(_check_pack(spec.vocab_rows).ids).to(model.device)
    logits = model(input_ids=ids[None]).logits[0].float()
    head: torch.Tensor = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]  # transformers'
    backbone = Backbone(_base(model), "last")
    hidden, _ = backbone.states(
        ids, torch.arange(len(ids), device=model.device), np.array([len(ids)])
    )
    own = (hidden @ head.T).float()
    if float(cosine_similarity(own, logits).min()) < 0.98 or own.std() > 2 * logits.std():
        raise ConfigError(
            f"Unsupported head in {spec.path}: {spec.architecture!r} changes its logits after the "
            "last matrix. Choose another language model."
        )
    return LikelihoodScorer(backbone, head)


def _base(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its head."""
    return cast("PreTrainedModel", model.base_model)


def _check_pack(vocab_rows: int) -> PairPack:
    """Return three short texts of ordinary tokens, from the middle of the vocabulary."""
    lengths = np.array([7, 4, 2])
    half = vocab_rows // 2
    return PairPack(
        ids=half + np.arange(lengths.sum()) % half,
        positions=np.concatenate([np.arange(n) for n in lengths]),
        type_ids=None,
        lengths=lengths,
        parents=None,
        pairs=np.arange(len(lengths)),
        num_scored=np.zeros(len(lengths), np.int64),
    )


def _upload(pack: PairPack, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(pack.ids).to(device), torch.from_numpy(pack.positions).to(device)


def _pad(ids: torch.Tensor, sizes: list[int], value: int) -> torch.Tensor:
    return pad_sequence(list(torch.split(ids, sizes)), batch_first=True, padding_value=value)
