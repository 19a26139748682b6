# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The style of all pictures: the color, the marker and the name of each variant and of each way to train.

Colors that appear side by side can be distinguished with every kind of color vision: they are those of Okabe and Ito,
and of Tol. Markers distinguish them in gray. Another implementation of a variant has a lighter shade of its color.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Look:
    """How a variant or a way to train is drawn. Ways to train are named by their studies."""

    color: str
    marker: str
    label: str | None = None

    @property
    def style(self) -> dict[str, Any]:
        """Arguments of a line or of points."""
        return {"color": self.color, "marker": self.marker}


VARIANTS = {
    "dense": Look("#0072B2", "s", "dense"),
    "dense_gated": Look("#56B4E9", "P", "dense, gated"),
    "moe-expert-choice": Look("#E69F00", "D", "MoE, expert choice"),
    "moe-token-choice": Look("#882255", "v", "MoE, token choice"),
    "pkm": Look("#009E73", "^", "PKM"),
    "pkm-gated": Look("#6B8E23", "h", "PKM, output gate"),
    "pkm_embedding_bag": Look("#B9E4D0", "<", "PKM, EmbeddingBag"),
    "peer": Look("#D55E00", "o", "PEER"),
    "recipe": Look("#8C1C13", "*", "PEER, the recipe"),
    "peer_eager": Look("#F3B48B", "p", "PEER, Algorithm 1"),
    "peer_pytorch": Look("#CC79A7", "X", "PEER-pytorch"),
    "doge_cdmoe": Look("#000000", ">", "Doge CDMoE"),
}

# Ways to teach a trained model a text or facts, by the names of the arms of the studies.
TRAININGS = {
    "full": Look("#000000", "o"),
    "lora": Look("#E69F00", "D"),
    "replay": Look("#56B4E9", "P"),
    "experts": Look("#CC79A7", "v"),
    "sparse": Look("#009E73", "^"),
    "protected": Look("#332288", "p"),
    "protected-generated": Look("#7F6FC4", "h"),
    "protected-ungated": Look("#B8AEE2", "*"),
    "open": Look("#7A7A1F", "X"),
    "graft": Look("#882255", "<"),
    "dense": VARIANTS["dense"],
}

# The color of everything that is in neither of them.
NEUTRAL = "#7F7F7F"


def look_of(name: str) -> Look:
    """
    The look of a variant, or of a model that is named after its variant and its size, such as `"peer-tiny"`. Gray for
    any other name.
    """
    return VARIANTS.get(name) or VARIANTS.get(name.partition("-")[0]) or Look(NEUTRAL, "d", name)


def shades(number: int) -> list[tuple[float, float, float, float]]:
    """Colors from dark to light, for ordered values or for options of one variant."""
    return [colormaps["viridis"](0.75 * i / max(number - 1, 1)) for i in range(number)]


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches. Its parts are laid out without overlaps when it is saved."""
    return Figure(figsize=(width, height), layout="constrained")


def add_legend(axes: Axes, **options: Any) -> None:
    """Adds a grid and, where the data leaves most room for it, a legend."""
    axes.grid(alpha=0.3, which=options.pop("which", "major"))
    axes.legend(fontsize=8, **options)


def save_picture(figure: Figure, file: Path) -> None:
    """Saves a figure in a resolution for screens."""
    figure.savefig(file, dpi=120)


def plot_training(history: list[dict[str, float]], file: Path) -> None:
    """Plots the losses in the log history of a `Trainer` against the step. The title gives the last held-out loss."""
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    lines = ("loss", "training loss", NEUTRAL), ("eval_loss", "held-out loss", VARIANTS["peer"].color)
    for key, label, color in lines:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", color=color, label=label)
            axes.set_title(f"{label} {points[-1][1]:.3f} after {points[-1][0]:,} steps")
    axes.set(xlabel="training step", ylabel="loss")
    add_legend(axes)
    save_picture(figure, file)
