# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Results of the study of streams: measures, the comparison at equal learning, tables and plots."""

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import SubFigure

from common.machine import machine
from common.pictures import TRAININGS, add_legend, new_figure, save_picture
from studies.common.tables import markdown_table
from studies.stream.arms import ARMS


# Relative distance from the level of learning within which a run counts as being at that level.
TOLERANCE = 0.05

# The ratio of a learning rate beyond the sweep to the one before, and how many of them a family may get.
RATE_STEP, MOST_RATES_BEYOND = 3, 2


def losses_to_choose_by(run: dict[str, Any]) -> list[list[float]]:
    """
    The losses of a run by which hyperparameters are chosen, on other held-out documents than the reported losses. Runs
    made before the held-out text was divided have the same losses for both.
    """
    return run.get("losses_to_choose_by", run["losses"])


def learning_of(losses: list[list[float]]) -> float:
    """
    Mean over texts of how much lower the loss is right after learning the text than in the pre-trained model, in nats.
    """
    return mean(losses[0][i] - losses[i][i] for i in range(1, len(losses)))


def forgetting_of(losses: list[list[float]]) -> float:
    """Mean over all texts but the last of how much the loss has risen since the text was learned, in nats."""
    last = len(losses) - 1
    return mean(losses[last][i] - losses[i][i] for i in range(last))


def measures(run: dict[str, Any]) -> dict[str, float]:
    """
    Computes the measures of a run from `losses[i][j]`, the loss of text j after stage i; text 0 and stage 0 are those
    of the pre-training (Lopez-Paz & Ranzato, arXiv 1706.08840, with losses in place of accuracies).
    """
    losses = run["losses"]
    last = len(losses) - 1
    result = {
        "learning": learning_of(losses),
        "forgetting": forgetting_of(losses),
        "forgetting_of_pretraining": losses[last][0] - losses[0][0],
        "final_mean": mean(losses[last]),
    }
    result["backward_transfer"] = -result["forgetting"]
    if last > 1:
        result["forward_transfer"] = mean(losses[0][i] - losses[i - 1][i] for i in range(2, last + 1))
    if run["masked"]:
        result["forgetting_of_pretraining_masked"] = run["masked"][-1][0] - losses[0][0]
    return result


def choose_hyperparameters(runs: list[dict[str, Any]]) -> tuple[float, dict[str, dict[str, float]]]:
    """
    Chooses the level of learning at which arms are compared, and the hyperparameters with which each arm reaches it,
    all by the losses of [`losses_to_choose_by`].

    The level is the highest that every arm reached with some hyperparameters. Runs of an arm whose hyperparameters
    differ only in the learning rate form a family. The family that would forget least at the level is chosen, with the
    learning rate, interpolated between its runs, that leads to the level.
    """
    of_arm = _runs_of_arms(runs)
    level = min(max(map(_learned, own)) for own in of_arm.values())
    chosen = {}
    for arm, own in of_arm.items():
        found = [(_at_level(level, family), rest) for rest, family in families_of(own)]
        reached = [(at_level, rest) for at_level, rest in found if at_level is not None]
        (rate, _), rest = min(reached, key=lambda pair: pair[0][1])
        chosen[arm] = {"learning_rate": rate, **rest}
    return level, chosen


def rates_beyond(runs: list[dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """
    Further hyperparameters for the arm that learned least, so that the end of its sweep does not set the level of
    learning. Each family that learned most with its highest learning rate gets one that is `RATE_STEP` times as high,
    up to `MOST_RATES_BEYOND` that its arm does not sweep.
    """
    of_arm = _runs_of_arms(runs)
    arm = min(of_arm, key=lambda arm: max(map(_learned, of_arm[arm])))
    further = []
    for rest, family in families_of(of_arm[arm]):
        beyond = sum(run["settings"] not in ARMS[arm].sweep for run in family)
        if max(family, key=_learned) is family[-1] and beyond < MOST_RATES_BEYOND:
            rate = float(f"{RATE_STEP * family[-1]['settings']['learning_rate']:.2g}")
            further.append((arm, {"learning_rate": rate, **rest}))
    return further


def _runs_of_arms(runs):
    return {arm: [run for run in runs if run["arm"] == arm] for arm in dict.fromkeys(run["arm"] for run in runs)}


def _learned(run):
    """How much a run learned, by the losses to choose by; minus infinity if it diverged."""
    learned = learning_of(losses_to_choose_by(run))
    return learned if math.isfinite(learned) else -math.inf


def families_of(runs: list[dict[str, Any]]) -> list[tuple[dict[str, float], list[dict[str, Any]]]]:
    """
    Families of runs that differ only in the learning rate, in ascending order of it. Each family comes with its other
    hyperparameters.
    """
    families: list[tuple[dict[str, float], list[dict[str, Any]]]] = []
    for run in sorted(runs, key=lambda run: run["settings"]["learning_rate"]):
        rest = {name: value for name, value in run["settings"].items() if name != "learning_rate"}
        family = next((family for others, family in families if others == rest), None)
        if family is None:
            families.append((rest, [run]))
        else:
            family.append(run)
    return families


def _at_level(level: float, family: list[dict[str, Any]]) -> tuple[float, float] | None:
    """
    Returns the learning rate with which a family of runs reaches a level of learning, and its forgetting there.

    If a run is within `TOLERANCE` of the level, both are those of the nearest run. Otherwise the logarithm of the rate
    is interpolated linearly in what was learned, between the two runs around the level or nearest to it, and rounded
    to two digits. Forgetting is interpolated in the same way; below all runs, from the point of no learning and no
    forgetting. Rates above the one that learns most are left out. Returns `None` if no run learned as much.
    """
    found = []
    for run in family:
        forgotten = forgetting_of(losses_to_choose_by(run))
        found.append((_learned(run), run["settings"]["learning_rate"], forgotten))
    most = max(range(len(found)), key=lambda i: found[i][0])
    points = sorted(found[: most + 1])
    nearest = min(points, key=lambda point: abs(point[0] - level))
    if abs(nearest[0] - level) <= TOLERANCE * level:
        return nearest[1:]
    above = next((i for i, point in enumerate(points) if point[0] >= level), None)
    if above is None or len(points) == 1:
        return None if above is None else nearest[1:]
    (left, slow, lower), (right, fast, upper) = points[max(above, 1) - 1 : max(above, 1) + 1]
    share = (level - left) / (right - left)
    rate = math.exp(math.log(slow) + share * (math.log(fast) - math.log(slow)))
    forgotten = lower + share * (upper - lower) if above else lower * level / left
    return float(f"{rate:.2g}"), forgotten


def summarize(
    runs: list[dict[str, Any]],
    names: list[str],
    level: float,
    chosen: dict[str, dict[str, float]],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """
    Sums up all figures of the study, together with the runs and arguments that they come from.
    """
    summary: dict[str, Any] = {
        "command": "./run study stream",
        "seconds": sum(run["seconds"] for run in runs),
        "texts": names,
        "arguments": arguments,
        "machine": machine(),
        "equal_learning": level,
        "arms": {},
        "runs": runs,
    }
    for arm, hyperparameters in chosen.items():
        own = [run for run in runs if run["arm"] == arm and run["settings"] == hyperparameters]
        summary["arms"][arm] = {"settings": hyperparameters, **_spread([measures(run) for run in own])}
    return summary


def _spread(found):
    """The mean of each measure over seeds, and its standard deviation if there are several."""
    return {
        "seeds": len(found),
        "mean": {name: mean(each[name] for each in found) for name in found[0]},
        "deviation": {name: stdev(each[name] for each in found) for name in found[0]} if len(found) > 1 else {},
    }


COLUMNS = {
    "learning": "learning",
    "forgetting": "forgetting",
    "forgetting_of_pretraining": "forgetting of pre-training",
    "forgetting_of_pretraining_masked": "the same, masked",
    "forward_transfer": "forward transfer",
    "final_mean": "final mean",
}


def describe(summary: dict[str, Any]) -> str:
    """The table of all measures."""
    rows = [["nats per token", *COLUMNS.values(), "hyperparameters"]]
    for arm, result in summary["arms"].items():
        cells = [_cell(result, name) for name in COLUMNS]
        settings = ", ".join(f"{name} {value:g}" for name, value in result["settings"].items())
        rows.append([ARMS[arm].label, *cells, settings])
    return markdown_table(rows)


def describe_shares(summary: dict[str, Any]) -> str:
    """The table of learning and forgetting, the latter also as a share of that of full finetuning and of LoRA."""
    references = [arm for arm in ("full", "lora") if arm in summary["arms"]]
    forgetting = {arm: result["mean"]["forgetting"] for arm, result in summary["arms"].items()}
    shown = ("learning", "forgetting")
    rows = [["", *shown, *(f"relative to {ARMS[arm].label}" for arm in references)]]
    for arm, result in summary["arms"].items():
        shares = [f"{forgetting[arm] / forgetting[other]:.0%}" for other in references]
        rows.append([ARMS[arm].label, *(_cell(result, name) for name in shown), *shares])
    return markdown_table(rows)


def _cell(result, name):
    values = (result[kind].get(name) for kind in ("mean", "deviation"))
    return " ± ".join(f"{value:.3f}" for value in values if value is not None)


def plot(summary: dict[str, Any], file: Path) -> None:
    """
    Plots learning against forgetting, one curve per family of runs; the loss of the text of the pre-training along the
    stream; and, for each arm, the losses of all texts after each stage.
    """
    figure = new_figure(14, 9.5)
    curves, matrices = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    trade_off, stream = curves.subplots(1, 2)
    best = {}
    for arm, result in summary["arms"].items():
        first_seed = [run for run in summary["runs"] if (run["arm"], run["seed"]) == (arm, 0)]
        best[arm] = next(run for run in first_seed if run["settings"] == result["settings"])
        style = TRAININGS[arm].style
        for i, (_, family) in enumerate(families_of(first_seed)):
            found = [measures(run) for run in family]
            points = [[each[name] for each in found] for name in ("learning", "forgetting")]
            trade_off.plot(*points, **style, label=None if i else ARMS[arm].label)
        stream.plot([row[0] for row in best[arm]["losses"]], **style, label=ARMS[arm].label)
    trade_off.axvline(summary["equal_learning"], color="gray", linestyle=":", label="equal learning")
    trade_off.set(
        xlabel="learning: nats per token below the pre-trained model",
        ylabel="forgetting, nats per token",
        title="What was learned, and what it cost, seed 0;\na line for each family of hyperparameters",
    )
    stream.set_xticks(range(len(summary["texts"])), summary["texts"])
    stream.set(xlabel="after learning", ylabel="loss, nats per token")
    stream.set_title("Held-out text of the pre-training, seed 0")
    for axes in (trade_off, stream):
        add_legend(axes)
    _plot_matrices(matrices, best, summary["texts"])
    save_picture(figure, file)


def _plot_matrices(figure: SubFigure, best: dict[str, dict[str, Any]], texts: list[str]) -> None:
    """Plots one matrix of losses per arm: rows are stages, columns are texts."""
    low = min(loss for run in best.values() for row in run["losses"] for loss in row)
    high = max(loss for run in best.values() for row in run["losses"] for loss in row)
    figure.suptitle("Loss of each text (columns) after learning each (rows), seed 0")
    for i, (axes, (arm, run)) in enumerate(
        zip(figure.subplots(1, len(best), squeeze=False)[0], best.items(), strict=True)
    ):
        axes.imshow(run["losses"], vmin=low, vmax=high, cmap="viridis")
        for row, losses in enumerate(run["losses"]):
            for column, loss in enumerate(losses):
                color = "white" if loss < (low + high) / 2 else "black"
                axes.text(column, row, f"{loss:.1f}", ha="center", va="center", color=color, fontsize=7)
        axes.set_title(ARMS[arm].label.replace(", ", ",\n"), fontsize=8)
        axes.set_xticks(range(len(texts)), texts, rotation=90, fontsize=7)
        axes.set_yticks(range(len(texts)), texts if i == 0 else [], fontsize=7)
