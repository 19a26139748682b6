# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compares initializations of a graft in place of a feed-forward: the graft replaces the feed-forward of the middle layer
of SmolLM2-135M and starts from random experts or from the neurons of that feed-forward. Both are measured before and
after training.

    ./run study graft_starts

After an interruption, the same command resumes. The results are in `results.json` in --output_dir.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from common.command_line import parse_arguments
from common.evaluation import held_out_loss
from common.machine import machine
from common.text_data import DataTrainingArguments, tokenize_into_blocks
from modeling_peer import PeerGraftConfig
from studies.common.base_model import MODEL_PACKAGE, save_base
from studies.common.corpora import load_corpus
from studies.common.finetuning import train
from studies.common.study_folder import claim_folder, read_json, sole_use, write_json
from studies.common.tables import markdown_table


STARTS = {"random": False, "neurons": True}  # values of `init_from_ffn`


@dataclass
class StartArguments:
    """Which graft is trained on which text, and for how long."""

    output_dir: str = field(default="runs/graft_starts", metadata={"help": "Output folder."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Base model, by its id or folder. Defaults to the package {MODEL_PACKAGE} of PyPI."},
    )
    text: str = field(
        default="python-docs",
        metadata={"help": "Text to train on, by its name in studies/common/corpora.py or its id of the Hub."},
    )
    num_experts: int = field(default=192**2, metadata={"help": "Number of experts of the graft."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Learning rates to train with."}
    )
    steps: int = field(default=40, metadata={"help": "Training steps, of 1,024 tokens each."})
    eval_blocks: int = field(default=16, metadata={"help": "Held-out sequences, of 256 tokens each."})


def load_base(folder: Path) -> nn.Module:
    """Loads the base model, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()


def graft(base: nn.Module, start: str, args: StartArguments) -> nn.Module:
    """The base model with a graft in place of the feed-forward of its middle layer."""
    from peft import get_peft_model

    set_seed(0)
    config = PeerGraftConfig(
        placement="in_place", init_from_ffn=STARTS[start], num_experts=args.num_experts, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config).eval()


def loss_of(model: nn.Module, held_out: torch.Tensor) -> float:
    """Returns the held-out loss in nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        return held_out_loss(model, held_out, 4, progress_bar=False)


def loss_without(base: nn.Module, held_out: torch.Tensor) -> float:
    """Remove the feed-forward of the base model's middle layer for good, and return the held-out loss."""
    layer = base.model.layers[(base.config.num_hidden_layers - 1) // 2]
    layer.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    return loss_of(base, held_out)


def describe(results: dict[str, Any]) -> str:
    """The table of the comparison."""
    columns = list(results["random"])
    rows = [["held-out loss, nats per token", *columns]]
    rows += [[f"experts: {start}", *(f"{results[start][name]:.3f}" for name in columns)] for start in STARTS]
    others = {"without feed-forward": "without feed-forward", "host": "base model"}  # keys of results, labels
    rows += [[label, f"{results[name]:.3f}", *[""] * (len(columns) - 1)] for name, label in others.items()]
    return markdown_table(rows)


def main():
    (args,) = parse_arguments((StartArguments,), __doc__)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(args.output_dir)
    with sole_use(folder):
        claim_folder(folder, vars(args))
        results = make_study(args, folder)
    print(f"\n{describe(results)}\n\nIn {folder}: results.json")


def make_study(args: StartArguments, folder: Path) -> dict[str, Any]:
    """Makes all runs in the folder of the study, and sums them up."""
    save_base(args.model_name_or_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    corpus = load_corpus(args.text)
    blocks = {
        split: tokenize_into_blocks(corpus[split], tokenizer, 256, DataTrainingArguments()).shuffle(seed=0)
        for split in ("train", "validation")
    }
    held_out = torch.tensor(blocks["validation"][: args.eval_blocks]["input_ids"])
    results: dict[str, Any] = {"command": "./run study graft_starts", "arguments": vars(args), "machine": machine()}
    results["host"] = loss_of(load_base(folder), held_out)
    results["without feed-forward"] = loss_without(load_base(folder), held_out)
    for start in STARTS:
        results[start] = {"at the start": loss_of(graft(load_base(folder), start, args), held_out)}
    runs = [(start, rate) for rate in args.learning_rates for start in STARTS]
    for start, rate in tqdm(runs, desc="Training"):
        file = folder / "runs" / f"{start}-{rate:g}.json"
        if not file.exists():
            model = graft(load_base(folder), start, args)
            train(model, blocks["train"], folder / "trainer", rate, args.steps, 4, bf16=True, use_cpu=True)
            write_json(file, {"loss": loss_of(model, held_out)})
        results[start][f"learning rate {rate:g}"] = read_json(file)["loss"]
    write_json(folder / "results.json", results)
    return results


if __name__ == "__main__":
    main()
