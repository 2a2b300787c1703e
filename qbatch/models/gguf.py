"""Once, from a GGUF file to a model directory of safetensors that every job can load."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from qbatch.schema import ComputeDtype


def convert_gguf(file: Path, folder: Path, dtype: ComputeDtype = "float32") -> None:
    """Write weights, configuration and tokenizer of a causal language model.

    transformers restores the quantised weights and refuses to save a model it has restored, so a
    new one of the same configuration takes them over. Needs the packages ``gguf`` and
    ``accelerate``, which the dev extra brings.

    Args:
        file: A GGUF file of an architecture that transformers knows.
        folder: Where the model directory is written.
        dtype: Of the weights written; bfloat16 halves them and is finer than what they came from.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    folder_of, name = str(file.parent), file.name
    restored = AutoModelForCausalLM.from_pretrained(folder_of, gguf_file=name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder_of, gguf_file=name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]  # transformers'
    model.load_state_dict(restored.state_dict())
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder_of, gguf_file=name).save_pretrained(folder)
