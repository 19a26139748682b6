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
"""
Draws the pictures of the repository again, from the results that are saved beside them.

    ./run python examples/draw_pictures.py                          # in their places
    ./run python examples/draw_pictures.py --output_dir pictures    # in a folder of their own, to compare them

The studies, the benchmark and the quickstart draw the same pictures of the results that they measure.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import quickstart

from benchmark import report as benchmark
from common.command_line import parse_arguments
from studies.facts import report as facts
from studies.recipe.plots import PLOTS as RECIPE_PLOTS
from studies.recipe.results import read_results as read_recipe
from studies.recipe.variants import register_variants
from studies.scaling.plots import PLOTS as SCALING_PLOTS
from studies.scaling.report import read_results
from studies.stream import report as stream


ROOT = Path(__file__).parents[1]


@dataclass
class Arguments:
    """Where to save the pictures."""

    output_dir: str = field(
        default=str(ROOT),
        metadata={"help": "Folder in which each picture has the path that it has in the repository."},
    )


def drawings() -> dict[str, Callable[[Path], object]]:
    """What draws each picture into a file, by the path of the picture in the repository."""
    studies = ROOT / "examples" / "studies"
    recipe = read_recipe(studies / "recipe" / "results.json")
    scaling = read_results(studies / "scaling" / "results.json")
    return {
        "docs/images/quickstart.png": lambda file: quickstart.plot_losses(_quickstart_results(), file),
        "examples/benchmark/results.png": lambda file: benchmark.plot(
            benchmark.Results(_read(ROOT / "examples/benchmark/results.json")), file
        ),
        **{
            f"examples/studies/facts/{name}.png": lambda file, name=name: facts.plot(
                _read(studies / f"facts/{name}.json"), file
            )
            for name in ("results", "known_elsewhere/results")
        },
        **{
            f"examples/studies/recipe/{name}.png": lambda file, draw=draw: _draw_recipe(draw, recipe, file)
            for name, draw in RECIPE_PLOTS.items()
        },
        **{
            f"examples/studies/stream/{name}.png": lambda file, name=name: stream.plot(
                _read(studies / f"stream/{name}.json"), file
            )
            for name in ("results", "recipe/results")
        },
        **{
            f"examples/studies/scaling/{name}.png": lambda file, draw=draw: draw(scaling, file)
            for name, draw in SCALING_PLOTS.items()
        },
    }


def _draw_recipe(draw, results, file):
    register_variants()  # for the steps of the runs
    return draw(results, file)


def _read(file):
    return json.loads(file.read_text())


def _quickstart_results():
    results = _read(ROOT / "docs/images/quickstart.json")
    for result in results.values():
        for losses in ("train_losses", "eval_losses"):
            result[losses] = {int(step): loss for step, loss in result[losses].items()}
    return {name: quickstart.Result(**result) for name, result in results.items()}


def main():
    (args,) = parse_arguments((Arguments,), __doc__)
    for name, draw in drawings().items():
        file = Path(args.output_dir, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(file)
        print(file)


if __name__ == "__main__":
    main()
