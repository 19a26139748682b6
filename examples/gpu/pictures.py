# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the results. Each function says whether there was something to draw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.pictures import NEUTRAL, add_legend, look_of, new_figure, save_picture
from gpu.layer import CONTENDERS, OPERATIONS
from gpu.report import copy_share, layer_floor


Rows = dict[str, dict[str, Any]]


def draw_kernels(rows: Rows, file: Path) -> bool:
    """Shares of the bandwidth of a copy."""
    shares = {name: copy_share(rows, row) for name, row in rows.items() if "seconds" in row and name != "copy"}
    shares = {name: share for name, share in shares.items() if share is not None}
    if not shares:
        return False
    figure = new_figure(9, 1 + 0.25 * len(shares))
    axes = figure.add_subplot()
    for label, color, are_torch in (("this package", look_of("peer").color, False), ("torch", NEUTRAL, True)):
        own = [name for name in shares if name.startswith("torch") == are_torch]
        axes.barh([list(shares).index(name) for name in own], [shares[name] for name in own], color=color, label=label)
    axes.axvline(0.8, color="black", linewidth=1, label="aim, on unique rows")
    axes.set_yticks(range(len(shares)), shares)
    axes.invert_yaxis()
    axes.set(xlabel="share of the bandwidth of a copy")
    add_legend(axes)
    save_picture(figure, file)
    return True


def draw_layer(rows: Rows, file: Path) -> bool:
    """Times of all contenders, with floors."""
    timed = [row for row in rows.values() if "contender" in row and "seconds" in row]
    if not timed:
        return False
    widths = sorted({row["width"] for row in timed})
    figure = new_figure(6 * len(widths), 4.5)
    for axes, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        for row in timed:
            if row["width"] == width:
                look = look_of(row["contender"])
                place = OPERATIONS.index(row["operation"]) + 0.27 * (CONTENDERS.index(row["contender"]) - 1)
                axes.bar(place, row["seconds"] * 1e3, 0.25, color=look.color, label=look.label)
                floor = layer_floor(rows, row)
                if floor is not None:
                    axes.plot([place - 0.13, place + 0.13], [floor * 1e3] * 2, color="black", label="floor")
        axes.set(yscale="log", ylabel="ms", title=f"d = {width}")
        axes.set_xticks(range(len(OPERATIONS)), [name.replace("_", " + ") for name in OPERATIONS])
        named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(named.values(), named.keys(), fontsize=8)
    save_picture(figure, file)
    return True


def draw_training(rows: Rows, file: Path) -> bool:
    """Losses on held-out text against seconds."""
    trained = {name: row["losses"] for name, row in rows.items() if "losses" in row}
    if not trained:
        return False
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for name, losses in trained.items():
        axes.plot(*zip(*losses, strict=True), **look_of(name).style, label=look_of(name).label)
    axes.set(xlabel="seconds of training", ylabel="loss on held-out text, nats per token")
    add_legend(axes)
    save_picture(figure, file)
    return True


PICTURES: dict[str, Callable[[Rows, Path], bool]] = {
    "kernels": draw_kernels,
    "layer": draw_layer,
    "training": draw_training,
}
