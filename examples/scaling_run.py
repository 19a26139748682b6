# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Makes one run of the scaling study, in a process of its own: trains a model with run_clm.py, and measures what came of it.

    python examples/scaling_run.py RUN.json

The file is written by scaling.py. What it holds under `run_clm` is what run_clm.py takes as its only argument, and trains
the same model without the study.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import run_clm
import torch
from datasets import load_from_disk
from filelock import FileLock
from scaling_plan import CORPUS
from studies import machine, read_json, write_json
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_peer import measure_usage
from modeling_peer.evaluation import evaluation


# Sequences of a forward in evaluation.
EVAL_BATCH_SIZE = 16

# Bins of a histogram of how much weight experts get, in powers of ten of the mean.
USAGE_BINS = (-4.0, 3.0, 28)


def losses(model: PreTrainedModel, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss of each text, in nats per token, without what a MoE adds to balance its experts."""
    return {
        name: sum(map(_summed_loss(model), text.split(EVAL_BATCH_SIZE))) / _predicted(text)
        for name, text in texts.items()
    }


def _summed_loss(model):
    def summed_loss(tokens):
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits.float(), tokens[:, 1:].flatten(), reduction="sum").item()

    return summed_loss


def _predicted(text):
    """How many of its tokens are predicted."""
    return text[:, 1:].numel()


def losses_as_trained(model: PreTrainedModel, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """The losses of a MoE in training mode: where experts choose, they choose by what comes later, too."""
    model.train()
    found = losses(model, texts)
    model.eval()
    return found


def usage(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, Any]:
    """
    For each set of experts the measures of the paper's table 3 and a histogram of the weight that experts got: how many
    experts got how much, by its decimal logarithm over the mean, and how many got none.
    """
    low, high, bins = USAGE_BINS
    found = {}
    for name, meter in measure_usage(model.model, input_ids=tokens).items():
        scores = meter.scores.double().cpu()
        relative = (scores[scores > 0] / scores.mean()).log10()
        counts = torch.histogram(relative.clamp(low, high), bins=bins, range=(low, high)).hist
        found[name] = {**meter.compute(), "unused": int((scores == 0).sum()), "histogram": counts.long().tolist()}
    return found


def train(arguments: dict[str, Any], file: Path) -> dict[str, Any]:
    """Trains with the ordinary script, or goes on, and returns what it says of it."""
    write_json(file, arguments)
    sys.argv = [run_clm.__file__, str(file)]
    run_clm.main()
    folder = Path(arguments["output_dir"])
    history = read_json(folder / "trainer_state.json")["log_history"]
    return {
        "train_history": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "all_results": read_json(folder / "all_results.json"),
    }


def measure(folder: Path, held_out: Path, after_training: dict[str, dict]) -> dict[str, Any]:
    """Held-out losses and expert usage of a trained model, also with fields changed."""
    names = json.loads((held_out / "texts.json").read_text())
    texts = {name: torch.tensor(load_from_disk(held_out / name)["input_ids"]) for name in names}
    model = AutoModelForCausalLM.from_pretrained(folder)
    with evaluation(model):
        result: dict[str, Any] = {"losses": losses(model, texts)}
        if {"peer", "pkm"}.intersection(model.config.feed_forward_types):
            result["usage"] = usage(model, texts[CORPUS])
        result["after_training"] = {
            name: losses(AutoModelForCausalLM.from_pretrained(folder, **fields).eval(), texts)
            for name, fields in after_training.items()
        }
    if model.config.moe_routing == "expert_choice":
        result["losses_as_trained"] = losses_as_trained(model, texts)
    return result


def main():
    file = Path(sys.argv[1])
    work = read_json(file)
    result_file = Path(work["result_file"])
    with FileLock(file.with_suffix(".lock")):  # a run that outlived its study, killed, is waited for
        if result_file.exists():
            return
        folder = Path(work["run_clm"]["output_dir"])
        trained = train(work["run_clm"], folder / "run_clm.json")
        measured = measure(folder, Path(work["held_out"]), work["after_training"])
        # For the card that push_to_hub.py makes of the model.
        perplexities = {f"perplexity/{text}": math.exp(loss) for text, loss in measured["losses"].items()}
        write_json(folder / "all_results.json", {**trained["all_results"], **perplexities})
        machine_and_arguments = {"run_clm": work["run_clm"], "machine": machine()}
        write_json(result_file, {**work["run"], **trained, **measured, **machine_and_arguments})
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
