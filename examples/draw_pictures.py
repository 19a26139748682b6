# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Draws the pictures of the repository again, from the results that are saved beside them.

    ./run python examples/draw_pictures.py                          # in their places
    ./run python examples/draw_pictures.py --output_dir pictures    # in a folder of their own, to compare them

The studies, the benchmark and the quickstart draw the same pictures of the results that they measure.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import quickstart

from benchmark import report as benchmark
from common.command_line import parse_arguments
from common.pictures import TRAININGS, VARIANTS, new_figure, save_picture
from studies.capacity import report as capacity
from studies.common.study_folder import read_json
from studies.people import report as people
from studies.recipe.plots import PLOTS as RECIPE_PLOTS
from studies.recipe.results import read_results as read_recipe
from studies.recipe.variants import register_variants
from studies.scaling.plots import PLOTS as SCALING_PLOTS
from studies.scaling.report import read_results
from studies.stream import report as stream
from studies.stream.arms import ARMS as STREAM_ARMS
from studies.teaching import report as teaching


ROOT = Path(__file__).parents[1]


@dataclass
class Arguments:
    """Where to save the pictures."""

    output_dir: str = field(
        default=str(ROOT),
        metadata={"help": "Folder in which each picture has the path that it has in the repository."},
    )


def drawings() -> dict[str, Callable[[Path], object]]:
    """The function that draws each picture into a file, by the path of the picture in the repository."""
    studies = ROOT / "examples" / "studies"
    recipe = read_recipe(studies / "recipe" / "results.json")
    scaling = read_results(studies / "scaling" / "results.json")
    return {
        "docs/images/findings.png": draw_findings,
        "docs/images/quickstart.png": lambda file: quickstart.plot_losses(file, *_quickstart_results()),
        "examples/benchmark/results.png": lambda file: benchmark.plot(
            benchmark.Results(read_json(ROOT / "examples/benchmark/results.json")), file
        ),
        "examples/studies/capacity/results.png": lambda file: capacity.plot(
            read_json(studies / "capacity/results.json")["runs"], file
        ),
        "examples/studies/people/results.png": lambda file: people.plot(
            read_json(studies / "people/results.json")["runs"], file
        ),
        "examples/studies/teaching/results.png": lambda file: teaching.plot(
            read_json(studies / "teaching/results.json")["runs"], file
        ),
        **{
            f"examples/studies/recipe/{name}.png": lambda file, draw=draw: _draw_recipe(draw, recipe, file)
            for name, draw in RECIPE_PLOTS.items()
        },
        **{
            f"examples/studies/stream/{name}.png": lambda file, name=name: stream.plot(
                read_json(studies / f"stream/{name}.json"), file
            )
            for name in ("results", "recipe/results")
        },
        **{
            f"examples/studies/scaling/{name}.png": lambda file, draw=draw: draw(scaling, file)
            for name, draw in SCALING_PLOTS.items()
        },
    }


def draw_findings(file: Path) -> None:
    """
    Draw the picture of the front page: facts stored at equal FLOPs, forgetting in the study of a stream of texts, and
    the time of a training step in the benchmark.
    """
    # Its hyperparameters were chosen on other documents than those reported, unlike those of the first comparison.
    arms = read_json(ROOT / "examples/studies/stream/recipe/results.json")["arms"]
    contenders = ["peer_pytorch", "peer", "dense"]
    names = ["lora", "full", "protected-ungated", "sparse", "protected-generated", "protected"]
    steps = {
        each["contender"]: 1000 * statistics.median(each["seconds"])
        for each in read_json(ROOT / "examples/benchmark/results.json")["training"]["measurements"]
        if each["operation"] == "step" and each["num_experts"] == 1024**2 and each["contender"] in contenders
    }
    figure = new_figure(16, 3.2)
    first, left, right = figure.subplots(1, 3, width_ratios=(3, 3, 2.8))
    capacity.draw_bars(read_json(ROOT / "examples/studies/capacity/results.json")["runs"], first)
    forgetting = [arms[name]["mean"]["forgetting"] for name in names]
    bars = left.barh(
        [STREAM_ARMS[name].label for name in names], forgetting, color=[TRAININGS[n].color for n in names]
    )
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.set_title(
        f"Added experts behind gates forget {forgetting[-1]:.2f} nats,\n"
        f"full finetuning {arms['full']['mean']['forgetting']:.2f}"
    )
    left.set_xlabel("forgetting after learning four texts, nats per token")
    bars = right.barh(
        [VARIANTS[name].label for name in contenders],
        [steps[name] for name in contenders],
        color=[VARIANTS[name].color for name in contenders],
    )
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.set_title(
        f"A step with a million experts takes\n1/{steps['peer_pytorch'] / steps['peer']:.0f} of PEER-pytorch's time"
    )
    right.set_xlabel("a training step of one layer on two cores, ms")
    for axes in (first, left, right):
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, file)


def _draw_recipe(draw, results, file):
    register_variants()  # their costs decide the steps of the runs
    return draw(results, file)


def _quickstart_results():
    results = read_json(ROOT / "docs/images/quickstart.json")
    ngrams = results.pop("5-grams", {}).get("eval_loss")
    for result in results.values():
        for losses in ("train_losses", "eval_losses"):
            result[losses] = {int(step): loss for step, loss in result[losses].items()}
    return {name: quickstart.Result(**result) for name, result in results.items()}, ngrams


def main():
    (args,) = parse_arguments((Arguments,), __doc__)
    for name, draw in drawings().items():
        file = Path(args.output_dir, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(file)
        print(file)


if __name__ == "__main__":
    main()
