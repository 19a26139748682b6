# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Quantizes the expert tables of a checkpoint, and compares its perplexity on held-out text before and after.

    python examples/quantize.py --model_name_or_path examples/checkpoints/peer-nano --bits 4 \\
        --output_dir runs/peer-nano-4-bit

The model is saved in --output_dir with its tokenizer, and loads as every other checkpoint; the figures are in
`quantization.json` there. The text is the Python standard library unless --dataset_name or --train_file gives another.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from run_clm import evaluate_perplexity, load_text, make_trainer
from torch import nn
from transformers import Trainer, TrainingArguments

from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from common.model_arguments import ModelArguments, check_output_dir, load_config
from common.text_data import DataTrainingArguments
from common.training import setup_logging
from modeling_peer import ExpertUsageCallback, PeerQuantizationConfig, quantize_experts
from modeling_peer.experts import expert_tables


@dataclass
class QuantizationArguments:
    """How tables are quantized, and where the result goes."""

    output_dir: str = field(metadata={"help": "Folder of the quantized checkpoint."})
    bits: int = field(default=8, metadata={"help": "Bits of an element, 8 or 4."})
    group_size: int | None = field(
        default=None,
        metadata={"help": "Columns of a row that share a scale. The whole row with 8 bits, and 64 with 4 bits."},
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Sequences that are evaluated at a time."})

    def __post_init__(self):
        PeerQuantizationConfig(self.bits, self.group_size)  # raises if they are invalid


@dataclass
class Figures:
    """Held-out perplexities, and bytes of all expert tables."""

    perplexity_before: float
    perplexity_after: float
    table_bytes_before: int
    table_bytes_after: int

    def __str__(self) -> str:
        change = self.perplexity_after / self.perplexity_before - 1
        return (
            f"perplexity    {self.perplexity_before:.4f} → {self.perplexity_after:.4f} ({change:+.3%})\n"
            f"expert tables {self.table_bytes_before:,} → {self.table_bytes_after:,} bytes"
        )


def table_bytes(model: nn.Module) -> int:
    """Bytes of all expert tables of a model, with their scales."""
    return sum(parameter.nbytes for table in expert_tables(model).values() for parameter in table.parameters())


def perplexity(trainer: Trainer) -> float:
    """The perplexity of the model of a trainer on the held-out set."""
    return evaluate_perplexity(trainer, ExpertUsageCallback())["perplexity"]


@ends_on_usage_error()
def main():
    args, model_args, data_args = parse_arguments(
        (QuantizationArguments, ModelArguments, DataTrainingArguments), __doc__
    )
    if model_args.is_new:
        raise UsageError("--model_name_or_path must name the checkpoint to quantize.")
    check_output_dir(args.output_dir, model_args.model_name_or_path)
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        do_eval=True,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
    )
    setup_logging(training_args)
    config = load_config(model_args)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"{model_args.model_name_or_path} is quantized already: name the checkpoint that it was made of."
        )
    tokenizer, blocks = load_text(model_args, data_args, training_args, config)
    trainer = make_trainer(model_args, training_args, config, tokenizer, blocks)
    model = trainer.model
    if not table_bytes(model):
        raise UsageError(f"{model_args.model_name_or_path} has no expert tables to quantize.")
    before = perplexity(trainer), table_bytes(model)
    quantize_experts(model, args.bits, args.group_size)
    after = perplexity(trainer), table_bytes(model)
    figures = Figures(before[0], after[0], before[1], after[1])

    folder = Path(args.output_dir)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "quantization.json").write_text(json.dumps(asdict(figures), indent=2) + "\n")
    print(figures)


if __name__ == "__main__":
    main()
