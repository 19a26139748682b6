# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Makes one run of a study, in a process of its own: trains a model with run_clm.py, and measures it.

    python -m studies.common.single_run RUN.json

The study writes the file. Its entry `run_clm` is saved beside it as RUN.run_clm.json, which run_clm.py accepts as its
only argument to train the same model without the study.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import run_clm
import torch
from datasets import load_from_disk
from filelock import FileLock
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from common.cards import RESULTS
from common.machine import machine
from modeling_peer import keep_heads, measure_usage
from modeling_peer.analysis.evaluation import evaluation
from modeling_peer.feed_forward import PeerFeedForward, PkmFeedForward
from studies.common.study_folder import read_json, write_json
from studies.common.training_plan import CORPUS


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sequences per forward in evaluation.
EVAL_BATCH_SIZE = 16

# Arguments of run_clm.py that are paths of the machine.
PLACES = ("tokenizer_name", "train_file", "validation_file", "output_dir")

# A function with which a study changes a trainer before it trains. It gets the content of RUN.json and the trainer.
Change: TypeAlias = Callable[[dict[str, Any], Trainer], None]

# Lower end, upper end and number of bins of the histogram of router weight per expert, in powers of ten of the mean.
USAGE_BINS = (-4.0, 3.0, 28)


# The loss is averaged in this number of parts of a sequence, of about equal length. It falls along a sequence as far
# as a model uses its context.
PARTS = 8


def losses(model: PreTrainedModel, texts: dict[str, torch.Tensor], batch_size: int) -> dict[str, float]:
    """The loss of each text in nats per token, see [`token_losses`]."""
    return {name: token_losses(model, text, batch_size).mean().item() for name, text in texts.items()}


def token_losses(model: PreTrainedModel, text: torch.Tensor, batch_size: int) -> torch.Tensor:
    """
    Returns the loss of each token of a text but the first of each sequence, without the balance loss of a MoE.

    Args:
        model (`PreTrainedModel`): Model to evaluate, in the mode it is in.
        text (`torch.Tensor` of shape `(num_sequences, block_size)`): Tokens.
        batch_size (`int`): Number of sequences per forward.

    Returns:
        `torch.Tensor` of shape `(num_sequences, block_size - 1)`, in nats, float64.
    """
    found = []
    for tokens in text.split(batch_size):
        logits = model(input_ids=tokens).logits[:, :-1].transpose(1, 2)
        found.append(F.cross_entropy(logits.float(), tokens[:, 1:], reduction="none").double().cpu())
    return torch.cat(found)


def losses_as_trained(model: PreTrainedModel, texts: dict[str, torch.Tensor], batch_size: int) -> dict[str, float]:
    """
    Returns the losses of a MoE in training mode and with the batch size of its training. Under expert choice, experts
    choose among all tokens of a batch, including later ones.
    """
    model.train()
    found = losses(model, texts, batch_size)
    model.eval()
    return found


def usage(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, Any]:
    """
    Returns, for each set of experts, the measures of the paper's table 3 and a histogram over experts of their router
    weight, as the decimal logarithm of the weight relative to the mean; experts without any weight are counted as
    `unused`.
    """
    first, *others = (measure_usage(model.model, input_ids=batch) for batch in tokens.split(EVAL_BATCH_SIZE))
    for other in others:
        for name, meter in other.items():
            first[name].scores += meter.scores
            first[name].top1_counts += meter.top1_counts
    low, high, bins = USAGE_BINS
    found = {}
    for name, meter in first.items():
        scores = meter.scores.double().cpu()
        relative = (scores[scores > 0] / scores.mean()).log10()
        counts = torch.histogram(relative.clamp(low, high), bins=bins, range=(low, high)).hist
        found[name] = {**meter.compute(), "unused": int((scores == 0).sum()), "histogram": counts.long().tolist()}
    return found


def without_places(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of run_clm.py without the paths of the machine, which are no part of a result."""
    return {name: value for name, value in arguments.items() if name not in PLACES}


def comparable(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of run_clm.py that determine the result: without paths and settings of the machine, and with each field
    of `config_overrides` as an entry of its own.
    """
    apart = (*PLACES, "dataloader_pin_memory", "config_overrides")
    return {
        **{name: value for name, value in arguments.items() if name not in apart},
        **json.loads(arguments["config_overrides"]),
    }


def with_study_defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Add to arguments of run_clm.py the defaults with which the results in this repository were made: tables have the
    learning rate of all other parameters, and the first step is not logged. By itself, run_clm.py takes the
    multipliers that the scaling study found.
    """
    same = {"expert_lr_multiplier": 1.0, "down_proj_lr_multiplier": 1.0} if arguments["row_adamw"] else {}
    return {"logging_first_step": False, **same, **arguments}


def train(arguments: dict[str, Any], file: Path, change: Callable[[Trainer], None] | None = None) -> dict[str, Any]:
    """
    Trains a model with run_clm.py, or resumes its training.

    Args:
        arguments (`dict`): Arguments of run_clm.py.
        file (`Path`): File in which the arguments are saved.
        change (`Callable`, *optional*): Called with the trainer before it trains.

    Returns:
        `dict`: the results of run_clm.py, and the training loss by step.

    Raises:
        `ValueError`: if the training was started with other arguments.
    """
    arguments = with_study_defaults(arguments)
    if file.exists() and comparable(with_study_defaults(read_json(file))) != comparable(arguments):
        raise ValueError(
            f"{arguments['output_dir']} was started with other arguments, which are in {file}: remove both to start "
            "again."
        )
    write_json(file, arguments)
    sys.argv = [run_clm.__file__, str(file)]
    run_clm.main(change)
    folder = Path(arguments["output_dir"])
    history = read_json(folder / "trainer_state.json")["log_history"]
    return {
        "train_history": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "all_results": read_json(folder / "all_results.json"),
    }


def read_texts(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """Reads the held-out texts of a study onto a device."""
    return {
        name: torch.tensor(load_from_disk(folder / name)["input_ids"], device=device)
        for name in read_json(folder / "texts.json")
    }


def digests(texts: dict[str, torch.Tensor]) -> dict[str, str]:
    """Digests of texts, which tell whether results come from the same texts and tokenizer."""
    return {name: hashlib.sha256(text.cpu().numpy().tobytes()).hexdigest()[:16] for name, text in texts.items()}


def load(folder: Path, num_retrieval_heads: int | None = None, **fields: Any) -> PreTrainedModel:
    """
    Loads a trained model with its first retrieval heads alone, or with changed fields of its configuration, in
    evaluation mode.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **fields)
    if num_retrieval_heads is not None:
        keep_heads(model, num_retrieval_heads)
    return model.to(DEVICE).eval()


@torch.no_grad()
def measure(folder: Path, texts: dict[str, torch.Tensor], batch_size: int) -> dict[str, Any]:
    """
    Return the held-out losses of a trained model, of texts, of each sequence and of parts of sequences, and its expert
    usage. `batch_size` is that of its training.
    """
    model = load(folder)
    with evaluation(model):
        of_tokens = {name: token_losses(model, text, EVAL_BATCH_SIZE) for name, text in texts.items()}
        result: dict[str, Any] = {
            "losses": {name: each.mean().item() for name, each in of_tokens.items()},
            "sequence_losses": {
                name: [round(loss, 4) for loss in each.mean(1).tolist()] for name, each in of_tokens.items()
            },
            "part_losses": {
                name: [round(part.mean().item(), 4) for part in each.tensor_split(PARTS, dim=1)]
                for name, each in of_tokens.items()
            },
        }
        if any(isinstance(module, (PeerFeedForward, PkmFeedForward)) for module in model.modules()):
            result["usage"] = usage(model, texts[CORPUS])
    if model.config.moe_routing == "expert_choice":
        result["losses_as_trained"] = losses_as_trained(model, texts, batch_size)
    return result


@torch.no_grad()
def measure_after_training(
    folder: Path, texts: dict[str, torch.Tensor], changes: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns, for each change, its fields and the held-out losses of the trained model loaded with them."""
    return {
        name: {"fields": fields, "losses": losses(load(folder, **fields), texts, EVAL_BATCH_SIZE)}
        for name, fields in changes.items()
    }


def changes_to_measure(result: dict[str, Any], planned: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The planned changes after training that the result of a run lacks."""
    measured = {name: each["fields"] for name, each in result["after_training"].items()}
    return {name: fields for name, fields in planned.items() if measured.get(name) != fields}


def make(work: dict[str, Any], file: Path, change: Change | None = None) -> dict[str, Any]:
    """Trains the model of a run, measures it, and returns the result."""
    arguments = work["run_clm"]
    folder = Path(arguments["output_dir"])
    trained = train(arguments, file.with_suffix(".run_clm.json"), None if change is None else partial(change, work))
    texts = read_texts(Path(work["held_out"]), DEVICE)
    measured = measure(folder, texts, arguments["per_device_train_batch_size"])
    # push_to_hub.py makes the card of the model from these, in place of what run_clm.py measured on another sample.
    others = {name: value for name, value in trained["all_results"].items() if name not in RESULTS}
    perplexities = {f"perplexity/{text}": math.exp(loss) for text, loss in measured["losses"].items()}
    write_json(folder / "all_results.json", {**others, **perplexities})
    about = {"run_clm": without_places(arguments), "texts": digests(texts), "machine": machine(), "after_training": {}}
    return {**work["run"], **trained, **measured, **about}


def main(change: Change | None = None):
    file = Path(sys.argv[1])
    work = read_json(file)
    result_file = Path(work["result_file"])
    with FileLock(file.with_suffix(".lock")):  # wait for a run that outlived its killed study
        if not result_file.exists():
            write_json(result_file, make(work, file, change))
        result = read_json(result_file)
        if changes := changes_to_measure(result, work["after_training"]):
            texts = read_texts(Path(work["held_out"]), DEVICE)
            result["after_training"] |= measure_after_training(Path(work["run_clm"]["output_dir"]), texts, changes)
            write_json(result_file, result)


if __name__ == "__main__":
    main()
