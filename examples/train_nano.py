# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains the small checkpoints that come with this repository: a PEER model, and its dense twin of the same width.

    ./run python examples/train_nano.py

Both read the source code of Python's standard library in the same order. An interrupted training resumes. The weights
are saved in bf16 in runs/nano/, with a tokenizer, a card and results.json: perplexities on held-out files as trained,
as saved, and with expert tables in 8 and 4 bits. examples/checkpoints/ has the same files, and links to the code.
"""

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from quantize import perplexity
from run_clm import evaluate_perplexity, load_text, make_trainer
from transformers import AutoModelForCausalLM, Trainer

from common.cards import TRAINING_FILE, make_card
from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from common.model_arguments import ModelArguments, load_config
from common.text_data import DataTrainingArguments
from common.training import PretrainingArguments, last_checkpoint, run, setup_logging
from modeling_peer import quantize_experts


TWINS = {"peer-nano": "dense-nano", "dense-nano": "peer-nano"}

DESCRIPTION = """\
A small model to try things with. It read {tokens:.1f} million tokens, and writes text that looks like Python and means
nothing. Its twin of the same width, `{twin}`, read the same text in the same order. In a clone of the repository its code
files are links: copy the folder with `cp -rL`, or put `import modeling_peer` in front of loading a copy without them.

{license}The perplexity below is that of the weights in bf16, computed in float32, on {num_sequences} sequences of {block_size}
tokens of files that were held out. `results.json` has all figures."""

# Used with the default text.
LICENSE = """\
The text, {data}, is copyrighted by the Python Software Foundation and has the
[PSF License 2.0](https://docs.python.org/3/license.html). What the model repeats of it stays under that license.

"""


@dataclass
class NanoArguments:
    """Which of the two models to train, for how long, and where to save it."""

    models: list[str] = field(default_factory=lambda: list(TWINS), metadata={"help": "Which models to train."})
    output_dir: str = field(default="runs/nano", metadata={"help": "Folder of the saved models."})
    training_dir: str = field(
        default="runs/nano/training", metadata={"help": "Folder of the logs, and of what is resumed."}
    )
    max_steps: int = field(default=3000, metadata={"help": "Training steps of two sequences."})

    def __post_init__(self):
        if unknown := sorted(set(self.models) - set(TWINS)):
            raise UsageError(f"--models must be some of {list(TWINS)}, got {unknown}.")


@dataclass
class NanoDataArguments(DataTrainingArguments):
    """Which text to train on."""

    max_eval_samples: int = field(
        default=64, metadata={"help": "Number of held-out sequences to evaluate on, evenly spaced."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.streaming:
            raise UsageError("--streaming is for longer texts than this script takes, which holds them in memory.")


def train(name: str, args: NanoArguments, data_args: NanoDataArguments) -> tuple[Trainer, dict[str, float]]:
    """Train a model of a named configuration, or resume its training. Returns its trainer and metrics."""
    model_args = ModelArguments(config_name=name)
    config = load_config(model_args)
    training_args = PretrainingArguments(
        output_dir=str(Path(args.training_dir, name)),
        do_train=True,
        do_eval=True,
        max_steps=args.max_steps,
        per_device_train_batch_size=2,
        logging_steps=0.01,
        save_steps=0.1,
        save_total_limit=1,
        report_to="none",
    )
    setup_logging(training_args)
    training_args.set_learning_rate(config, is_new=True)
    checkpoint = last_checkpoint(training_args)
    tokenizer, blocks = load_text(model_args, data_args, training_args, config, checkpoint)
    trainer = make_trainer(model_args, training_args, config, tokenizer, blocks)
    return trainer, run(trainer, checkpoint, evaluate_perplexity, data=data_args.description)


def save(trainer: Trainer, folder: Path) -> None:
    """Saves a trained model in bf16 with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir, dtype=torch.bfloat16)
    model.config.use_cache = True  # which `Trainer` has turned off
    model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)


def measure(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Held-out perplexity of a saved model, computed in float32, and the same with expert tables in 8 and 4 bits."""
    model_args = ModelArguments(model_name_or_path=str(folder))
    blocks = {"validation": trainer.eval_dataset}
    found = {}
    for bits in (16, 8, 4) if "peer" in trainer.model.config.feed_forward_types else (16,):
        saved = make_trainer(model_args, trainer.args, load_config(model_args), trainer.processing_class, blocks)
        if bits < 16:
            quantize_experts(saved.model, bits)
        found[f"{bits} bits"] = perplexity(saved)
    return found


def checksum(sequences: list[list[int]]) -> int:
    """A checksum that tells whether a perplexity was measured on the same text."""
    return crc32(json.dumps(sequences).encode())


def describe(name: str, trainer: Trainer, data_args: NanoDataArguments, results: dict[str, Any]) -> str:
    """The card of a saved model."""
    training = json.loads(Path(trainer.args.output_dir, TRAINING_FILE).read_text(encoding="utf-8"))
    is_default_text = data_args.dataset_name is None and not data_args.files
    description = DESCRIPTION.format(
        license=LICENSE.format(data=data_args.description) if is_default_text else "",
        tokens=results["tokens"] / 1e6,
        twin=TWINS[name],
        num_sequences=results["held_out_sequences"],
        block_size=results["block_size"],
    )
    card = make_card(
        f"examples/checkpoints/{name}",
        trainer.model.config,
        {"perplexity": results["perplexity"]["16 bits"]},
        license="apache-2.0",
        description=description,
        max_new_tokens=100,
        training=training,
    )
    return str(card)


@ends_on_usage_error()
def main():
    args, data_args = parse_arguments((NanoArguments, NanoDataArguments), __doc__)
    for name in args.models:
        trainer, metrics = train(name, args, data_args)
        folder = Path(args.output_dir, name)
        save(trainer, folder)
        block_size = len(trainer.eval_dataset[0]["input_ids"])
        results = {
            "python": platform.python_version(),
            "steps": args.max_steps,
            "tokens": args.max_steps * trainer.args.train_batch_size * block_size,
            "held_out_sequences": len(trainer.eval_dataset),
            "block_size": block_size,
            "held_out_checksum": checksum(trainer.eval_dataset["input_ids"][:]),
            "perplexity": {"as trained": metrics["perplexity"], **measure(trainer, folder)},
        }
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(describe(name, trainer, data_args, results), encoding="utf-8")


if __name__ == "__main__":
    main()
