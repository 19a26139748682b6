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
Does a pretrained model that learns new facts keep what it knew? SmolLM2-135M learns facts from the World Factbook that it does
not know, all of it, through LoRA, and through a graft; what each way forgot is compared at equal learning.

    python examples/lifelong_facts.py

Killed at any point, the same command goes on. Every run is a file in `--output_dir`; what comes of them all is `results.json`
and `results.png` there. Model and facts are packages of PyPI and npm, see corpora.py; `pip install gguf` reads the model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.utils import logging

from common.training import parse_arguments
from studies.common.arms import named_arms, run_all
from studies.common.study_folder import claim_folder, read_json, saved_run, write_json
from studies.facts.arms import ARMS, Arm, train_facts
from studies.facts.report import choose_settings, describe, plot, summarize
from studies.facts.study import FactsArguments, Study, load_study, measure


@dataclass
class RunArguments(FactsArguments):
    """Which arms are run."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Which of the arms to run."})


@torch.no_grad()
def is_as_before(model: nn.Module, study: Study) -> bool | None:
    """Whether a model computes, bit for bit, what it did before it had an adapter, which is off. `None` without one."""
    if not hasattr(model, "disable_adapter"):
        return None
    tokens = next(iter(study.texts.values()))[:1]
    with model.disable_adapter():
        return torch.equal(model(input_ids=tokens).logits, study.load_model()(input_ids=tokens).logits)


def run(name: str, settings: dict[str, float], seed: int, study: Study) -> dict[str, Any]:
    """Teaches a model the new facts in one way, or reads what came of it before."""
    label = {"arm": name, "settings": settings, "seed": seed}
    return saved_run(study.folder / "runs", label, lambda: teach(ARMS[name], settings, seed, study))


def teach(arm: Arm, settings: dict[str, float], seed: int, study: Study) -> dict[str, Any]:
    """The `points` at which the model was measured, whether it is itself again without an adapter, what was trained."""
    before = study.folder / "before.json"
    if not before.exists():
        write_json(before, measure(study.load_model(), study))
    set_seed(seed)
    model, callbacks = arm.prepare(study, settings)
    trained_parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    points = train_facts(model, study, settings, seed, callbacks)
    return {
        "points": [{"step": 0, **read_json(before)}, *points],
        "without_adapter_as_before": is_as_before(model, study),
        "trained_parameters": trained_parameters,
    }


def main():
    (args,) = parse_arguments((RunArguments,), __doc__)
    arms = named_arms(args.arms, ARMS)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(args.output_dir)
    claim_folder(folder, vars(args))
    print("Reading model, facts and texts ...")
    study = load_study(args, folder)
    runs, level, chosen = run_all(arms, args.seeds, lambda *each: run(*each, study), choose_settings)
    summary = summarize(runs, {name: arm.label for name, arm in arms.items()}, level, chosen, vars(args))
    write_json(folder / "results.json", summary)
    plot(summary, folder / "results.png")
    print(f"\n{describe(summary)}\n\nIn {folder}: results.json, results.png")


if __name__ == "__main__":
    main()
