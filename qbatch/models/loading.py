"""What a model directory says: pure reading, no weights, no code from the model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from qbatch.errors import ConfigError
from qbatch.models.tokenization import TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Pooling = Literal["last", "mean", "cls"]

_POOLINGS: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What a model directory says about turning texts into vectors."""

    path: Path
    """Directory of config.json, weights and tokenizer."""
    subfolder: str
    """Where ``path`` lies inside the model directory; "" is the directory itself."""
    architecture: str
    """``model_type`` of config.json, such as ``qwen3`` or ``bert``."""
    hidden_dim: int
    """Length of a full vector."""
    max_tokens: int
    """Longest text the model takes, special tokens included."""
    vocab_rows: int
    """Rows of the embedding table; no token id may reach it."""
    pooling: Pooling
    normalize: bool
    """Vectors are made unit length; False only for models meant for the raw inner product."""
    prompts: Mapping[str, str]
    """Prompt strings by name, as stored beside the model."""
    tokenizer_sha256: str

    @property
    def tokenizer(self) -> TokenizerSpec:
        """What processes that only tokenize need to know."""
        return TokenizerSpec(
            subfolder=self.subfolder,
            vocab_rows=self.vocab_rows,
            max_tokens=self.max_tokens,
            appends_end=self.architecture == "qwen3" and self.pooling == "last",
        )


def load_spec(path: Path) -> ModelSpec:
    """Read a sentence-transformers style directory, or a bare Qwen3-Embedding checkpoint.

    Raises:
        ConfigError: A needed file is missing, the model wants its own code or has only pickled
            weights, or it asks for a step we do not have.
    """
    modules = _modules(path)
    root = path / modules["Transformer"] if modules else path
    tokenizer_config = read_json(root / "tokenizer_config.json", default={})
    refuse_remote_code(root, tokenizer_config)
    config = read_config(root)
    weight_files(root)
    sentence = read_json(path / "config_sentence_transformers.json", default={})
    return ModelSpec(
        path=root,
        subfolder=modules["Transformer"] if modules else "",
        architecture=config.model_type,
        hidden_dim=config.hidden_size,
        max_tokens=read_max_tokens(root, config, tokenizer_config),
        vocab_rows=config.vocab_size,
        pooling=_pooling(path, modules, config.model_type),
        normalize=_is_normalized(modules, sentence),
        prompts=_prompts(sentence),
        tokenizer_sha256=hash_tokenizer(root),
    )


def read_config(root: Path) -> "PreTrainedConfig":
    """Return config.json as transformers reads it: renamed and missing settings filled in.

    Raises:
        ConfigError: transformers has no such architecture, or the model wants its own code or has
            an encoder and a decoder.
    """
    # It loads torch: two seconds, which drivers spend while Ray starts.
    import transformers  # noqa: PLC0415

    raw = read_json(root / "config.json")
    refuse_remote_code(root, raw)
    if raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"Unknown architecture in {root / 'config.json'}: {raw.get('model_type')!r}. Allowed "
            f"are those built into transformers {transformers.__version__}; choose such a model, "
            "or a newer transformers."
        )
    config = transformers.AutoConfig.from_pretrained(
        root, local_files_only=True, trust_remote_code=False
    )
    if config.is_encoder_decoder:
        raise ConfigError(
            f"Unsupported architecture in {root}: {config.model_type!r} has an encoder and a "
            "decoder; allowed is either of them alone. Choose such a model."
        )
    return cast("PreTrainedConfig", config)


def weights_sha256(path: Path) -> str:
    """Return one hash over the names and bytes of all safetensors files in ``ModelSpec.path``."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            digest.update(f"{file.name}:".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def weight_files(root: Path) -> list[Path]:
    """Return the safetensors files of a model, or raise ConfigError if it has none."""
    files = sorted(root.glob("*.safetensors"))
    if not files:
        others = sorted(f.name for f in root.glob("*.bin"))
        raise ConfigError(
            f"No safetensors weights in {root}; it holds {others or 'no weights at all'}. Only "
            "safetensors is allowed, because pickled weights can run code. Convert them once with "
            "save_pretrained in a sandbox you trust."
        )
    return files


def read_json(file: Path, default: object = None) -> Any:  # noqa: ANN401 - any JSON value
    """Return what a model file says; ``default`` replaces a missing file, else ConfigError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise ConfigError(
            f"A model file is missing: {file}. A model directory needs it; copy the whole model, "
            "or check the path."
        ) from None
    except json.JSONDecodeError as e:
        raise ConfigError(f"A model file is not JSON: {file} ({e}). Copy the model again.") from e


def refuse_remote_code(root: Path, config: dict[str, Any]) -> None:
    """Raise ConfigError if a config names code of the model's own."""
    if "auto_map" in config:
        raise ConfigError(
            f"The model at {root} wants to run its own code: auto_map {config['auto_map']}. Only "
            "architectures built into transformers are allowed; choose such a model."
        )


def _modules(path: Path) -> dict[str, str]:
    """Return the folder of each sentence-transformers module by class name; {} without the file."""
    entries = read_json(path / "modules.json", default=[])
    names = [entry["type"].rpartition(".")[2] for entry in entries]
    ours = all(entry["type"].startswith("sentence_transformers.") for entry in entries)
    allowed = ["Transformer", "Pooling", "Normalize"]
    if not ours or (names and names not in (allowed[:2], allowed)):
        raise ConfigError(
            f"Unsupported modules in {path / 'modules.json'}: {[e['type'] for e in entries]}. "
            "Allowed: sentence_transformers' Transformer, Pooling and optionally Normalize, in "
            "this order. Choose a model without further modules."
        )
    return {name: entry["path"] for name, entry in zip(names, entries, strict=True)}


def _pooling(path: Path, modules: Mapping[str, str], architecture: str) -> Pooling:
    if not modules:
        if architecture == "qwen3":
            return "last"
        raise ConfigError(
            f"No modules.json in {path}, so the pooling of this {architecture!r} model is unknown; "
            "only a qwen3 model may lack it. Use a sentence-transformers directory."
        )
    file = path / modules["Pooling"] / "config.json"
    pooling = read_json(file)
    modes = _pooling_modes(pooling)
    if len(modes) != 1 or modes[0] not in _POOLINGS or not pooling.get("include_prompt", True):
        raise ConfigError(
            f"Unsupported pooling in {file}: {pooling}. Allowed: exactly one of "
            f"{sorted(_POOLINGS)}, over the prompt too. Choose a model with such a pooling."
        )
    return _POOLINGS[modes[0]]


def _pooling_modes(pooling: dict[str, Any]) -> Sequence[str]:
    mode = pooling.get("pooling_mode")
    if mode is None:
        return [name for key, name in _LEGACY_POOLINGS.items() if pooling.get(key)] or ["mean"]
    return [mode] if isinstance(mode, str) else cast("list[str]", mode)


def _is_normalized(modules: Mapping[str, str], sentence: dict[str, Any]) -> bool:
    similarity = sentence.get("similarity_fn_name") or "cosine"
    if similarity not in {"cosine", "dot"}:
        raise ConfigError(
            f"Unsupported similarity: {similarity!r}; allowed are cosine and dot, because search "
            "ranks by inner product. Choose a model made for one of them."
        )
    return similarity == "cosine" or "Normalize" in modules


def _prompts(sentence: dict[str, Any]) -> dict[str, str]:
    """Return the stored prompts; a default prompt is what documents get."""
    prompts = dict(sentence.get("prompts") or {})
    default = sentence.get("default_prompt_name")
    if default is not None:
        prompts.setdefault("document", prompts[default])
    return prompts


def read_max_tokens(
    root: Path, config: "PreTrainedConfig", tokenizer_config: dict[str, Any]
) -> int:
    """Return the smallest length limit that a model directory states, special tokens included."""
    file = next(root.glob("sentence_*_config.json"), None)  # sentence_bert_, sentence_roberta_ ...
    sentence = read_json(file) if file else {}
    if sentence.get("do_lower_case"):
        raise ConfigError(
            f"Unsupported do_lower_case in {file}: true; allowed is false. Let the tokenizer's own "
            "normalizer lower the case."
        )
    limits = [
        sentence.get("max_seq_length"),
        tokenizer_config.get("model_max_length"),
        config.max_position_embeddings - position_offset(config),
    ]
    return int(min(limit for limit in limits if limit is not None))


def position_offset(config: "PreTrainedConfig") -> int:
    """Return the position of a text's first token: RoBERTa's kin count from the pad id plus one."""
    counts_from_pad = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"}
    return int(config.pad_token_id) + 1 if config.model_type in counts_from_pad else 0


def hash_tokenizer(root: Path) -> str:
    """Return the sha256 of tokenizer.json, or raise ConfigError if there is none."""
    file = root / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"A model file is missing: {file}. Only fast tokenizers are allowed; write the file "
            "once with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return hashlib.sha256(file.read_bytes()).hexdigest()
