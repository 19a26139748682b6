# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of the study of people."""

from math import exp
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from common.pictures import look_of, new_figure, save_picture
from studies.common.parallel_runs import Results
from studies.common.people import VALUES
from studies.common.tables import markdown_table
from studies.common.training_plan import CORPUS
from studies.people.arms import TOKENS_PER_STEP
from studies.people.measure import NEVER_TRAINED, OTHERS, PLACES, TOLD_OF_OTHERS, WORDINGS
from studies.people.texts import BLOCK, HELD_OUT_TEXTS


DRAWS = 2000  # bootstrap draws of people, for intervals
LEAST = 0.02  # recall above others below which dense is no divisor of a ratio


def trainings(results: Results) -> list[dict[str, Any]]:
    """The runs that are not trials, dense first."""
    return sorted(
        (run for run in results.values() if not run.get("is_trial")), key=lambda run: (run["arm"], run["seed"])
    )


def dense_of(results: Results) -> dict[str, Any] | None:
    """The first seed of dense, which all runs of other arms are compared with."""
    return next((run for run in trainings(results) if run["arm"] == "dense"), None)


def name_of(run: dict[str, Any]) -> str:
    """The name of a run in the picture."""
    label = look_of(run["arm"]).label
    return f"{label}, seed {run['seed']}" if run["seed"] else label


def groups_of(run: dict[str, Any]) -> list[int]:
    """The number of biographies per person in each group, the largest first."""
    return [int(group) for group in run["recall"] if group != OTHERS]


def share(run: dict[str, Any], group: str, wording: str) -> float:
    """The mean share of attributes that are recalled."""
    return mean(run["recall"][group][wording]["recalled"].values())


def read_of(run: dict[str, Any], told: int) -> float:
    """How many biographies of a person a training has read on average, if there are `told` of them."""
    return told * run["steps"] * TOKENS_PER_STEP / (run["training"]["train_samples"] * BLOCK)


def perplexity(run: dict[str, Any], part: str) -> float:
    """The geometric mean of perplexity over the texts of other sources."""
    return exp(mean(run["losses"][each][part] for each in HELD_OUT_TEXTS))


def below(run: dict[str, Any], dense: dict[str, Any]) -> str:
    """How far the perplexity of second halves is below that of dense, with a 95 % interval over the sequences."""
    pairs = [
        [np.array(each["losses"][text]["second half of each"]) for each in (dense, run)] for text in HELD_OUT_TEXTS
    ]
    nats = [first - second for first, second in pairs]
    error = np.sqrt(sum(each.var(ddof=1) / len(each) for each in nats)) / len(nats)
    middle = np.mean([each.mean() for each in nats])
    share, low, high = (1 - np.exp(-each) for each in (middle, middle - 1.96 * error, middle + 1.96 * error))
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def above_others(run: dict[str, Any], wording: str) -> np.ndarray:
    """
    The share recalled, as a mean over groups, minus the share of people without biographies. Then the same for each
    bootstrap draw of people, which all runs share: `(1 + DRAWS,)`.
    """
    generator = np.random.default_rng(0)
    shares = {}
    for group in run["recall"]:
        right = np.array([[*map(int, each)] for each in run["recall"][group][wording]["right"].values()]).mean(0)
        drawn = generator.integers(len(right), size=(DRAWS, len(right)))
        shares[group] = np.concatenate([[right.mean()], right[drawn].mean(1)])
    return np.mean([shares[str(told)] for told in groups_of(run)], axis=0) - shares[OTHERS]


def times_dense(run: dict[str, Any], dense: dict[str, Any], wording: str) -> str:
    """How many times as much as dense a model recalls, with a 95 % interval; a lower bound if dense recalls little."""
    own, others = above_others(run, wording), above_others(dense, wording)
    if max(own[0], others[0]) < LEAST:
        return "neither recalls them"
    if others[0] < LEAST:
        return f"at least {own[0] / LEAST:.1f}"
    ratios = own / others
    low, high = np.quantile(ratios[1:], (0.025, 0.975))
    return f"{ratios[0]:.2f} ({low:.2f} to {high:.2f})"


def all_table(results: Results) -> list[list[str]]:
    """Table of what is recalled in each place, as a mean over groups, above strangers, and of its ratio to dense."""
    rows = [["mean of groups, above strangers", "seed", *WORDINGS, *(f"times dense, {each}" for each in WORDINGS[:2])]]
    dense = dense_of(results)
    for run in trainings(results):
        for place in PLACES:
            asked = [wording + place for wording in WORDINGS if wording + place in run["recall"][OTHERS]]
            if len(asked) < 2:
                continue
            cells = [f"{above_others(run, each)[0]:.1%}" for each in asked]
            cells += [""] * (len(WORDINGS) - len(asked))
            is_compared = dense and run["arm"] != "dense"
            cells += [times_dense(run, dense, each) if is_compared else "" for each in asked[:2]]
            rows.append([run["arm"] + place, str(run["seed"]), *cells])
    return rows


def groups_table(results: Results) -> list[list[str]]:
    """Table of what is recalled of the people of each group."""
    runs = trainings(results)
    asked = list(dict.fromkeys(each for run in runs for found in run["recall"].values() for each in found))
    rows = [["", "seed", "biographies", "of them read", *asked, f"bits, {NEVER_TRAINED}"]]
    for run in runs:
        for group, found in run["recall"].items():
            cells = [f"{share(run, group, each):.1%}" if each in found else "" for each in asked]
            if group == OTHERS:
                rows.append([run["arm"], str(run["seed"]), "none, strangers", "", *cells, ""])
            else:
                bits = f"{sum(found[NEVER_TRAINED]['bits'].values()):.1f}"
                rows.append([run["arm"], str(run["seed"]), group, f"{read_of(run, int(group)):.1f}", *cells, bits])
    return rows


def attributes_table(results: Results) -> list[list[str]]:
    """Table of what is recalled of each attribute in the wording that is never trained, as a mean over groups."""
    rows = [[NEVER_TRAINED, "seed", *VALUES]]
    for run in trainings(results):
        for place in PLACES:
            if NEVER_TRAINED + place in run["recall"][OTHERS]:
                of_groups = [run["recall"][str(told)][NEVER_TRAINED + place]["recalled"] for told in groups_of(run)]
                cells = [f"{mean(each[attribute] for each in of_groups):.1%}" for attribute in VALUES]
                rows.append([run["arm"] + place, str(run["seed"]), *cells])
    return rows


def texts_table(results: Results, ngrams: dict[str, Any]) -> list[list[str]]:
    """Table of the perplexities of texts, and of the amount of training."""
    rows = [["", "seed", "parameters, M", "rate", "std of weights", "steps", "seconds", "perplexity"]]
    rows[0].append("of the second half")
    for run in trainings(results):
        cells = [f"{run['parameters'] / 1e6:.1f}", f"{run['learning_rate']:g}", f"{run['initializer_range']:g}"]
        cells += [f"{run['steps']:,}", f"{run['training'].get('train_runtime', 0):,.0f}"]
        of_texts = [f"{perplexity(run, part):.2f}" for part in ("all", "second half")]
        rows.append([run["arm"], str(run["seed"]), *cells, *of_texts])
    dense = dense_of(results)
    for run in trainings(results):
        if dense and run["arm"] != "dense":
            label = [f"{run['arm']} below dense", str(run["seed"])]
            rows.append([*label, *[""] * (len(rows[0]) - 3), below(run, dense)])
    for kind, label in (("ngrams", "4-gram"), ("cache", "4-gram and cache")):
        if ngrams:
            of_texts = exp(mean(ngrams[kind][each] for each in HELD_OUT_TEXTS))
            rows.append([label, *[""] * (len(rows[0]) - 2), f"{of_texts:.2f}"])
    return rows


def trials_table(results: Results) -> list[list[str]]:
    """Table of the trials of initializations, which were made before the first trainings only."""
    rows = [["trials", "rate", "std of weights", "nats of held-out text", "seconds of a step"]]
    for run in results.values():
        if run.get("is_trial"):
            loss = run["losses"][CORPUS]["all"]
            cells = [f"{run['learning_rate']:g}", f"{run['initializer_range']:g}", f"{loss:.3f}"]
            rows.append([run["arm"], *cells, f"{run['training']['train_runtime'] / run['steps']:.2f}"])
    return rows


def describe(results: Results, ngrams: dict[str, Any]) -> str:
    """All tables that have a row."""
    tables = [all_table(results), texts_table(results, ngrams), attributes_table(results), groups_table(results)]
    tables.append(trials_table(results))
    return "\n\n".join(markdown_table(rows) for rows in tables if len(rows) > 1)


def plot(results: Results, file: Path) -> None:
    """
    Plot what models recall of a person against the number of biographies that they have read of the person, if the
    question begins a sequence, and if it follows another document.
    """
    figure = new_figure(12, 4)
    figure.suptitle(
        "Attributes recalled after about equal seconds. In titles: the mean of groups, above strangers, in the wording "
        f"{TOLD_OF_OTHERS}"
    )
    where = "begins a sequence", "follows another text", "follows another biography"
    for axes, place, there in zip(figure.subplots(1, 3, sharey=True), PLACES, where, strict=True):
        found = []
        for run in trainings(results):
            read, style = [read_of(run, told) for told in groups_of(run)], look_of(run["arm"]).style
            if run["seed"]:
                style["markerfacecolor"] = "none"
            for wording, line in ((TOLD_OF_OTHERS, "-"), (NEVER_TRAINED, "--")):
                recalled = [100 * share(run, str(told), wording + place) for told in groups_of(run)]
                axes.plot(read, recalled, line, **style, label=f"{name_of(run)}, wording {wording}")
            found.append(f"{name_of(run)} {above_others(run, TOLD_OF_OTHERS + place)[0]:.0%}")
        axes.set_title(f"The question {there}:\n{', '.join(found)}", fontsize=8)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(groups_of(run), groups_of(run))
        axes.set(xlabel="biographies read of a person", ylim=(0, 105))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("attributes recalled, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_picture(figure, file)
