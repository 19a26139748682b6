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
from matplotlib.figure import Figure
from studies import machine


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


def describe(summary: dict[str, Any]) -> str:
    """The table of a study."""
    columns = {
        "learning": "learning",
        "forgetting": "forgetting",
        "forgetting_of_pretraining": "… of pre-training",
        "forgetting_of_pretraining_masked": "… masked",
        "forward_transfer": "forward",
        "final_mean": "final mean",
    }
    at_equal = {arm: result["forgetting_at_equal_learning"] for arm, result in summary["arms"].items()}
    titles = [*columns.values(), "at equal learning", "of full finetuning's"]
    lines = [f"{'':<28}" + "".join(f"{title:>21}" for title in titles)]
    for arm, result in summary["arms"].items():
        cells = []
        for name in columns:
            value, deviation = result["mean"].get(name), result["deviation"].get(name)
            cells.append("" if value is None else f"{value:.3f}" + (f" ± {deviation:.3f}" if deviation else ""))
        cells.append("" if at_equal[arm] is None else f"{at_equal[arm]:.3f}")
        cells.append(f"{at_equal[arm] / at_equal['full']:.0%}" if at_equal[arm] and at_equal.get("full") else "")
        lines.append(f"{ARMS[arm].label:<28}" + "".join(f"{cell:>21}" for cell in cells))
    lines.append(f"\nNats per token; equal learning is {summary['equal_learning']:.3f}.")
    return "\n".join(lines)


def plot(summary: dict[str, Any], file: Path) -> None:
    """Learning against forgetting, a curve for each arm, and the loss of the pre-training's text along the stream."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    trade_off, stream = figure.subplots(1, 2)
    for arm, result in summary["arms"].items():
        swept = sorted(
            (measures(run)["learning"], measures(run)["forgetting"])
            for run in summary["runs"]
            if run["arm"] == arm and run["seed"] == 0
        )
        trade_off.plot(*zip(*swept, strict=True), marker="o", color=COLORS[arm], label=ARMS[arm].label)
        best = next(run for run in summary["runs"] if run["arm"] == arm and run["settings"] == result["settings"])
        stream.plot([row[0] for row in best["losses"]], marker="o", color=COLORS[arm], label=ARMS[arm].label)
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
    figure.savefig(file, dpi=150)
