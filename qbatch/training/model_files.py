"""Model directories written so that our jobs and sentence-transformers read the same model."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from qbatch.models.backbone import load_weights
from qbatch.models.hub import resolve_model
from qbatch.models.loading import ModelSpec, Pooling, read_config, read_json
from qbatch.models.prompts import document_prompt, query_prompt
from qbatch.models.tokenization import read_tokenizer
from qbatch.schema import ComputeDtype
from qbatch.training.task import Lora, ModelKind, Start

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

_POOLING_MODES: dict[Pooling, str] = {
    "last": "pooling_mode_lasttoken",
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
}

_TYPES = ("Transformer", "Pooling", "Normalize")


def starting_model(start: Start, kind: ModelKind, scratch: Path) -> Path:
    """Return the directory of the model that training starts from.

    Random weights are written into ``scratch``; they follow from the seed, so every process draws
    the same. A reranker may start from an embedder: the embedding table becomes its head.

    Raises:
        ConfigError: There is no such model, or the config is unusable.
    """
    if start.model is not None:
        path = resolve_model(start.model, start.revision)
        if kind == "reranker" and _lacks_head(path):
            model = load_weights(AutoModelForCausalLM, path, torch.float32, torch.device("cpu"))
            return _write_start(model, path, scratch)
        return path
    source = Path(start.init_config or "")
    config = read_config(source)
    torch.manual_seed(start.seed)
    auto_class = AutoModel if kind == "embedder" else AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]  # transformers'
    return _write_start(model, source, scratch)


def _lacks_head(path: Path) -> bool:
    config = read_config(path)
    return (config.architectures or [""])[0].endswith("Model") and config.tie_word_embeddings


def _write_start(model: PreTrainedModel, source: Path, folder: Path) -> Path:
    """Write a float32 model, with the config and tokenizer of ``source``, and return its folder."""
    is_tied = model.config.tie_word_embeddings
    write_weights(folder, model.state_dict(), torch.float32, is_tied=is_tied)
    write_config(source, folder, torch.float32, {"architectures": [type(model).__name__]})
    copy_tokenizer(source, folder)
    return folder


def count_parameters(start: Start, kind: ModelKind, lora: Lora | None) -> tuple[int, int]:
    """Return how many weights the model has and how many are trained, without loading it."""
    path = Path(start.init_config or "")
    if start.model is not None:
        path = resolve_model(start.model, start.revision)
    auto_class = AutoModel if kind == "embedder" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(read_config(path))  # type: ignore[no-untyped-call]  # transformers'
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if lora is None:
        return num_parameters, num_parameters
    linear = (
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    )
    num_trained = sum(lora.rank * sum(module.weight.shape) for module in linear)
    return num_parameters + num_trained, num_trained


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer and what else belongs to the texts of a model."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_weights(
    folder: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype, *, is_tied: bool
) -> None:
    """Write safetensors files of at most 5 GB, floating-point tensors in ``dtype``.

    A head that is tied to the embedding table is left out.
    """
    converted = {
        name: x.to(dtype) if x.is_floating_point() else x
        for name, x in sorted(state.items())
        if not (is_tied and name == "lm_head.weight")
    }
    save_torch_state_dict(converted, folder)


def stored_dtype(name: Literal["auto"] | ComputeDtype, path: Path) -> torch.dtype:
    """Return the dtype in which weights are written: as asked for, or that of the start."""
    if name == "auto":
        found = read_config(path).dtype
        return found if isinstance(found, torch.dtype) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def write_config(
    source: Path, folder: Path, dtype: torch.dtype, changes: Mapping[str, Any]
) -> None:
    """Write the config.json of ``source`` with the dtype of the weights and some changes."""
    config = {k: v for k, v in read_json(source / "config.json").items() if k != "torch_dtype"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write(folder / "config.json", {**config, **changes})


def write_embedder(
    folder: Path,
    spec: ModelSpec,
    state: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    class_name: str,
    instruction: str | None,
    dims: Sequence[int],
) -> None:
    """Write a sentence-transformers directory.

    Args:
        folder: Empty.
        spec: Of the model that training started from.
        state: Weights under the names of that model without head.
        dtype: Of the written weights.
        class_name: transformers' class of the model.
        instruction: Task sentence that the model's own query prompt gets; None keeps its own.
        dims: Matryoshka widths it was trained for, none if empty.
    """
    write_weights(folder, state, dtype, is_tied=False)
    copy_tokenizer(spec.path, folder)
    if spec.tokenizer.appends_end:  # sentence-transformers appends nothing by itself
        read_tokenizer(spec.path, spec.tokenizer).save(str(folder / "tokenizer.json"))
    changes: dict[str, Any] = {"architectures": [class_name]}
    if dims:
        changes["matryoshka_dimensions"] = sorted(dims)  # the name by which vLLM looks
    write_config(spec.path, folder, dtype, changes)
    names = _TYPES if spec.normalize else _TYPES[:2]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names[1:], 1))]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    _write(folder / "modules.json", modules)
    for path in paths[1:]:
        (folder / path).mkdir()
    _write(folder / "1_Pooling" / "config.json", _pooling_config(spec))
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": spec.max_tokens, "do_lower_case": False},
    )
    query = query_prompt(spec.prompts, architecture=spec.architecture, instruction=instruction)
    prompts = {**spec.prompts, "query": query, "document": document_prompt(spec.prompts)}
    _write(
        folder / "config_sentence_transformers.json",
        {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if spec.normalize else "dot",
        },
    )


def _pooling_config(spec: ModelSpec) -> dict[str, Any]:
    flags = {name: pooling == spec.pooling for pooling, name in _POOLING_MODES.items()}
    return {"word_embedding_dimension": spec.hidden_dim, **flags, "include_prompt": True}


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
