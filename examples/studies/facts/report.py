# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Results of the study of facts: measures along each run, the comparison at equal learning, tables and plots."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes

from common.machine import machine
from common.pictures import NEUTRAL, TRAININGS, add_legend, new_figure, save_picture
from studies.common.study_folder import read_json
from studies.common.tables import hyperparameters_cell, markdown_table, spread_cell


# Share of the most that every arm learned with some hyperparameters: another seed may learn a little less.
LEVEL_SHARE = 0.95

# Published drops of a question answering score, in percent, of sparse memory finetuning and others (arXiv 2510.15103).
PUBLISHED_DROPS = {"full": 89, "lora": 71, "sparse": 11}

# Aims: the forgetting of a graft as a share of that of another arm, at most.
AIMS = {"full": 1 / 10, "lora": 1 / 3}

# Kinds of known facts in tables: those of relations that are taught, and of relations that a study does not teach.
KNOWN = {"known": "known", "known_elsewhere": "known elsewhere"}


def known_kinds(run: dict[str, Any]) -> dict[str, str]:
    """The kinds of known facts that a run was asked, and their labels; without `--untaught_relations` it is one."""
    return {kind: label for kind, label in KNOWN.items() if kind in run["points"][0]}


def forgetting_labels(run: dict[str, Any]) -> dict[str, str]:
    """The measures of forgetting of a run, and their labels."""
    labels = {"texts": "texts, nats"}
    for kind, label in known_kinds(run).items():
        labels |= {f"{kind}_loss": f"{label}, nats", f"{kind}_drop": f"{label}, % of matches"}
    return labels


def curve_of(run: dict[str, Any]) -> list[dict[str, float]]:
    """
    Learning and forgetting at each measured point of a run; the first point is the base model.

    `learning` is how far the loss of the new answers, in sentences that were not trained on, is below that of the base
    model. Forgetting is the rise of the mean loss of the `texts` and, for each kind of known facts, the rise of the loss
    of their answers (`known_loss`, `known_elsewhere_loss`), and by how many percent fewer of these are matched
    (`known_drop`, `known_elsewhere_drop`). Losses are in nats per token.
    """
    first = run["points"][0]
    curve = []
    for point in run["points"]:
        measures = {
            "learning": first["new"]["loss"] - point["new"]["loss"],
            "texts": mean(point["texts"][name] - first["texts"][name] for name in first["texts"]),
        }
        for kind in known_kinds(run):
            measures[f"{kind}_loss"] = point[kind]["loss"] - first[kind]["loss"]
            measures[f"{kind}_drop"] = 100 * (1 - point[kind]["matches"] / first[kind]["matches"])
        curve.append(measures)
    return curve


def most_learned(run: dict[str, Any]) -> float:
    """The highest learning at any point of a run."""
    return max(point["learning"] for point in curve_of(run))


def forgetting_at(level: float, run: dict[str, Any]) -> dict[str, float] | None:
    """
    Forgetting of a run where it first reached a level of learning, interpolated linearly. `None` if it never did.
    """
    curve = curve_of(run)
    reached = next((i for i, point in enumerate(curve) if point["learning"] >= level), None)
    if reached is None:
        return None
    before, after = curve[max(reached - 1, 0)], curve[reached]
    distance = after["learning"] - before["learning"]
    share = (level - before["learning"]) / distance if distance else 1.0
    return {name: before[name] + share * (after[name] - before[name]) for name in forgetting_labels(run)}


def choose_hyperparameters(runs: list[dict[str, Any]]) -> tuple[float, dict[str, dict[str, float]]]:
    """
    Chooses the level of learning at which arms are compared, and the hyperparameters of each arm.

    The level is `LEVEL_SHARE` of the highest that every arm reached with some hyperparameters. The chosen
    hyperparameters have the smallest sum of the two rises of loss there, that of known answers and that of texts.
    Facts that are known elsewhere have no part in the choice.
    """
    arms = dict.fromkeys(run["arm"] for run in runs)
    of_arm = {arm: [run for run in runs if run["arm"] == arm and run["seed"] == 0] for arm in arms}
    level = LEVEL_SHARE * min(max(map(most_learned, swept)) for swept in of_arm.values())
    chosen = {}
    for arm, swept in of_arm.items():
        reached = [(forgetting, run) for run in swept if (forgetting := forgetting_at(level, run)) is not None]
        chosen[arm] = min(reached, key=lambda pair: pair[0]["known_loss"] + pair[0]["texts"])[1]["settings"]
    return level, chosen


def read_chosen(file: Path, arms: dict[str, Any]) -> dict[str, dict[str, float]]:
    """
    Reads the hyperparameters that an earlier study of facts chose for each arm.

    Args:
        file (`Path`): The `results.json` of that study.
        arms (`dict[str, Any]`): Arms by name. The attribute `sweep` of an arm shows which hyperparameters it has.

    Raises:
        `ValueError`: if the file is no such results, or has no hyperparameters of one of the arms.
    """
    try:
        results = read_json(file)
        found = {arm: result["settings"] for arm, result in results["arms"].items()}
        earlier = results["arguments"].get("chosen")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--chosen must be a results.json of this study, got {file}: {error!r}.") from error
    if earlier:
        raise ValueError(f"--chosen must be of a study that chose, got {file}, whose choice is that of {earlier}.")
    if missing := [arm for arm in arms if arm not in found]:
        raise ValueError(f"--chosen must have all --arms, got {file} without {missing}: it has {list(found)}.")
    for name, arm in arms.items():
        if found[name].keys() != arm.sweep[0].keys():
            raise ValueError(
                f"--chosen must have the hyperparameters {list(arm.sweep[0])} of the arm {name!r}, got "
                f"{list(found[name])} in {file}: choose a results.json of this study."
            )
    return {name: found[name] for name in arms}


def level_of_all(runs: list[dict[str, Any]]) -> float:
    """The highest level of learning that all runs reached: where to compare arms that were not swept."""
    return min(map(most_learned, runs))


def _spread(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean of each measure over runs, and its standard deviation if there are several."""
    return {
        "mean": {name: mean(row[name] for row in rows) for name in (rows[0] if rows else ())},
        "deviation": {name: stdev(row[name] for row in rows) for name in (rows[0] if len(rows) > 1 else ())},
    }


def _end_of(run):
    last = run["points"][-1]
    return {
        "new_loss": last["new"]["loss"],
        "new_matches": 100 * last["new"]["matches"],
        **{f"{kind}_matches": 100 * last[kind]["matches"] for kind in known_kinds(run)},
        **curve_of(run)[-1],
    }


def summarize(
    runs: list[dict[str, Any]],
    labels: dict[str, str],
    level: float,
    chosen: dict[str, dict[str, float]],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Sums up all figures of the study, together with the runs and arguments that they come from."""
    summary: dict[str, Any] = {
        "command": "./run study facts",
        "arguments": arguments,
        "machine": machine(),
        "seconds": sum(run["seconds"] for run in runs),
        "equal_learning": level,
        "published_drops": PUBLISHED_DROPS,
        "arms": {},
        "runs": runs,
    }
    for arm, hyperparameters in chosen.items():
        best = [run for run in runs if run["arm"] == arm and run["settings"] == hyperparameters]
        reached = [forgetting for run in best if (forgetting := forgetting_at(level, run)) is not None]
        summary["arms"][arm] = {
            "label": labels[arm],
            "settings": hyperparameters,
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
    The forgetting of each way to train a graft at equal learning, as a share of that of full finetuning and of LoRA,
    for each measure in which these forgot anything.
    """
    means = {arm: result["at_equal_learning"]["mean"] for arm, result in summary["arms"].items()}
    return {
        arm: {
            other: {name: means[arm][name] / value for name, value in means[other].items() if value > 0}
            for other in AIMS
            if other in means
        }
        for arm in means
        if arm not in AIMS
    }


def describe(summary: dict[str, Any]) -> str:
    """All tables, each after a sentence that introduces it."""
    some_run = summary["runs"][0]
    at_the_end = {
        "new_loss": "new, nats",
        "new_matches": "new matches, %",
        **{f"{kind}_matches": f"{label} matches, %" for kind, label in known_kinds(some_run).items()},
        **forgetting_labels(some_run),
    }
    arms = summary["arms"].values()
    kinds = []
    if "known_elsewhere" in known_kinds(some_run):
        untaught = ", ".join(summary["arguments"]["untaught_relations"])
        kinds = [
            "Known facts are of relations that are taught, those known elsewhere of relations that are not; held out: "
            f"{untaught}."
        ]
    return "\n\n".join(
        [
            *kinds,
            f"Forgetting at equal learning, {summary['equal_learning']:.2f} nats per token, as mean ± standard "
            "deviation over seeds, beside the published drop of a question answering score (arXiv 2510.15103):",
            table_at_equal_learning(summary),
            "Forgetting of grafts as a share of that of the other arms, where these forgot anything:",
            _table_of_shares(summary),
            "At the end of training:",
            markdown_table(
                [["", *at_the_end.values()], *([each["label"], *_cells(each["end"], at_the_end)] for each in arms)]
            ),
        ]
    )


def table_at_equal_learning(summary: dict[str, Any]) -> str:
    """The table of forgetting at equal learning, by each measure."""
    forgetting = forgetting_labels(summary["runs"][0])
    rows = [["", *forgetting.values(), "published, %", "seeds", "hyperparameters"]]
    for arm, result in summary["arms"].items():
        seeds = f"{result['seeds_that_learned_as_much']} of {len(result['seeds'])}"
        published = str(PUBLISHED_DROPS.get(arm, ""))
        rows.append(
            [
                result["label"],
                *_cells(result["at_equal_learning"], forgetting),
                published,
                seeds,
                hyperparameters_cell(result["settings"]),
            ]
        )
    return markdown_table(rows)


def _table_of_shares(summary):
    forgetting = forgetting_labels(summary["runs"][0])
    rows = [["", *forgetting.values(), "aim, at most"]]
    for arm, others in summary["shares"].items():
        for other, values in others.items():
            cells = [f"{values[name]:.0%}" if name in values else "" for name in forgetting]
            labels = (summary["arms"][each]["label"] for each in (arm, other))
            rows.append([" / ".join(labels), *cells, f"{AIMS[other]:.0%}"])
    return markdown_table(rows)


def _cells(spread, names):
    return [spread_cell(spread["mean"].get(name), spread["deviation"].get(name)) for name in names]


def plot(summary: dict[str, Any], file: Path) -> None:
    """
    Plots learning against forgetting of texts and of each kind of known facts, one curve per run, and the matches at the
    end.
    """
    kinds = list(known_kinds(summary["runs"][0]))
    figure = new_figure(10 + 5 * len(kinds), 4.5)
    texts, *known, recall = figure.subplots(1, 2 + len(kinds))
    _plot_curves(texts, summary, "texts")
    texts.set(ylabel="rise of loss, nats per token", title="Held-out general text, a line for each seed")
    titles = ["Facts that the model knew, a line for each seed"]
    if len(kinds) > 1:
        titles = ["Known facts of relations that are taught", "Known facts of relations that are not taught"]
    for axes in known[1:]:
        axes.sharey(known[0])
    for axes, kind, title in zip(known, kinds, titles, strict=True):
        _plot_curves(axes, summary, f"{kind}_drop")
        axes.set(ylabel="fewer matches, %", title=title)
    _plot_recall(recall, summary)
    save_picture(figure, file)


def _plot_recall(axes: Axes, summary: dict[str, Any]) -> None:
    results = summary["arms"]
    looks = {
        "new": (None, 1.0, "new facts"),
        "known": ("//", 0.5, "known facts, hatched"),
        "known_elsewhere": ("..", 0.3, "known elsewhere, dotted"),
    }
    kinds = ["new", *known_kinds(summary["runs"][0])]
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        hatch, alpha, label = looks[kind]
        name = f"{kind}_matches"
        axes.bar(
            [position + width * i for position in range(len(results))],
            [result["end"]["mean"][name] for result in results.values()],
            width,
            yerr=[result["end"]["deviation"].get(name, 0.0) for result in results.values()],
            color=[TRAININGS[arm].color for arm in results],
            alpha=alpha,
            hatch=hatch,
            label=label,
        )
    names = [result["label"].replace(", ", ",\n") for result in results.values()]
    axes.set_xticks([position + 0.4 - width / 2 for position in range(len(results))], names)
    axes.set(ylabel="exact matches, %", title="At the end, in sentences that were not trained on")
    axes.set(ylim=(0, 140), yticks=range(0, 101, 20))  # the legend is above the bars
    add_legend(axes)


def _plot_curves(axes: Axes, summary: dict[str, Any], name: str) -> None:
    if any(run["settings"] != summary["arms"][run["arm"]]["settings"] for run in summary["runs"]):
        axes.plot([], [], color=NEUTRAL, alpha=0.3, label="pale: other hyperparameters")
    for arm, result in summary["arms"].items():
        for run in (run for run in summary["runs"] if run["arm"] == arm):
            best = run["settings"] == result["settings"]
            axes.plot(
                [point["learning"] for point in curve_of(run)],
                [point[name] for point in curve_of(run)],
                marker=TRAININGS[arm].marker if best else None,
                color=TRAININGS[arm].color,
                alpha=1.0 if best else 0.3,
                label=result["label"] if best and run["seed"] == 0 else None,
            )
    axes.axvline(summary["equal_learning"], color="gray", linestyle=":", label="equal learning")
    axes.set(xlabel="learning: nats per token below the base model")
    add_legend(axes)
