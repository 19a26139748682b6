# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and the picture of the study, from the runs that are finished."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes

from common.pictures import TRAININGS, add_legend, look_of, new_figure, save_picture
from studies.capacity.facts import VALUE_TOKENS
from studies.capacity.plan import (
    ARM_TRIALS,
    COMPARED,
    DENSE,
    ENTROPIES,
    FITS,
    LEARNED,
    MAIN,
    OF_ALL_ENTROPIES,
    OFFERED_MORE,
    TRIAL_SEED,
    WARMUP,
    Results,
    Run,
    arm_trials,
    best,
    chosen,
    fitting,
    forgetting,
    in_the_end,
    learning,
    mixed_trials,
    of_all_entropies,
    offered_more,
    steady,
    trials_that_fit,
    with_seeds,
)
from studies.capacity.training import BATCH_SIZE
from studies.capacity.variants import AT_EQUAL_FLOPS, VARIANTS, costs, has_tables
from studies.common.tables import markdown_table, spread


# The 97.5 % point of Student's t with two degrees of freedom, of three seeds.
T_QUANTILE = 4.303
# If more than this share of the offered bits is stored, the bits only show that the facts fit.
FULL = 0.8
KBIT = 1000
# Other variants, and PEER with as many parameters; the largest memory is last.
AS_MANY_PARAMETERS = {"dense-as-peer-1024": "peer-1024", "pkm-8281": "peer-4096", "pkm-32761": "peer-16384"}
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


def ratio(values: list[float], others: list[float], is_bound: bool = False) -> str:
    """The ratio with its interval, as text. If `values` could not be larger (`is_bound`), only its lower end."""
    low, *rest = interval_of_ratio(values, others)
    if is_bound:
        return f"at least {low:.2f}"
    return f"{rest[0]:.2f} ({low:.2f} to {rest[1]:.2f})" if rest else f"{low:.2f}"


def share_of_offered(runs: list[Run], results: Results) -> float:
    """The bits stored as a share of those offered."""
    return mean(results[run.name]["stored"]["bits"] / results[run.name]["offered"] for run in runs)


def share_offered(runs: list[Run], results: Results) -> str:
    """The bits stored as a share of those offered, marked as a bound if the share exceeds `FULL`."""
    share = share_of_offered(runs, results)
    return f"{share:.1%}" + (", a bound" if share > FULL else "")


def recalled(runs: list[Run], results: Results, part: str = "stored") -> str:
    """The mean share of facts recalled."""
    return f"{mean(results[run.name][part]['recalled'] for run in runs):.1%}"


def better_dense(found: dict[str, list[Run]], results: Results) -> str | None:
    """The dense variant that learned more; `None` before both are finished."""
    if not found.keys() >= {*DENSE}:
        return None
    return max(DENSE, key=lambda name: mean(kilobits(found[name], results)))


def marked(name: str, runs: list[Run], trial: Run) -> str:
    """The name of a variant, with a sign if its seeds were made again at half the rate of its trial."""
    return name + (MADE_AGAIN if runs[0].learning_rate != trial.learning_rate else "")


def learned_table(results: Results) -> list[list[str]]:
    """What is learned in few exposures, at equal FLOPs and of a wider dense model."""
    found = available(VARIANTS, learning, results)
    dense = better_dense(found, results)
    rows = [["learned", "parameters, M", "FLOPs, k", "kbit", "of offered", "recalled", f"to {dense or 'dense'}"]]
    rows[0] += ["bits / parameter"]

    def to_dense(name):
        if dense in (None, name):
            return ""
        is_bound = share_of_offered(found[name], results) > FULL
        return ratio(kilobits(found[name], results), kilobits(found[dense], results), is_bound)

    for name, runs in found.items():
        cost, own = costs(name).total, kilobits(runs, results)
        cells = [f"{cost.parameters / 1e6:.2f}", f"{cost.flops / 1e3:.0f}", spread(own, ",.0f")]
        cells += [share_offered(runs, results), recalled(runs, results), to_dense(name)]
        rows.append([marked(name, runs, chosen(name, results)), *cells, f"{KBIT * mean(own) / cost.parameters:.2f}"])
    return rows


def more_table(results: Results) -> list[list[str]]:
    """What is learned if four times as many facts are offered."""
    found = available(OFFERED_MORE, offered_more, results)
    rows = [["learned of a larger offer", "parameters, M", "kbit", "of offered", "recalled", "to dense"]]
    for name, runs in found.items():
        own = kilobits(runs, results)
        cells = [f"{costs(name).total.parameters / 1e6:.2f}", spread(own, ",.0f"), share_offered(runs, results)]
        to_dense = ratio(own, kilobits(found["dense"], results)) if "dense" in found and name != "dense" else ""
        rows.append([name, *cells, recalled(runs, results), to_dense])
    return rows


def memories_table(results: Results) -> list[list[str]]:
    """Product-key memories and a wider dense model beside PEER of as many parameters."""
    rows = [["at equal parameters, of experts last", "parameters, M", "kbit", "recalled", "kbit", "recalled", "ratio"]]
    for memory, experts in AS_MANY_PARAMETERS.items():
        found = available((memory, experts), learning, results)
        if len(found) == 2:
            own, others = (kilobits(found[name], results) for name in (memory, experts))
            is_bound = share_of_offered(found[memory], results) > FULL
            millions = f"{costs(memory).total.parameters / 1e6:.2f}"
            cells = [millions]
            for name, each in ((memory, own), (experts, others)):
                cells += [spread(each, ",.0f"), recalled(found[name], results)]
            experts_label = marked(experts, found[experts], chosen(experts, results))
            rows.append([f"{memory}, {experts_label}", *cells, ratio(own, others, is_bound)])
    return rows


def trials_table(results: Results) -> list[list[str]]:
    """Kilobits of all trials that were made, by warmup, by the multiplier of v_i and by rate."""
    made = [
        run
        for run in results.values()
        if run["seed"] == TRIAL_SEED and run["kind"] == "facts" and run["load"] == asdict(LEARNED)
    ]
    rates = sorted({run["learning_rate"] for run in made})
    rows = [["trials, kbit", "warmup", "rate of v_i", *(f"{rate:g}" for rate in rates)]]
    for name in VARIANTS:
        kinds: dict[tuple, dict[float, str]] = {}
        for run in made:
            if run["subject"] == name:
                own = kinds.setdefault((run.get("warmup", WARMUP), -run["multiplier"]), {})
                own[run["learning_rate"]] = f"{run['stored']['bits'] / KBIT:,.0f}"
        for (warmup, multiplier), own in sorted(kinds.items()):
            times = f"{-multiplier / 4:g} times" if has_tables(name) else ""
            rows.append([name, f"{warmup:.0%}", times, *(own.get(rate, "") for rate in rates)])
    return rows


def unsteady_table(results: Results) -> list[list[str]]:
    """The seeds at the best rate of the trials, for variants of which a seed failed at that rate."""
    rows = [["failed with a seed", "rate", "kbit of the trial", "of each seed", "made again at"]]
    stages = [(name, "", chosen) for name in VARIANTS]
    stages += [(name, ", fits", lambda *each: best(trials_that_fit(*each), results)) for name in FITS]
    for name, kind, trial_of in stages:
        try:
            trial = trial_of(name, results)
        except KeyError:
            continue
        made = [run for run in with_seeds(trial) if run.name in results]
        if (later := steady(trial, results)) != with_seeds(trial):
            bits = [f"{value:,.0f}" for value in kilobits([trial, *made], results)]
            cells = [f"{trial.learning_rate:g}", bits[0], ", ".join(bits[1:]), f"{later[0].learning_rate:g}"]
            rows.append([name + kind, *cells])
    return rows


def controls_table(results: Results) -> list[list[str]]:
    """The most bits that a control has, as a share of what is offered."""
    found = available(AT_EQUAL_FLOPS, learning, results)
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
    found = available([name for name in AT_EQUAL_FLOPS if has_tables(name)], learning, results)
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


def fits_table(results: Results) -> list[list[str]]:
    """What fits after 100 exposures."""
    rows = [["fits", "facts", "steps", "rate", "kbit", "of offered", "recalled", "bits / parameter"]]
    for name, runs in available(FITS, fitting, results).items():
        own, load = kilobits(runs, results), runs[0].load
        cells = [f"{load.number:,}", f"{load.number * load.exposures // BATCH_SIZE:,}", f"{runs[0].learning_rate:g}"]
        cells += [spread(own, ",.0f"), share_offered(runs, results), recalled(runs, results)]
        bound = "at least " if share_of_offered(runs, results) > FULL else ""
        per_parameter = f"{bound}{KBIT * mean(own) / costs(name).total.parameters:.2f}"
        rows.append([marked(name, runs, best(trials_that_fit(name, results), results)), *cells, per_parameter])
    return rows


def in_the_end_table(results: Results) -> list[list[str]]:
    """What dense has learned of the facts of the first table after many exposures, in two trials."""
    rows = [["dense, 100 exposures", "rate", "kbit", "of offered", "recalled", "bits / parameter"]]
    for run in available(("dense",), in_the_end, results).get("dense", []):
        (bits,) = kilobits([run], results)
        cells = [f"{run.learning_rate:g}", f"{bits:,.0f}", share_offered([run], results), recalled([run], results)]
        rows.append(["", *cells, f"{KBIT * bits / costs('dense').total.parameters:.2f}"])
    return rows


def entropies_table(results: Results) -> list[list[str]]:
    """What is learned of values of less entropy, as kilobits and a share of what is offered."""
    rows = [["kbit, by bits of a token", *map(str, ENTROPIES), f"{LEARNED.token_bits:g}"]]
    for name, runs in available(OF_ALL_ENTROPIES, of_all_entropies, results).items():
        cells = [f"{value:,.0f}" for value in kilobits(runs, results)]
        rows.append([name, *(f"{cell} ({share_offered([r], results)})" for cell, r in zip(cells, runs, strict=True))])
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


def times_table(results: Results, times: Times) -> list[list[str]]:
    """
    Times of each variant beside what it has learned: milliseconds of a training step, tokens per second in decoding,
    and bytes read per token.
    """
    rows = [["time", "kbit learned", "ms a step", "KB read per token", "tokens a second"]]
    found = available(VARIANTS, learning, results)
    for name, speed in times.get("tokens_per_second", {}).items():
        kbit = f"{mean(kilobits(found[name], results)):,.0f}" if name in found else ""
        step = f"{1e3 * times['seconds_per_step'][name]:.1f}"
        rows.append([name, kbit, step, f"{costs(name).weight_bytes_read / 1e3:,.0f}", f"{speed:.0f}"])
    return rows


TABLES = (
    learned_table,
    memories_table,
    more_table,
    trials_table,
    unsteady_table,
    controls_table,
    narrow_table,
    forgetting_table,
    mixed_table,
    fits_table,
    entropies_table,
    in_the_end_table,
)


def describe(results: Results, times: Times) -> str:
    """All tables that have a row."""
    tables = [*(table(results) for table in TABLES), times_table(results, times)]
    return "\n\n".join(markdown_table(rows) for rows in tables if len(rows) > 1)


def plot(results: Results, file: Path) -> None:
    """Plot what is learned at equal FLOPs, and what second facts leave of first ones, once dense is finished."""
    if better_dense(available(DENSE, learning, results), results) is None:
        return
    has_second = bool(available(ARM_TRIALS, forgetting, results))
    figure = new_figure(11 if has_second else 6, 4.4)
    axes = figure.subplots(1, 1 + has_second, squeeze=False)[0]
    _plot_learned(results, axes[0])
    if has_second:
        _plot_forgetting(results, axes[1])
    save_picture(figure, file)


def draw_bars(results: Results, axes: Axes) -> None:
    """Draw bars of what is learned at equal FLOPs, for the finished variants of `MAIN` except `mlp`."""
    names = sorted((name for name in MAIN if name != "mlp"), key=lambda name: costs(name).total.parameters)
    found = available(names, learning, results)
    kinds = {name: name.partition("-")[::2] for name in found}
    labels = []
    for name, (kind, size) in kinds.items():
        parts = [look_of(kind).label, f"{costs(name).total.parameters / 1e6:.1f} M"]
        parts[1:1] = [f"{int(size):,} {'rows' if kind == 'pkm' else 'experts'}"] if size else []
        labels.append(", ".join(parts))
    bits = [mean(kilobits(runs, results)) for runs in found.values()]
    bars = axes.barh(labels[::-1], bits[::-1], color=[look_of(kind).color for kind, _ in kinds.values()][::-1])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_xlabel("kbit of random facts learned in 16 exposures, of 2,097")
    axes.set_title(_finding(found, results))


def _finding(found: dict[str, list[Run]], results: Results) -> str:
    """A title of two lines: what experts and a memory of as many parameters learn, relative to dense."""
    memory, experts = list(AS_MANY_PARAMETERS.items())[-1]
    middle = interval_of_ratio(*(kilobits(found[name], results) for name in (experts, "dense")))[1]
    least = interval_of_ratio(*(kilobits(found[name], results) for name in (memory, "dense")))[0]
    number = int(experts.partition("-")[2])
    return (
        f"At equal FLOPs {number:,} experts a layer learn {middle:.0f} times\n"
        f"as much as dense, a product-key memory at least {math.floor(least)} times"
    )


def _plot_learned(results: Results, axes: Axes) -> None:
    found = available(AT_EQUAL_FLOPS, learning, results)
    bits = {name: mean(kilobits(runs, results)) for name, runs in found.items()}
    for kind, look in (("dense", "dense"), ("moe", "moe-token-choice"), ("pkm", "pkm"), ("peer", "peer")):
        if not (own := [name for name in bits if name.partition("-")[0] == kind]):
            continue
        places = [costs(name).total.parameters / 1e6 for name in own]
        axes.plot(places, [bits[name] for name in own], **look_of(look).style, label=look_of(look).label)
        for name, place in zip(own, places, strict=True):
            number = name.partition("-")[2]
            text = f"{int(number):,}" if number else ""
            axes.annotate(text, (place, bits[name]), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(
        LEARNED.number * VALUE_TOKENS * LEARNED.token_bits / KBIT, color="black", linewidth=0.8, linestyle=":"
    )
    add_legend(axes, loc="upper left")
    axes.set(
        xscale="log", xlabel="parameters in all, M; numbers: experts or rows a layer", ylabel="kbit of facts learned"
    )
    if bits.keys() >= {*COMPARED}:
        axes.set_title(_finding(found, results), fontsize=10)


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
