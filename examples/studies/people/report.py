# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of the study of people."""

from math import exp
from statistics import mean
from typing import Any

from studies.common.tables import markdown_table
from studies.common.training_plan import CORPUS
from studies.people.arms import TOKENS_PER_STEP
from studies.people.texts import HELD_OUT_TEXTS


def describe(results: dict[str, Any]) -> str:
    """Recall and perplexity of each arm, n-grams beside them, and the trials."""
    texts = list(HELD_OUT_TEXTS)
    rows = [["", "parameters, M", "rate", "weights", "steps", "seconds", "exposures"]]
    rows[0] += [
        "recalled",
        "as told of others",
        "as told",
        "others",
        "bits a person",
        "perplexity",
        "of the second half",
    ]
    of_training = results["arguments"]
    for run in results["runs"]:
        kinds = ("recall", "recall as told of others", "recall as told", "recall of others")
        shares = [f"{mean(run[each]['recalled'].values()):.1%}" for each in kinds]
        shares.append(f"{sum(run['recall']['bits'].values()):.1f}")
        perplexities = [
            f"{exp(mean(run['losses'][text][part] for text in texts)):.2f}" for part in ("all", "second half")
        ]
        cells = [f"{run['parameters'] / 1e6:.1f}", f"{run['learning_rate']:g}", f"{run['initializer_range']:g}"]
        cells += [f"{run['steps']:,}", f"{run['training'].get('train_runtime', 0):,.0f}"]
        all_read = run["training"]["train_samples"] * of_training["block_size"]  # tokens of all texts
        cells.append(f"{of_training['exposures'] * run['steps'] * TOKENS_PER_STEP / all_read:.1f}")
        rows.append([run["arm"], *cells, *shares, *perplexities])
    for kind, label in (("ngrams", "4-gram"), ("cache", "4-gram and cache")):
        found = exp(mean(results["ngrams"][kind][text] for text in texts))
        rows.append([label, *[""] * (len(rows[0]) - 2), f"{found:.2f}"])
    trials = [["trials", "rate", "weights", "perplexity of the corpus", "seconds per step"]]
    for run in results["trials"]:
        seconds = run["training"]["train_runtime"] / run["steps"]
        cells = [f"{run['learning_rate']:g}", f"{run['initializer_range']:g}"]
        trials.append([run["arm"], *cells, f"{exp(run['losses'][CORPUS]['all']):.2f}", f"{seconds:.2f}"])
    attributes = list(results["runs"][0]["recall"]["recalled"])
    by_attribute = [["recalled", *attributes]]
    by_attribute += [
        [run["arm"], *(f"{run['recall']['recalled'][each]:.1%}" for each in attributes)] for run in results["runs"]
    ]
    return "\n\n".join(map(markdown_table, (rows, by_attribute, trials)))
