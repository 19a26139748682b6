# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What comes of the lifelong-learning runs: measures, the comparison at equal learning, a table, a picture."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lifelong_arms import ARMS
from matplotlib.figure import Figure, SubFigure
from studies import machine, markdown_table, spread_cell


COLORS = dict(zip(ARMS, [f"C{i}" for i in range(10)], strict=False))


def learning_of(run: dict[str, Any]) -> float:
    """How much lower each text's loss is right after it was learned than in the pre-trained model, in the mean, in nats."""
    losses = run["losses"]
    return mean(losses[0][i] - losses[i][i] for i in range(1, len(losses)))


def measures(run: dict[str, Any]) -> dict[str, float]:
    """
    Measures of a run, from `losses[i][j]`, the loss of text j after stage i, text and stage 0 those of the pre-training
    (Lopez-Paz & Ranzato, arXiv 1706.08840, in losses for accuracies).
    """
    losses = run["losses"]
    last = len(losses) - 1
    result = {
        "learning": learning_of(run),
        "forgetting": mean(losses[last][i] - losses[i][i] for i in range(last)),
        "forgetting_of_pretraining": losses[last][0] - losses[0][0],
        "final_mean": mean(losses[last]),
    }
    result["backward_transfer"] = -result["forgetting"]
    if last > 1:
        result["forward_transfer"] = mean(losses[0][i] - losses[i - 1][i] for i in range(2, last + 1))
    if run["masked"]:
        result["forgetting_of_pretraining_masked"] = run["masked"][-1][0] - losses[0][0]
    return result


def choose_settings(runs: list[dict[str, Any]]) -> tuple[float, dict[str, dict[str, float]]]:
    """
    The level of learning at which arms are compared, the most that every arm reached with some setting, and of each arm the
    settings that forgot least of those that reached it.
    """
    arms = dict.fromkeys(run["arm"] for run in runs)
    of_arm = {arm: [run for run in runs if run["arm"] == arm and run["seed"] == 0] for arm in arms}
    level = min(max(map(learning_of, swept)) for swept in of_arm.values())
    chosen = {}
    for arm, swept in of_arm.items():
        reached = [run for run in swept if learning_of(run) >= level]
        chosen[arm] = min(reached, key=lambda run: measures(run)["forgetting"])["settings"]
    return level, chosen


def forgetting_at(level: float, points: list[tuple[float, float]]) -> float | None:
    """
    Forgetting at a level of learning, linearly between the two runs `(learning, forgetting)` around it; from no learning
    and no forgetting to the first. `None` if no run learned so much.
    """
    candidates = []
    points = [(0.0, 0.0), *sorted(points)]
    for i, (left, lower) in enumerate(points):
        for right, upper in points[i + 1 :]:
            if left <= level <= right and right > left:
                candidates.append(lower + (upper - lower) * (level - left) / (right - left))
    return min(candidates, default=None)


def summarize(
    runs: list[dict[str, Any]],
    names: list[str],
    level: float,
    chosen: dict[str, dict[str, float]],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """All figures of the study, with what they were made by."""
    summary: dict[str, Any] = {
        "command": "python examples/lifelong_stream.py",
        "seconds": sum(run["seconds"] for run in runs),
        "texts": names,
        "arguments": arguments,
        "machine": machine(),
        "equal_learning": level,
        "arms": {},
        "runs": runs,
    }
    for arm, settings in chosen.items():
        own = [run for run in runs if run["arm"] == arm]
        best = [measures(run) for run in own if run["settings"] == settings]
        swept = [measures(run) for run in own if run["seed"] == 0]
        points = [(each["learning"], each["forgetting"]) for each in swept]
        summary["arms"][arm] = {
            "settings": settings,
            "seeds": len(best),
            "mean": {name: mean(each[name] for each in best) for name in best[0]},
            "deviation": {name: stdev([each[name] for each in best]) for name in best[0]} if len(best) > 1 else {},
            "forgetting_at_equal_learning": forgetting_at(level, points),
        }
    return summary


COLUMNS = {
    "learning": "learning",
    "forgetting": "forgetting",
    "forgetting_of_pretraining": "of pre-training",
    "forgetting_of_pretraining_masked": "the same, masked",
    "forward_transfer": "forward transfer",
    "final_mean": "final mean",
}


def describe(summary: dict[str, Any]) -> str:
    """The tables of a study."""
    return "\n\n".join(
        [
            f"At equal learning, {summary['equal_learning']:.3f} nats per token, one seed, between the settings swept:",
            _table_at_equal_learning(summary["arms"]),
            "At the settings that forgot least of those that learned as much, mean ± deviation of seeds, nats per token; backward "
            "transfer is forgetting with the other sign:",
            _table_of_measures(summary["arms"]),
        ]
    )


def _table_at_equal_learning(arms):
    forgetting = {arm: result["forgetting_at_equal_learning"] for arm, result in arms.items()}
    references = {name: forgetting[name] for name in ("full", "lora") if forgetting.get(name)}
    rows = [["", "forgetting, nats", *(f"of that of {ARMS[name].label}" for name in references)]]
    for arm, value in forgetting.items():
        shares = ("" if value is None else f"{value / reference:.0%}" for reference in references.values())
        rows.append([ARMS[arm].label, spread_cell(value, None), *shares])
    return markdown_table(rows)


def _table_of_measures(arms):
    rows = [["", *COLUMNS.values(), "seeds", "settings"]]
    for arm, result in arms.items():
        cells = [spread_cell(result["mean"].get(name), result["deviation"].get(name)) for name in COLUMNS]
        settings = ", ".join(f"{name} {value:g}" for name, value in result["settings"].items())
        rows.append([ARMS[arm].label, *cells, str(result["seeds"]), settings])
    return markdown_table(rows)


def plot(summary: dict[str, Any], file: Path) -> None:
    """
    Learning against forgetting, a curve for each arm; the loss of the pre-training's text along the stream; and of each arm
    the losses of all texts after each.
    """
    figure = Figure(figsize=(14, 9), layout="constrained")
    curves, matrices = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    trade_off, stream = curves.subplots(1, 2)
    best = {}
    for arm, result in summary["arms"].items():
        swept = [run for run in summary["runs"] if run["arm"] == arm and run["seed"] == 0]
        best[arm] = next(run for run in swept if run["settings"] == result["settings"])
        points = sorted((measures(run)["learning"], measures(run)["forgetting"]) for run in swept)
        style = {"marker": "o", "color": COLORS[arm], "label": ARMS[arm].label}
        trade_off.plot(*zip(*points, strict=True), **style)
        stream.plot([row[0] for row in best[arm]["losses"]], **style)
    trade_off.axvline(summary["equal_learning"], color="gray", linestyle=":", label="equal learning")
    trade_off.set(
        xlabel="learning: nats per token below the pre-trained model",
        ylabel="forgetting, nats per token",
        title="What was learned, and what it cost",
    )
    stream.set_xticks(range(len(summary["texts"])), summary["texts"])
    stream.set(xlabel="after learning", ylabel="loss, nats per token", title="Held-out text of the pre-training")
    for axes in (trade_off, stream):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _plot_matrices(matrices, best, summary["texts"])
    figure.savefig(file, dpi=120)


def _plot_matrices(figure: SubFigure, best: dict[str, dict[str, Any]], texts: list[str]) -> None:
    """Rows are stages, columns texts."""
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
        axes.set_title(ARMS[arm].label, fontsize=8)
        axes.set_xticks(range(len(texts)), texts, rotation=90, fontsize=7)
        axes.set_yticks(range(len(texts)), texts if i == 0 else [], fontsize=7)
