# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and the picture of the study, from the runs that are finished."""

import math
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from statistics import mean
from typing import Any

from common.pictures import NEUTRAL, TRAININGS, VARIANTS, Look, new_figure, save_picture
from studies.common.parallel_runs import Results
from studies.common.tables import markdown_table, spread
from studies.teaching.plan import BLOCKS, RATES, SIZE, Run, reported, share, trials


LABELS = {
    "facts": "graft of facts",
    "lookup": "the gate's fact, looked up",
    "gate-facts": "the graft, its gate decided once",
    "gate-full": "the gate before full finetuning",
    "gate-lora": "the gate before LoRA",
    "bm25": "facts in the prompt (BM25)",
    "nothing": "nothing taught",
    "full": "full finetuning",
    "lora": "LoRA",
    "dense": "dense add-on",
    "graft": "trained graft",
}
LOOKS = {
    "facts": VARIANTS["peer"],
    "lookup": Look("#7A7A1F", "X"),
    "bm25": Look(NEUTRAL, "d"),
    "nothing": Look(NEUTRAL, "x"),
    "gate-facts": Look(VARIANTS["peer"].color, "^"),
    "gate-full": Look("#000000", "^"),
    "gate-lora": Look("#E69F00", "^"),
}
RECALL, OTHER_NAMES = "recall", "recall, other names"
KNOWN = ("known, taught subjects", "known, others")
NEGATIVES = ("subjects never taught", "taught something else", "other relations")
USES = ("in a sentence", "of the country whose capital is", "one of two", "not true")
Z = 1.96


def runs_of(arm: str, number: int, results: Results) -> list[dict[str, Any]]:
    """The finished runs of an arm. If the arm stands behind the gate, each is combined with the run of the gate."""
    if arm == "lookup" or arm.startswith("gate-"):
        parts = ("facts", "facts" if arm == "lookup" else arm.removeprefix("gate-"), "nothing")
        gates, runs, before = ({run["block"]: run for run in runs_of(each, number, results)} for each in parts)
        return [
            behind_gate(gates[block], looked_up(run) if arm == "lookup" else run, before[block])
            for block, run in runs.items()
            if block in gates and block in before
        ]
    try:
        own = reported(arm, number, results)
    except KeyError:
        return []
    return [results[run.name] for run in own if run.name in results]


def behind_gate(gate: dict[str, Any], run: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The answers of a run where another run's gate opens, and elsewhere of the base model, `before` teaching."""

    def behind(what):
        return {
            kind: "".join(
                own if opens == "1" else untaught
                for own, opens, untaught in zip(
                    flags, gate["open"][kind][: len(flags)], before[what][kind], strict=True
                )
            )
            for kind, flags in run[what].items()
        }

    return {what: behind(what) for what in ("right", "invented")}


def looked_up(gate: dict[str, Any]) -> dict[str, Any]:
    """The answers of the facts whose experts open. They answer no question about what the model knows."""
    known = {kind: "0" * len(flags) for kind, flags in gate["open"].items() if kind in KNOWN}
    return {
        "right": gate["looked_up"] | known,
        "invented": {kind: "1" * len(flags) for kind, flags in gate["invented"].items()},
    }


def cell(runs: list[dict[str, Any]], value_of: Callable[[dict[str, Any]], float | None], form: str = ".1%") -> str:
    """The mean of a value over runs ± its standard deviation, empty where it was not measured."""
    values = [value for run in runs if (value := value_of(run)) is not None]
    return spread(values, form) if values else ""


def right_share(kind: str, is_lost: bool = False) -> Callable[[dict[str, Any]], float | None]:
    """The share of questions of a kind that are right, or lost."""

    def value_of(run):
        flags = run["right"].get(kind)
        return None if not flags else 1 - share(flags) if is_lost else share(flags)

    return value_of


def invented(*kinds: str) -> Callable[[dict[str, Any]], float | None]:
    """The share of questions of these kinds, which ask for nothing taught, that get a taught answer."""
    return lambda run: share("".join(run["invented"][kind] for kind in kinds))


def main_table(results: Results, number: int) -> list[list[str]]:
    """What is recalled, lost and invented."""
    rows = [[f"{number:,} facts", "recalled", "other names", "lost", *(f"lost: {kind}" for kind in KNOWN)]]
    rows[0] += ["invented", "text, nats", "bytes a fact"]
    before = results[Run("base").name]["text"] if len(results) else 0.0
    for arm, label in LABELS.items():
        if not (runs := runs_of(arm, number, results)):
            continue
        row = [label, cell(runs, right_share(RECALL)), cell(runs, right_share(OTHER_NAMES))]
        row += [cell(runs, lost_of), *(cell(runs, right_share(kind, is_lost=True)) for kind in KNOWN)]
        row += [cell(runs, invented(*NEGATIVES))]
        row += [cell(runs, lambda run: run["text"] - before if "text" in run else None, "z.3f")]
        row += [cell(runs, lambda run: run["bytes"] / number if "bytes" in run else None, ",.0f")]
        rows.append(row)
    return rows


def opening(kind: str) -> Callable[[dict[str, Any]], float | None]:
    """The share of questions of a kind for which the gate opens."""
    return lambda run: share(run["open"][kind]) if kind in run["open"] else None


def upper_bound(flags: str) -> float:
    """The upper end of Wilson's interval of a share."""
    number, found = len(flags), share(flags)
    middle = found + Z**2 / (2 * number)
    half = Z * math.sqrt(found * (1 - found) / number + Z**2 / (4 * number**2))
    return (middle + half) / (1 + Z**2 / number)


def gate_table(results: Results) -> list[list[str]]:
    """For which questions the gate opens."""
    rows = [["the gate opens", *(f"{number:,} facts" for number in BLOCKS), "at most", "questions"]]
    for kind in (RECALL, OTHER_NAMES, *KNOWN, *NEGATIVES):
        runs = {number: runs_of("facts", number, results) for number in BLOCKS}
        if not (own := [run for run in runs[SIZE] if kind in run["open"]]):
            continue
        cells = [cell(runs[number], opening(kind)) for number in BLOCKS]
        flags = "".join(run["open"][kind] for run in own)
        rows.append([kind, *cells, f"{upper_bound(flags):.1%}", f"{len(flags):,}"])
    for label, name in (("tokens behind answers", "open_behind"), ("tokens of texts", "open_in_text")):
        cells = [cell(runs_of("facts", number, results), methodcaller("get", name), ".2%") for number in BLOCKS]
        if any(cells):
            rows.append([label, *cells, "", ""])
    return rows


def uses_table(results: Results) -> list[list[str]]:
    """Table of uses of facts, and of taught answers to questions for which they are wrong."""
    wrong = (f"{kind}, less is better" for kind in ("not true", *NEGATIVES))
    rows = [[f"{SIZE} facts, answered as taught", *USES[:-1], *wrong]]
    for arm, label in LABELS.items():
        if runs := runs_of(arm, SIZE, results):
            row = [label, *(cell(runs, right_share(kind)) for kind in USES)]
            rows.append([*row, *(cell(runs, invented(kind)) for kind in NEGATIVES)])
    return rows


def trials_table(results: Results) -> list[list[str]]:
    """What the trials recall, by their rates."""
    rows = [["trials", "rate", "recalled", "known answers lost", "text, nats"]]
    before = results[Run("base").name]["text"] if len(results) else 0.0
    for arm in RATES:
        for run in sorted(trials(arm, results), key=lambda run: run.learning_rate):
            if run.name in results:
                own = results[run.name]
                cells = [f"{share(own['right'][RECALL]):.1%}", f"{lost_of(own):.1%}", f"{own['text'] - before:+.3f}"]
                rows.append([LABELS[arm], f"{run.learning_rate:g}", *cells])
    return rows


def files_table(results: Results) -> list[list[str]]:
    """Two files together, and what a token costs."""
    rows = [["two files", "", ""]]
    if two := results.get(Run("two", block=1).name):
        for (kind, flags), alone in zip(two["right"].items(), runs_of("facts", SIZE, results), strict=False):
            rows.append([kind, f"{share(alone['right'][RECALL]):.1%} alone", f"{share(flags):.1%} together"])
        rows.append(["one unloaded, the other to the bit", str(two["first_is_as_before"]), ""])
        rows.append(["both unloaded, the base to the bit", str(two["base_is_as_before"]), ""])
        for label, seconds in two["seconds_a_token"].items():
            rows.append([f"one file: a token {label}", f"{seconds['taught'] / seconds['base']:.2f} times base", ""])
    return rows


def seconds_table(results: Results) -> list[list[str]]:
    """How long teaching takes, measured one way after another on one machine."""
    found = results.get(Run("seconds").name, {"seconds": {}})["seconds"]
    rows = [[LABELS[arm], f"{seconds:,.0f}"] for arm, seconds in found.items()]
    return [[f"teaching {SIZE} facts", "seconds of one core"], *rows]


def describe(results: Results) -> str:
    """All tables that have a row."""
    tables = [main_table(results, number) for number in BLOCKS]
    tables += [table(results) for table in (gate_table, uses_table, files_table, seconds_table, trials_table)]
    return "\n\n".join(markdown_table(rows) for rows in tables if len(rows) > 1)


def lost_of(run: dict[str, Any]) -> float:
    """The share of all known answers that are lost."""
    return 1 - share("".join(run["right"].get(kind, "") for kind in KNOWN))


def plot(results: Results, file: Path) -> None:
    """Plot recall against what is lost, once runs of the graft of facts are finished."""
    found = {arm: runs for arm in LABELS if (runs := runs_of(arm, SIZE, results))}
    if "facts" not in found:
        return
    figure = new_figure(7, 4.4)
    axes = figure.subplots()
    for arm, runs in found.items():
        lost = [100 * lost_of(run) for run in runs]
        recalled = [100 * share(run["right"][RECALL]) for run in runs]
        look = LOOKS.get(arm) or TRAININGS[arm]
        axes.plot(lost, recalled, linestyle="", **look.style, label=LABELS[arm])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center", bbox_to_anchor=(0.4, 0.32))
    axes.set(xlabel="known answers lost, %", ylabel="taught facts recalled, % (wordings never taught)")
    recall = mean(share(run["right"][RECALL]) for run in found["facts"])
    lost = mean(map(lost_of, found["facts"]))
    title = f"A gate keeps what was known: of {SIZE} facts {recall:.0%} are recalled, {lost:.1%} of known answers lost"
    axes.set_title(title, fontsize=10)
    save_picture(figure, file)
