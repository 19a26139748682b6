# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of the study of people."""

from math import exp
from statistics import mean
from typing import Any

from studies.common.parallel_runs import Results
from studies.common.tables import markdown_table
from studies.people.arms import TOKENS_PER_STEP, loss_of
from studies.people.measure import NEVER_TRAINED, OTHERS, TOLD, TOLD_OF_OTHERS
from studies.people.texts import BLOCK, GROUPS, HELD_OUT_TEXTS


def share(found: dict[str, Any]) -> float:
    """The mean share of attributes that are recalled."""
    return mean(found["recalled"].values())


def describe(results: Results, ngrams: dict[str, Any]) -> str:
    """Recall and perplexity of each training, n-grams beside them, and the trials."""
    of_text = [
        ["", "seed", "parameters, M", "rate", "weights", "steps", "seconds", "perplexity", "of the second half"]
    ]
    recalled = [["", "seed", "told", "read", *(kinds := (NEVER_TRAINED, TOLD_OF_OTHERS, TOLD)), "bits a person"]]
    trials = [["trials", "rate", "weights", "nats of held-out text", "seconds per step"]]
    for run in results.values():
        seconds = run["training"]["train_runtime"]
        trained = [f"{run['learning_rate']:g}", f"{run['initializer_range']:g}"]
        if run["is_trial"]:
            trials.append([run["arm"], *trained, f"{loss_of(run):.3f}", f"{seconds / run['steps']:.2f}"])
            continue
        name = [run["arm"], str(run["seed"])]
        of_texts = [exp(mean(run["losses"][each][part] for each in HELD_OUT_TEXTS)) for part in ("all", "second half")]
        cells = [f"{run['parameters'] / 1e6:.1f}", *trained, f"{run['steps']:,}", f"{seconds:,.0f}"]
        of_text.append([*name, *cells, *(f"{each:.2f}" for each in of_texts)])
        part_read = run["steps"] * TOKENS_PER_STEP / (run["training"]["train_samples"] * BLOCK)
        for told in GROUPS:
            found = run["recall"][str(told)]
            bits = f"{sum(found[NEVER_TRAINED]['bits'].values()):.1f}"
            recalled.append(
                [*name, str(told), f"{told * part_read:.1f}", *(f"{share(found[each]):.1%}" for each in kinds), bits]
            )
        recalled.append([*name, OTHERS, "", f"{share(run['recall'][OTHERS][NEVER_TRAINED]):.1%}", "", "", ""])
    for kind, label in (("ngrams", "4-gram"), ("cache", "4-gram and cache")):
        if ngrams:
            perplexity = exp(mean(ngrams[kind][each] for each in HELD_OUT_TEXTS))
            of_text.append([label, *[""] * (len(of_text[0]) - 2), f"{perplexity:.2f}"])
    return "\n\n".join(map(markdown_table, (recalled, of_text, trials)))
