# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model keeps of its facts when it is taught others, for several ways to teach."""

from dataclasses import astuple
from pathlib import Path
from statistics import mean
from typing import Any

from filelock import FileLock
from torch import nn
from transformers import TrainerCallback, set_seed

from modeling_peer import ExpertBackground, GateFit, PeerForCausalLM, SparseFinetuningCallback, add_experts, fit_gates
from studies.capacity.facts import VOCABULARY, Facts, make_facts, measure
from studies.capacity.plan import BEFORE, BEFORE_APART, MULTIPLIER, TAUGHT, Load, Run
from studies.capacity.training import store, store_facts
from studies.capacity.variants import make_model


# Keys of second facts begin with a token of the other half of the vocabulary; nothing else distinguishes them from
# first facts. Or they stand apart: keys and values have tokens of that half only, like texts in another language.
HALVES = range(VOCABULARY // 2), range(VOCABULARY // 2, VOCABULARY)
BASE_RATE = 1e-3  # twice this rate stored nothing in the trials
ADDED_EXPERTS, SPARSE_EXPERTS, REFERENCE, REPLAYED = 4096, 1024, 2048, 0.05
# Number of random sequences that the model reads per example of a first fact, if second facts stand apart. They
# consist of tokens of second facts, so that these tokens are not new to the model when it is taught.
UNKNOWN = 1 / 8


def base_model(kind: str, seed: int, folder: Path, facts: Facts, load: Load) -> PeerForCausalLM:
    """Load the model that has stored the first facts, which is trained once and saved."""
    run = Run(kind, TAUGHT, load, BASE_RATE, MULTIPLIER, seed)
    examples, exposures = facts.examples, load.exposures
    if kind == "apart":
        examples, exposures = exposures * examples, 1
        number = round(UNKNOWN * len(examples))  # each once, so that nothing can be stored of them
        examples += make_facts(number, load.token_bits, seed + 100, HALVES[1], HALVES[1])[0].examples
    saved = folder / "bases" / run.name
    saved.parent.mkdir(exist_ok=True)
    with FileLock(f"{saved}.lock"):
        if not saved.exists():
            model = make_model(TAUGHT, seed)
            store(model, examples, run, folder, exposures)
            model.save_pretrained(unfinished := Path(f"{saved}-unfinished"))
            unfinished.rename(saved)
    return PeerForCausalLM.from_pretrained(saved)


def prepare(
    arm: str, model: PeerForCausalLM, old: Facts, new: Facts
) -> tuple[nn.Module, list[TrainerCallback], dict[int, GateFit]]:
    """Prepare the training of an arm. Returns the model, the callbacks, and how far gates open, if there are any."""
    gates: dict[int, GateFit] = {}
    match arm:
        case "lora":
            from peft import LoraConfig, get_peft_model

            targets = [name for name, each in model.named_modules() if type(each) is nn.Linear and name != "lm_head"]
            config = LoraConfig(r=64, lora_alpha=128, target_modules=targets, task_type="CAUSAL_LM")
            return get_peft_model(model, config), [], gates
        case "sparse":
            background = ExpertBackground.measure(model, old.examples[:REFERENCE], batch_size=256, progress_bar=False)
            return model, [SparseFinetuningCallback(model, background, SPARSE_EXPERTS)], gates
        case "protected" | "protected-ungated":
            add_experts(model, ADDED_EXPERTS)
            if arm == "protected":
                texts = new.examples[:REFERENCE], old.examples[:REFERENCE]
                gates = fit_gates(model, *texts, reference_weight=16, batch_size=256, progress_bar=False)
    return model, [], gates


def teach_after(run: Run, folder: Path) -> dict[str, Any]:
    """
    Teach second facts to a model that has stored first ones. Returns the bits of the first facts before and after,
    those of the second facts after, and the mean over layers of how far gates open for second and for first facts.
    """
    before_load = BEFORE if run.kind == "forgetting" else BEFORE_APART
    old, new = (
        make_facts(load.number, load.token_bits, run.seed, half, half if run.kind == "apart" else range(VOCABULARY))[0]
        for load, half in zip((before_load, run.load), HALVES, strict=True)
    )
    model = base_model("apart" if run.kind == "apart" else "facts", run.seed, folder, old, before_load)
    before = measure(model, old)
    set_seed(run.seed)  # new parts start the same, whether or not this process has trained the base
    model, callbacks, gates = prepare(run.subject, model, old, new)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    examples, exposures = new.examples, run.load.exposures
    if run.subject == "replay":
        examples, exposures = exposures * examples, 1
        examples += old.examples[: round(REPLAYED * len(examples))]
    store(model, examples, run, folder, exposures, callbacks=callbacks)
    left, gained = measure(model, old), measure(model, new)
    return {
        "offered": {"old": old.bits, "new": new.bits},
        "before": before,
        "left": left,
        "gained": gained,
        "gates_open": [mean(each) for each in zip(*(astuple(gate) for gate in gates.values()), strict=True)],
        "trained_parameters": trained,
    }


def make(run: Run, folder: Path) -> dict[str, Any]:
    """Make a run of any kind. It is not in `__main__`, which the processes of runs cannot import."""
    return (store_facts if run.kind == "facts" else teach_after)(run, folder)
