# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables of the study, from the runs that are finished."""

from statistics import mean

from studies.capacity.plan import Results, Run
from studies.capacity.report import Times, available, kilobits, marked, ratio, recalled, share_offered
from studies.capacity.training import BATCH_SIZE
from studies.capacity.variants import costs, has_tables
from studies.common.tables import markdown_table, spread
from studies.storage.plan import (
    EXPOSURES,
    FULL,
    LIKE,
    TRIED,
    chosen,
    first_trials,
    is_tried,
    learning,
    learning_as_long,
    settings_of,
    trials,
)


# PEER, and the memory of as many parameters.
PAIRS = {"peer-4096": "pkm-8281", "peer-16384": "pkm-32761"}


def learned_table(results: Results) -> list[list[str]]:
    """What the compared runs learned, beside dense and beside a memory of as many parameters."""
    found = available((*TRIED, FULL), learning, results)
    rows = [["learned", "parameters, M", "FLOPs, k", "kbit", "of offered", "recalled", "to dense", "to PKM", "trials"]]
    for name, runs in found.items():
        cost, own = costs(name).total, kilobits(runs, results)
        others = ("" if name == "dense" else "dense", PAIRS.get(name))
        ratios = [ratio(own, kilobits(found[each], results)) if each in found else "" for each in others]
        cells = [f"{cost.parameters / 1e6:.2f}", f"{cost.flops / 1e3:.0f}", spread(own, ",.0f")]
        number = len(trials(name, results)) if name in TRIED else 0
        cells += [share_offered(runs, results), recalled(runs, results), *ratios, str(number)]
        rows.append([marked(name, runs, chosen(name, results)), *cells])
    return rows


def as_long_table(results: Results, times: Times) -> list[list[str]]:
    """What is learned in as many seconds: experts, and dense models that see the facts more often."""
    rows = [["learned in as many seconds", "parameters, M", "times seen", "seconds", "kbit", "recalled", "of experts"]]
    experts = available((LIKE, FULL, PAIRS[LIKE]), learning, results)
    if LIKE not in experts:
        return rows
    for name, runs in (experts | available(EXPOSURES, learning_as_long, results)).items():
        own, load = kilobits(runs, results), runs[0].load
        seconds = times["seconds_per_step"][name] * load.number * load.exposures / BATCH_SIZE
        cells = [f"{costs(name).total.parameters / 1e6:.2f}", str(load.exposures), f"{seconds:.0f}"]
        ratios = "" if name == LIKE else ratio(own, kilobits(experts[LIKE], results))
        rows.append([name, *cells, spread(own, ",.0f"), recalled(runs, results), ratios])
    return rows


def grid_table(name: str, results: Results) -> list[list[str]]:
    """Kilobits of the first trials of a variant: a row for each rate of u_i or learning rate, a column for v_i's."""
    runs = first_trials(name)
    first = "up_multiplier" if name.startswith("peer") else "learning_rate"
    second = "down" if has_tables(name) else "up_multiplier"
    values = [sorted({settings_of(run)[axis] for run in runs}) for axis in (first, second)]
    label = "rate of u_i" if first == "up_multiplier" else "learning rate"
    other = "v_i" if second == "down" else "feed-forwards"
    rows = [[f"{name}, kbit, by {label}", *(f"{other} {value:g} times" for value in values[1])]]
    for value in values[0]:
        own = {settings_of(run)[second]: run for run in runs if settings_of(run)[first] == value}
        times = " times" if first == "up_multiplier" else ""
        rows.append([f"{value:g}{times}", *(_kilobit(own[each], results) for each in values[1])])
    return rows


def search_table(results: Results) -> list[list[str]]:
    """The best run of each grid, and the trials beyond the grid, with their settings."""
    rows = [["trials beyond the grid", "learning rate", "u_i or feed-forwards", "v_i", "warmup", "std", "kbit"]]
    for name in TRIED:
        runs = [run for run in trials(name, results)[len(first_trials(name)) :] if run.name in results]
        if is_tried(name, results) and chosen(name, results) not in runs:
            runs = [chosen(name, results), *runs]
        for run in runs:
            own = settings_of(run)
            cells = [f"{own[axis]:g} times" if axis in own else "" for axis in ("up_multiplier", "down")]
            is_best = is_tried(name, results) and run == chosen(name, results)
            cells = [f"{run.learning_rate:g}", *cells, f"{run.warmup:.0%}", f"{run.initializer_range:g}"]
            rows.append([name + (", chosen" if is_best else ""), *cells, _kilobit(run, results)])
    return rows


def _kilobit(run: Run, results: Results) -> str:
    return f"{mean(kilobits([run], results)):,.0f}" if run.name in results else ""


def describe(results: Results, times: Times) -> str:
    """All tables that have a result."""
    grids = [grid_table(name, results) for name in TRIED if any(run.name in results for run in first_trials(name))]
    tables = [learned_table(results), as_long_table(results, times), *grids, search_table(results)]
    return "\n\n".join(markdown_table(rows) for rows in tables if len(rows) > 1)
