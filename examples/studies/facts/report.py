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
"""What comes of the runs that learn facts: measures along each, the comparison at equal learning, a table, a picture."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.machine import machine
from studies.common.tables import markdown_table, settings_cell, spread_cell


# Of the most that every arm learned with some setting: another seed may learn a little less.
LEVEL_SHARE = 0.95

# What sparse memory finetuning is said to leave of this (arXiv 2510.15103): drops of a question answering score.
PUBLISHED_DROPS = {"full": 89, "lora": 71, "sparse": 11}

# Its forgetting as a share of another arm's, at most.
AIMS = {"full": 1 / 10, "lora": 1 / 3}

FORGETTING = {
    "texts": "texts, nats",
    "known_loss": "known, nats",
    "known_drop": "known, % of matches",
}


def curve_of(run: dict[str, Any]) -> list[dict[str, float]]:
    """
    Learning and forgetting at each point of a run, the model before it the first. `learning`: nats per token of the new
    facts' answers, after sentences that no training saw, below that model. Forgetting: the rise of the mean loss of `texts`;
    of that of the known facts' answers, `known_loss`; and how many percent fewer of them are said, `known_drop`.
    """
    first = run["points"][0]
    return [
        {
            "learning": first["new"]["loss"] - point["new"]["loss"],
            "texts": mean(point["texts"][name] - first["texts"][name] for name in first["texts"]),
            "known_loss": point["known"]["loss"] - first["known"]["loss"],
            "known_drop": 100 * (1 - point["known"]["matches"] / first["known"]["matches"]),
        }
        for point in run["points"]
    ]


def most_learned(run: dict[str, Any]) -> float:
    return max(point["learning"] for point in curve_of(run))


def forgetting_at(level: float, run: dict[str, Any]) -> dict[str, float] | None:
    """What a run had forgotten when it had first learned so much, linearly between two points; `None` if it never had."""
    curve = curve_of(run)
    reached = next((i for i, point in enumerate(curve) if point["learning"] >= level), None)
    if reached is None:
        return None
    before, after = curve[max(reached - 1, 0)], curve[reached]
    distance = after["learning"] - before["learning"]
    share = (level - before["learning"]) / distance if distance else 1.0
    return {name: before[name] + share * (after[name] - before[name]) for name in FORGETTING}


def choose_settings(runs: list[dict[str, Any]]) -> tuple[float, dict[str, dict[str, float]]]:
    """
    The level of learning at which arms are compared, a little below the most that every arm reached with some setting; and of
    each arm the settings whose loss of known facts' answers and of texts, added up, was least there.
    """
    arms = dict.fromkeys(run["arm"] for run in runs)
    of_arm = {arm: [run for run in runs if run["arm"] == arm and run["seed"] == 0] for arm in arms}
    level = LEVEL_SHARE * min(max(map(most_learned, swept)) for swept in of_arm.values())
    chosen = {}
    for arm, swept in of_arm.items():
        reached = [(forgetting, run) for run in swept if (forgetting := forgetting_at(level, run)) is not None]
        chosen[arm] = min(reached, key=lambda pair: pair[0]["known_loss"] + pair[0]["texts"])[1]["settings"]
    return level, chosen


def _spread(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean of each measure, and its standard deviation if there are several."""
    return {
        "mean": {name: mean(row[name] for row in rows) for name in (rows[0] if rows else ())},
        "deviation": {name: stdev(row[name] for row in rows) for name in (rows[0] if len(rows) > 1 else ())},
    }


def _end_of(run):
    last = run["points"][-1]
    return {
        "learning": curve_of(run)[-1]["learning"],
        "new_loss": last["new"]["loss"],
        "new_matches": 100 * last["new"]["matches"],
        "known_matches": 100 * last["known"]["matches"],
        **{name: curve_of(run)[-1][name] for name in FORGETTING},
    }


def summarize(
    runs: list[dict[str, Any]],
    labels: dict[str, str],
    level: float,
    chosen: dict[str, dict[str, float]],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """All figures of the study, with what they were made by."""
    summary: dict[str, Any] = {
        "command": "python examples/lifelong_facts.py",
        "arguments": arguments,
        "machine": machine(),
        "seconds": sum(run["seconds"] for run in runs),
        "equal_learning": level,
        "published_drops": PUBLISHED_DROPS,
        "arms": {},
        "runs": runs,
    }
    for arm, settings in chosen.items():
        best = [run for run in runs if run["arm"] == arm and run["settings"] == settings]
        reached = [forgetting for run in best if (forgetting := forgetting_at(level, run)) is not None]
        summary["arms"][arm] = {
            "label": labels[arm],
            "settings": settings,
            "seeds": sorted(run["seed"] for run in best),
            "seeds_that_learned_as_much": len(reached),
            "end": _spread([_end_of(run) for run in best]),
            "at_equal_learning": _spread(reached),
            "without_adapter_as_before": [run["without_adapter_as_before"] for run in best],
        }
    summary["shares"] = shares(summary)
    return summary


def shares(summary: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """
    Of each forgetting at equal learning that of each way to train a graft as a share of full finetuning's and of LoRA's, where
    these forgot anything.
    """
    means = {arm: result["at_equal_learning"]["mean"] for arm, result in summary["arms"].items()}
    return {
        arm: {
            other: {name: means[arm][name] / means[other][name] for name in FORGETTING if means[other][name] > 0}
            for other in AIMS
            if other in means
        }
        for arm in means
        if arm not in AIMS
    }


AT_THE_END = {"new_loss": "new, nats", "new_matches": "new said, %", "known_matches": "known said, %", **FORGETTING}


def describe(summary: dict[str, Any]) -> str:
    """The tables of a study."""
    arms = summary["arms"].values()
    return "\n\n".join(
        [
            f"Forgetting at equal learning, {summary['equal_learning']:.2f} nats per token, mean ± deviation of seeds, beside "
            "the published drop of a question answering score (arXiv 2510.15103):",
            table_at_equal_learning(summary),
            "That of grafts as a share of that of others, where these forgot anything:",
            _table_of_shares(summary),
            "At the end of the training:",
            markdown_table(
                [["", *AT_THE_END.values()], *([each["label"], *_cells(each["end"], AT_THE_END)] for each in arms)]
            ),
        ]
    )


def table_at_equal_learning(summary: dict[str, Any]) -> str:
    """Forgetting of each arm, by each measure."""
    rows = [["", *FORGETTING.values(), "published, %", "seeds", "settings"]]
    for arm, result in summary["arms"].items():
        seeds = f"{result['seeds_that_learned_as_much']} of {len(result['seeds'])}"
        published = str(PUBLISHED_DROPS.get(arm, ""))
        rows.append(
            [
                result["label"],
                *_cells(result["at_equal_learning"], FORGETTING),
                published,
                seeds,
                settings_cell(result["settings"]),
            ]
        )
    return markdown_table(rows)


def _table_of_shares(summary):
    rows = [["", *FORGETTING.values(), "aim, at most"]]
    for arm, others in summary["shares"].items():
        for other, values in others.items():
            cells = [f"{values[name]:.0%}" if name in values else "" for name in FORGETTING]
            labels = (summary["arms"][each]["label"] for each in (arm, other))
            rows.append([" / ".join(labels), *cells, f"{AIMS[other]:.0%}"])
    return markdown_table(rows)


def _cells(spread, names):
    return [spread_cell(spread["mean"].get(name), spread["deviation"].get(name)) for name in names]


def plot(summary: dict[str, Any], file: Path) -> None:
    """Learning against forgetting of texts and of known facts, a curve for each run; and what is said at the end."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    texts, known, recall = figure.subplots(1, 3)
    _plot_curves(texts, summary, "texts")
    _plot_curves(known, summary, "known_drop")
    texts.set(ylabel="rise of loss, nats per token", title="Held-out general text")
    known.set(ylabel="fewer said, %", title="Facts that the model knew")
    results = list(summary["arms"].values())
    for i, (name, label) in enumerate({"new_matches": "new facts", "known_matches": "known facts"}.items()):
        recall.bar(
            [position + 0.4 * i for position in range(len(results))],
            [result["end"]["mean"][name] for result in results],
            0.4,
            yerr=[result["end"]["deviation"].get(name, 0.0) for result in results],
            label=label,
        )
    recall.set_xticks([position + 0.2 for position in range(len(results))], [each["label"] for each in results])
    recall.tick_params(axis="x", labelrotation=15)
    recall.set(ylabel="said word for word, %", title="At the end, asked otherwise than taught")
    recall.legend(fontsize=8)
    recall.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def _plot_curves(axes: Axes, summary: dict[str, Any], name: str) -> None:
    for i, (arm, result) in enumerate(summary["arms"].items()):
        for run in (run for run in summary["runs"] if run["arm"] == arm):
            best = run["settings"] == result["settings"]
            axes.plot(
                [point["learning"] for point in curve_of(run)],
                [point[name] for point in curve_of(run)],
                marker="o" if best else None,
                color=f"C{i}",
                alpha=1.0 if best else 0.3,
                label=result["label"] if best and run["seed"] == 0 else None,
            )
    axes.axvline(summary["equal_learning"], color="gray", linestyle=":", label="equal learning")
    axes.set(xlabel="learning: nats per token below the model before")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
