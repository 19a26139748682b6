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
"""Pictures of the results. Each function says whether there was something to draw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gpu.layer import CONTENDERS, OPERATIONS
from gpu.report import copy_share, layer_floor


COLORS = {"peer": "tab:red", "peer_pytorch": "tab:purple", "dense": "tab:blue"}

Rows = dict[str, dict[str, Any]]


def draw_kernels(rows: Rows, file: Path) -> bool:
    """Shares of the bandwidth of a copy."""
    shares = {name: copy_share(rows, row) for name, row in rows.items() if "seconds" in row and name != "copy"}
    shares = {name: share for name, share in shares.items() if share is not None}
    if not shares:
        return False
    figure = Figure(figsize=(9, 1 + 0.25 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    colors = ["tab:gray" if name.startswith("torch") else "tab:red" for name in shares]
    axes.barh(list(shares), list(shares.values()), color=colors)
    axes.axvline(0.8, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="share of the bandwidth of a copy; a black line is the aim on unique rows")
    figure.savefig(file, dpi=110)
    return True


def draw_layer(rows: Rows, file: Path) -> bool:
    """Times of all contenders, with floors."""
    timed = [row for row in rows.values() if "contender" in row and "seconds" in row]
    if not timed:
        return False
    widths = sorted({row["width"] for row in timed})
    figure = Figure(figsize=(6 * len(widths), 4.5), layout="constrained")
    for axes, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        for row in timed:
            if row["width"] == width:
                place = OPERATIONS.index(row["operation"]) + 0.27 * (CONTENDERS.index(row["contender"]) - 1)
                axes.bar(place, row["seconds"] * 1e3, 0.25, color=COLORS[row["contender"]], label=row["contender"])
                floor = layer_floor(rows, row)
                if floor is not None:
                    axes.plot([place - 0.13, place + 0.13], [floor * 1e3] * 2, color="black")
        axes.set(yscale="log", ylabel="ms; a black line is the floor", title=f"d = {width}")
        axes.set_xticks(range(len(OPERATIONS)), [name.replace("_", " + ") for name in OPERATIONS])
        named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(named.values(), named.keys())
    figure.savefig(file, dpi=110)
    return True


def draw_training(rows: Rows, file: Path) -> bool:
    """Losses on held-out text against seconds."""
    trained = {name: row["losses"] for name, row in rows.items() if "losses" in row}
    if not trained:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in trained.items():
        axes.plot(*zip(*losses, strict=True), marker="o", color=COLORS[name], label=name)
    axes.set(xlabel="seconds of training", ylabel="loss on held-out text, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)
    return True


PICTURES: dict[str, Callable[[Rows, Path], bool]] = {
    "kernels": draw_kernels,
    "layer": draw_layer,
    "training": draw_training,
}
