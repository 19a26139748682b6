# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Makes a copy of a checkpoint that MLX runs, on a Mac or, with `mlx[cpu]`, on Linux.

    python examples/convert_to_mlx.py --model_name_or_path examples/checkpoints/peer-nano --output_dir runs/nano-mlx
    python -m mlx_lm generate --model runs/nano-mlx --trust-remote-code --ignore-chat-template --prompt "def main("

Weights are copied unchanged. For tables in 8 bits, quantize the checkpoint first with examples/quantize.py.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig

import modeling_peer
from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from common.model_arguments import check_output_dir, loads_checkpoint


MODEL_FILE = Path(modeling_peer.__file__).parent / "serving" / "mlx_peer.py"
# Activations in that file. They are listed here because it cannot be imported without MLX.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "linear", None)
# Weights, and files of tokenizers and generation; the code for torch is not copied.
COPIED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*")


@dataclass
class ConversionArguments:
    """Which checkpoint is copied where."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder, or the id of a model of the Hub."})
    output_dir: str = field(metadata={"help": "Folder of the copy."})


def convert(folder: Path, output_dir: Path) -> None:
    """
    Copies a checkpoint, with the model for MLX beside it.

    Args:
        folder (`Path`): The checkpoint.
        output_dir (`Path`): The copy.

    Raises:
        `UsageError`: if it is not a PEER model, or has tables in 4 bits, activations or layers that MLX does not run.
    """
    config = AutoConfig.from_pretrained(folder).to_dict()
    if config["model_type"] != "peer":
        raise UsageError(f"{folder} has a model of type {config['model_type']!r}; MLX runs those of type 'peer'.")
    if (config.get("quantization_config") or {}).get("bits", 8) != 8:
        raise UsageError(f"{folder} has tables in 4 bits; MLX runs floating point and 8 bits.")
    for name, known in (
        ("hidden_act", ("silu", "swish")),
        ("expert_act", ACTIVATIONS),
        ("feed_forward_types", ("dense", "peer")),
    ):
        values = config[name] if isinstance(config[name], list) else [config[name]]
        if unknown := set(values) - set(known):
            raise UsageError(f"`{name}` of {folder} has {sorted(unknown)}; the file for MLX has {list(known)}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED:
        for file in folder.glob(pattern):
            shutil.copy(file, output_dir)
    shutil.copy(MODEL_FILE, output_dir)
    # All fields are saved, as the model for MLX has no defaults that depend on other fields.
    config["model_file"] = MODEL_FILE.name
    (output_dir / "config.json").write_text(json.dumps(config, indent=2))


@ends_on_usage_error(ValueError)
def main():
    (args,) = parse_arguments((ConversionArguments,), __doc__)
    check_output_dir(args.output_dir, args.model_name_or_path)
    folder = Path(args.model_name_or_path)
    with loads_checkpoint(args.model_name_or_path):
        folder = folder if folder.is_dir() else Path(snapshot_download(args.model_name_or_path))
        AutoConfig.from_pretrained(folder)
    convert(folder, Path(args.output_dir))
    flags = "--trust-remote-code --ignore-chat-template"
    print(f'Next: python -m mlx_lm generate --model {args.output_dir} {flags} --prompt "def main("')


if __name__ == "__main__":
    main()
