# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What tables and cards say of the models that a study trained."""

import math
from statistics import mean, stdev
from typing import Any

from huggingface_hub import ModelCard

from common.cards import make_card
from studies.common.corpora import CORPORA
from studies.common.tables import spread_cell
from studies.common.training_plan import (
    CORPUS,
    Run,
    TrainingPlan,
    changed_fields,
    configuration_of,
    training_arguments,
    training_flops,
    trains_by_rows,
)


PROMPT, NEW_TOKENS = "The function returns", 30


def perplexities(losses: list[dict[str, float]], text: str) -> list[float]:
    """Perplexity of a text, with each seed."""
    return [math.exp(each[text]) for each in losses]


def mean_perplexities(losses: list[dict[str, float]], plan: TrainingPlan) -> list[float]:
    """Geometric mean of perplexity over the evaluation texts, with each seed."""
    return [math.exp(mean(each[name] for name in plan.evaluation_texts)) for each in losses]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds; of one seed, the value."""
    return spread_cell(mean(values), stdev(values) if len(values) > 1 else None, digits=2)


def own_training(run: Run, plan: TrainingPlan) -> dict[str, Any]:
    """
    How the training of a run differs from that of the plan: optimizer, `TrainingArguments`, initialization of experts.
    """
    fields, arguments = changed_fields(run, plan), training_arguments(run, plan)
    own = {"row_adamw": True} if trains_by_rows(run, plan) else {}
    own |= {name: value for name, value in arguments.items() if plan.training.get(name) != value}
    if "expert_initializer_range" in fields:
        own["expert_initializer_range"] = fields["expert_initializer_range"]
    return own


def in_words(values: dict[str, Any]) -> str:
    """Names and values, in words."""
    return ", ".join(f"`{name}` {value}" for name, value in values.items())


def card_of_run(
    name: str, run: Run, losses: list[dict[str, float]], plan: TrainingPlan, label: str, study: str
) -> ModelCard:
    """
    Makes the card of a run.

    Args:
        name (`str`): Name of its repository.
        run (`Run`): Run, of any of its seeds.
        losses (`list[dict[str, float]]`): Held-out losses with each seed. The figures of the card are means over them.
        plan (`TrainingPlan`): Plan of its study.
        label (`str`): What its variant is called, and what is varied of it.
        study (`str`): Name of its study in commands.
    """
    return make_card(
        f"USER/{name}",
        configuration_of(run, plan),
        {f"perplexity/{text}": mean(perplexities(losses, text)) for text in losses[0]},
        description=_describe(run, losses, plan, label, study),
        prompt=PROMPT,
        max_new_tokens=NEW_TOKENS,
        sequence_length=plan.block_size,
    )


def _describe(run, losses, plan, label, study):
    training = {"learning_rate": run.learning_rate, **plan.training, **own_training(run, plan)}
    training["initializer_range"] = configuration_of(run, plan).initializer_range
    seeds = f"{len(losses)} seed" + ("" if len(losses) == 1 else "s")
    deviation = "" if len(losses) == 1 else " (mean ± standard deviation over seeds)"
    return (
        f"{label}: trained from scratch by `./run study {study}` for {run.steps:,} steps of "
        f"{plan.tokens_of_step:,} tokens, {training_flops(run, plan):.2g} FLOPs, with {in_words(training)}. "
        f"Training text: {'; '.join(map(_source, plan.training_texts))}. `{CORPUS}` is a held-out part of it; the "
        "other evaluation texts come from other sources. A research model, too small to state facts.\n\n"
        f"Perplexities are means over {seeds}. Their geometric mean over the evaluation texts is "
        f"{spread(mean_perplexities(losses, plan))}{deviation}."
    )


def _source(name):
    if name not in CORPORA:
        return name
    corpus = CORPORA[name]
    return f"{name} ({corpus.registry} {corpus.package}, {corpus.license})"
