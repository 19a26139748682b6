# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and the picture of the study, from the runs that are finished."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes

from common.pictures import TRAININGS, add_legend, look_of, new_figure, save_picture
from studies.capacity.plan import (
    ARM_TRIALS,
    EXPOSURES,
    FULL,
    LEARNED,
    LIKE,
    OFFERED_MORE,
    TRIED,
    Results,
    Run,
    arm_trials,
    best,
    chosen,
    first_trials,
    forgetting,
    is_tried,
    learning,
    learning_as_long,
    mixed_trials,
    offered_more,
    settings_of,
    trials,
    with_seeds,
)
from studies.capacity.variants import costs, has_tables
from studies.common.tables import markdown_table, spread


# The 97.5 % point of Student's t with two degrees of freedom, of three seeds.
T_QUANTILE = 4.303
# If more than this share of the offered bits is stored, the bits may be held down by the offer.
ALL = 0.8
KBIT = 1000
# Variants that are compared, and PEER with the memory of as many parameters.
COMPARED = (*TRIED, FULL)
PAIRS = {"peer-4096": "pkm-8281", "peer-16384": "pkm-32761"}
# Mark after the name of a variant whose seeds were run again, see `steady`.
MADE_AGAIN = " †"

# What [`measure_times`] returns, or empty.
Times = dict[str, dict[str, float]]


def available(
    subjects: Iterable[str], runs_of: Callable[[str, Results], list[Run]], results: Results
) -> dict[str, list[Run]]:
    """The runs of a stage, for each variant or arm whose runs are all finished."""
    found = {}
    for name in subjects:
        try:
            own = runs_of(name, results)
        except KeyError:
            continue
        if all(run.name in results for run in own):
            found[name] = own
    return found


def kilobits(runs: list[Run], results: Results, part: str = "stored") -> list[float]:
    """Thousands of bits of each run."""
    return [results[run.name][part]["bits"] / KBIT for run in runs]


def interval_of_ratio(values: list[float], others: list[float]) -> list[float]:
    """
    Lower end, mean and upper end of the ratio: the geometric mean over seeds, with a 95 % interval by Student's t.
    With one seed, the ratio alone.
    """
    logarithms = [math.log(value / other) for value, other in zip(values, others, strict=False)]
    if len(logarithms) == 1:
        return [math.exp(logarithms[0])]
    half = T_QUANTILE * stdev(logarithms) / math.sqrt(len(logarithms))
    return [math.exp(mean(logarithms) + sign * half) for sign in (-1, 0, 1)]


def ratio(values: list[float], others: list[float]) -> str:
    """The ratio with its interval, as text."""
    low, *rest = interval_of_ratio(values, others)
    return f"{rest[0]:.2f} ({low:.2f} to {rest[1]:.2f})" if rest else f"{low:.2f}"


def share_offered(runs: list[Run], results: Results) -> str:
    """The bits stored as a share of those offered, marked as a bound if the share exceeds `ALL`."""
    share = mean(results[run.name]["stored"]["bits"] / results[run.name]["offered"] for run in runs)
    return f"{share:.1%}" + (", a bound" if share > ALL else "")


def recalled(runs: list[Run], results: Results, part: str = "stored") -> str:
    """The mean share of facts recalled."""
    return f"{mean(results[run.name][part]['recalled'] for run in runs):.1%}"


def marked(name: str, runs: list[Run], trial: Run) -> str:
    """The name of a variant, with a sign if its seeds were made again at half the rate of its trial."""
    return name + (MADE_AGAIN if runs[0].learning_rate != trial.learning_rate else "")


def learned_table(results: Results) -> list[list[str]]:
    """What the compared runs learned, beside dense and beside a memory of as many parameters."""
    found = available(COMPARED, learning, results)
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
    rows[0].append("tokens a second, decoding")
    experts = available((LIKE, FULL, PAIRS[LIKE]), learning, results)
    if LIKE not in experts:
        return rows
    for name, runs in (experts | available(EXPOSURES, learning_as_long, results)).items():
        own, load = kilobits(runs, results), runs[0].load
        seconds = times["seconds_per_fact"][name] * load.number * load.exposures
        cells = [f"{costs(name).total.parameters / 1e6:.2f}", str(load.exposures), f"{seconds:.0f}"]
        ratios = "" if name == LIKE else ratio(own, kilobits(experts[LIKE], results))
        decoding = f"{times['tokens_per_second'][name]:,.0f}"
        rows.append([name, *cells, spread(own, ",.0f"), recalled(runs, results), ratios, decoding])
    return rows


def more_table(results: Results) -> list[list[str]]:
    """What is learned if twice as many facts are offered."""
    found = available(OFFERED_MORE, offered_more, results)
    rows = [["learned of a larger offer", "parameters, M", "kbit", "of offered", "recalled", "to dense"]]
    for name, runs in found.items():
        own = kilobits(runs, results)
        cells = [f"{costs(name).total.parameters / 1e6:.2f}", spread(own, ",.0f"), share_offered(runs, results)]
        to_dense = ratio(own, kilobits(found["dense"], results)) if "dense" in found and name != "dense" else ""
        rows.append([name, *cells, recalled(runs, results), to_dense])
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
    rows = [
        ["trials beyond the grid", "learning rate", "u_i or feed-forwards", "v_i", "warmup", "std", "batch", "kbit"]
    ]
    for name in TRIED:
        runs = [run for run in trials(name, results)[len(first_trials(name)) :] if run.name in results]
        if is_tried(name, results) and chosen(name, results) not in runs:
            runs = [chosen(name, results), *runs]
        for run in runs:
            own = settings_of(run)
            cells = [f"{own[axis]:g} times" if axis in own else "" for axis in ("up_multiplier", "down")]
            is_best = is_tried(name, results) and run == chosen(name, results)
            cells = [f"{run.learning_rate:g}", *cells, f"{run.warmup:.0%}", f"{run.initializer_range:g}"]
            cells.append(str(run.batch_size))
            rows.append([name + (", chosen" if is_best else ""), *cells, _kilobit(run, results)])
    return rows


def _kilobit(run: Run, results: Results) -> str:
    return f"{mean(kilobits([run], results)):,.0f}" if run.name in results else ""


def unsteady_table(results: Results) -> list[list[str]]:
    """The seeds at the settings of the best trial, for variants of which a seed failed with them."""
    rows = [["failed with a seed", "rate", "kbit of the trial", "of each seed", "made again at"]]
    for name, runs in available(TRIED, learning, results).items():
        trial = chosen(name, results)
        if runs != with_seeds(trial):
            made = [run for run in with_seeds(trial) if run.name in results]
            bits = [f"{value:,.0f}" for value in kilobits([trial, *made], results)]
            rows.append([name, f"{trial.learning_rate:g}", bits[0], ", ".join(bits[1:]), f"{runs[0].learning_rate:g}"])
    return rows


def controls_table(results: Results) -> list[list[str]]:
    """The most bits that a control has, as a share of what is offered."""
    found = available(COMPARED, learning, results)
    rows = [["controls, % of offered", "unseen keys", "permuted values"]]
    for name, runs in found.items():
        shares = {
            control: max(results[run.name]["controls"][control]["bits"] / results[run.name]["offered"] for run in runs)
            for control in ("unseen keys", "permuted values")
        }
        rows.append([name, *(f"{100 * share:+.2f}" for share in shares.values())])
    return rows


def narrow_table(results: Results) -> list[list[str]]:
    """The share of bits that is left with tables in 8 and 4 bits."""
    found = available([name for name in COMPARED if has_tables(name)], learning, results)
    rows = [["% of bits left", "8 bits", "4 bits"]]
    for name, runs in found.items():
        left = {
            bits: mean(
                results[run.name]["in_bits"][bits]["bits"] / results[run.name]["stored"]["bits"] for run in runs
            )
            for bits in ("8", "4")
        }
        rows.append([name, *(f"{100 * share:.1f}" for share in left.values())])
    return rows


def lost(runs: list[Run], results: Results) -> list[float]:
    """The percentage of bits of the first facts that each run lost."""
    return [100 * (1 - results[run.name]["left"]["bits"] / results[run.name]["before"]["bits"]) for run in runs]


def forgetting_table(results: Results) -> list[list[str]]:
    """What is left of the first facts, and what is gained of second ones that stand apart."""
    return _second_facts("second facts, apart", available(ARM_TRIALS, forgetting, results), results)


def mixed_table(results: Results) -> list[list[str]]:
    """The same for second facts that differ from the first ones only by the first tokens of keys: the best trials."""
    found = available(ARM_TRIALS, mixed_trials, results)
    chosen_ones = {arm: [best(runs, results)] for arm, runs in found.items()}
    return _second_facts("second facts, alike, best trial", chosen_ones, results)


def _second_facts(label, found, results):
    rows = [[label, "trained, M", "rate", "first, % of bits lost", "recalled before", "after", "second, kbit"]]
    rows[0].append("recalled")
    for arm, runs in found.items():
        trained, shares = results[runs[0].name]["trained_parameters"] / 1e6, lost(runs, results)
        rate = f"{runs[0].learning_rate:g}"
        if arm != "lora":  # which trains no v_i
            rate += f", v_i {runs[0].multiplier / 4:g} times"
        cells = [f"{trained:.2f}", rate, spread(shares)]
        cells += [recalled(runs, results, part) for part in ("before", "left")]
        rows.append(
            [arm, *cells, spread(kilobits(runs, results, "gained"), ",.0f"), recalled(runs, results, "gained")]
        )
    return rows


def describe(results: Results, times: Times) -> str:
    """All tables that have a row."""
    grids = [grid_table(name, results) for name in TRIED if any(run.name in results for run in first_trials(name))]
    tables = [learned_table(results), as_long_table(results, times), more_table(results), *grids]
    others = (search_table, unsteady_table, controls_table, narrow_table, forgetting_table, mixed_table)
    tables += [table(results) for table in others]
    return "\n\n".join(markdown_table(rows) for rows in tables if len(rows) > 1)


def plot(results: Results, file: Path) -> None:
    """Plot what is learned, and what second facts leave of first ones, once those that the title names are finished."""
    if len(available(("dense", LIKE), learning, results)) < 2:
        return
    has_second = bool(available(ARM_TRIALS, forgetting, results))
    figure = new_figure(13.5 if has_second else 6, 4.4)
    axes = figure.subplots(1, 1 + has_second, squeeze=False)[0]
    draw_bars(results, axes[0])
    if has_second:
        _plot_forgetting(results, axes[1])
    save_picture(figure, file)


def draw_bars(results: Results, axes: Axes) -> None:
    """Draw bars of what is learned at equal FLOPs, and by dense in as many seconds, for the finished variants."""
    names = sorted(COMPARED, key=lambda name: costs(name).total.parameters)
    found = available(names, learning, results)
    longer = available(EXPOSURES, learning_as_long, results)
    labels, bits, colors = [], [], []
    for name, runs in [*longer.items(), *found.items()]:
        kind, _, size = name.partition("-")
        of_size = f", {int(size):,} {'rows' if kind == 'pkm' else 'experts'}" if size and kind != "dense" else ""
        as_long = ", as many seconds" if runs[0].load != LEARNED else ""
        labels.append(f"{look_of(kind).label}{of_size}, {costs(name).total.parameters / 1e6:.1f} M{as_long}")
        bits.append(mean(kilobits(runs, results)))
        colors.append(look_of(kind).color)
    bars = axes.barh(labels[::-1], bits[::-1], color=colors[::-1])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("kbit of random facts learned in 16 exposures, of 2,097")
    axes.set_title(_finding(found, results))


def _finding(found: dict[str, list[Run]], results: Results) -> str:
    """A title of two lines: what experts and, once finished, a memory of as many parameters learn, relative to dense."""
    experts, *memory = (
        interval_of_ratio(*(kilobits(found[name], results) for name in (each, "dense")))[1]
        for each in (LIKE, PAIRS[LIKE])
        if each in found
    )
    return (
        f"At equal FLOPs {int(LIKE.partition('-')[2]):,} experts a layer learn {experts:.0f} times\n"
        f"as much as dense{f', a product-key memory {memory[0]:.0f} times' if memory else ''}"
    )


def _plot_forgetting(results: Results, axes: Axes) -> None:
    found = available(ARM_TRIALS, forgetting, results)
    for arm, runs in found.items():
        style = TRAININGS[arm].style | {"linestyle": ""}
        axes.plot(lost(runs, results), kilobits(runs, results, "gained"), **style, label=arm)
        tried = arm_trials(arm, results)
        pale = style | {"markersize": 4, "alpha": 0.3}
        axes.plot(lost(tried, results), kilobits(tried, results, "gained"), **pale)
    add_legend(axes)
    axes.set(xlabel="first facts lost, % of bits; pale: trials", ylabel="kbit of second facts gained")
    if found.keys() >= {"full", "protected"}:
        (kept, gain), (other, most) = (
            (mean(lost(found[arm], results)), mean(kilobits(found[arm], results, "gained")))
            for arm in ("protected", "full")
        )
        axes.set_title(
            f"Facts that stand apart: experts behind gates lose {kept:.2f} % and gain\n"
            f"{gain:.0f} kbit, full finetuning loses {'all' if other > 100 else f'{other:.0f} %'} and gains {most:.0f}",
            fontsize=10,
        )
