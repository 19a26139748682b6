# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Results of the benchmark: floors, a table of times, and plots."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from random import Random
from statistics import median, quantiles

import torch

from benchmark.contenders import BITS
from common.pictures import VARIANTS, add_legend, look_of, new_figure, save_picture


SIZE = ("hidden_size", "num_experts", "num_tokens", "dtype", "indices")

# Suffix of the names of sections that were measured with the code of another checkout.
AGAINST = ", other checkout"


class Results:
    """The sections of a results.json of the benchmark, with lookups."""

    def __init__(self, sections: dict[str, dict]):
        self.sections = sections

    def records(self, section: str, **fields) -> list[dict]:
        """The records of a section with the given values."""
        records = self.sections.get(section, {"measurements": []})["measurements"]
        return [record for record in records if all(record[name] == value for name, value in fields.items())]

    def value(self, section: str, name: str, **fields) -> float | None:
        """
        The value `name` of the matching record, where `"seconds"` stands for its median time. If several match, the
        record with the smallest `hidden_size` is used.
        """
        found = [record for record in self.records(section, **fields) if record["seconds"]]
        if not found:
            return None
        record = min(found, key=lambda record: record["hidden_size"])
        return median(record["seconds"]) if name == "seconds" else record.get(name)

    def rate(self, section: str, record: dict, *operations: str) -> float | None:
        """The best bytes or FLOPs per second of the machine in a section, at the size of a record."""
        size = {name: record[name] for name in SIZE if name != "indices"}
        found = [r for name in operations for r in self.records(section, contender="machine", operation=name, **size)]
        return max((r["work"] / min(r["seconds"]) for r in found if r["seconds"]), default=None)

    def floor(self, section: str, record: dict) -> float | None:
        """The floor of a record in seconds, see `python -m benchmark --help`. `None` if it was not measured."""
        operation, bits = record["operation"], BITS.get(record["contender"])
        machine = record if bits is None else {**record, "dtype": "int8"}
        read = self.rate(section, machine, "row_read_bag", "row_read_select")
        if record.get("unique_rows") is None or read is None:
            return None
        row = record["hidden_size"] * (bits or 8 * getattr(torch, record["dtype"]).itemsize) / 8
        rows = (1 if record["contender"] == "pkm" else 2) * record["unique_rows"] * row
        reads, writes = {
            "forward": (1, 0),
            "forward_backward": (2, 1),
            "step": (2 + 4, 1 + 3),  # parameter, both moments and gradient; parameter and both moments
            "step_row_moment": (2 + 3, 1 + 2),
        }[operation]
        products = ["query_product", "key_product"]
        products += [] if operation == "forward" else ["query_product_dx", "query_product_dw"]
        size = {name: record[name] for name in SIZE if name != "indices"}
        times = [
            min(r["seconds"])
            for name in products
            for r in self.records(section, contender="machine", operation=name, **size)
            if not record["contender"].startswith("expert_part")
        ]
        return rows * (reads / read + writes / self.rate(section, machine, "write")) + sum(times)


def _divide(over, under):
    return None if over is None or under is None else over / under


def table(results: Results, section: str) -> str:
    """The table of all records of a section, grouped by operation and size."""
    head = f"{'':<20}{'ms':>10}{'x peer':>9}{'GB above':>10}{'GB state':>10}{'rows':>9}{'floor ms':>10}{'x floor':>9}"
    lines = []
    machine = results.records(section, contender="machine")
    layers = [record for record in results.records(section) if record not in machine]
    names = ("operation", *SIZE)
    layers.sort(key=lambda record: tuple(str(record[name]).zfill(9) for name in names))  # sorts numbers by value
    for key, group in groupby(layers, lambda record: tuple(record[name] for name in names)):
        operation, width, experts, tokens, dtype, indices = key
        skew = f", {indices} indices" if indices else ""
        lines += ["", f"{operation}, N = {experts}, d = {width}, T = {tokens}, {dtype}{skew}", head]
        group = list(group)
        peer = next((median(r["seconds"]) for r in group if r["contender"] == "peer" and r["seconds"]), None)
        lines += [_line(results, section, record, peer) for record in group]
    if machine:
        lines += ["", "best rates of the machine, GB/s or GFLOP/s"]
    for record in machine:
        if record["seconds"]:
            size = f"N = {record['num_experts']}, d = {record['hidden_size']}, {record['dtype']}"
            lines.append(f"{record['operation']:<20}{record['work'] / min(record['seconds']) / 1e9:>10.1f}   {size}")
    return "\n".join(lines)


def _line(results, section, record, peer):
    if not record["seconds"]:
        return f"{record['contender']:<20}  not measured: {record['reason']}"
    time, floor = median(record["seconds"]), results.floor(section, record)
    cells = (
        (time * 1e3, 10, ".2f"),
        (_divide(time, peer), 9, ".2f"),
        (_divide(record.get("peak_bytes"), 1e9), 10, ".3f"),
        (_divide(record.get("state_bytes"), 1e9), 10, ".3f"),
        (record.get("unique_rows"), 9, "d"),
        (_divide(floor, 1e-3), 10, ".2f"),
        (_divide(time, floor), 9, ".2f"),
    )
    return f"{record['contender']:<20}" + "".join(
        f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}" for value, width, form in cells
    )


def comparison_table(results: Results, sections: Iterable[str]) -> str:
    """Table of the median times of this checkout and of another one, and of their ratios with 95 % intervals."""
    lines = [f"{'':<74}{'ms':>10}{'other ms':>10}{'ratio':>8}{'95 % interval':>17}"]
    for section in sections:
        for record in results.records(section):
            task = {name: record[name] for name in ("operation", "contender", *SIZE)}
            for other in results.records(section + AGAINST, **task):
                if record["seconds"] and other["seconds"]:
                    own, others = median(record["seconds"]), median(other["seconds"])
                    low, high = ratio_interval(record["seconds"], other["seconds"])
                    lines.append(
                        f"{' '.join(str(value) for value in task.values() if value is not None):<74}"
                        f"{own * 1e3:>10.2f}{others * 1e3:>10.2f}{own / others:>8.3f}{low:>9.3f}{high:>8.3f}"
                    )
    return "\n".join(lines)


def ratio_interval(over: list[float], under: list[float]) -> tuple[float, float]:
    """The 95 % interval of the ratio of two medians, by a bootstrap of both lists."""
    draw = Random(0).choices
    ratios = [median(draw(over, k=len(over))) / median(draw(under, k=len(under))) for _ in range(2000)]
    ends = quantiles(ratios, n=40)
    return ends[0], ends[-1]


def plot(results: Results, file: Path) -> None:
    """Plot bars of times with their floors, curves against N and T, and bars of experts alone and of decoding."""
    figure = new_figure(15, 9)
    panels = figure.subplots(2, 3).flat
    for axes, (section, operation) in zip(
        panels, (("forward", "forward"), ("training", "forward_backward"), ("training", "step")), strict=False
    ):
        records = [r for r in results.records(section, operation=operation) if r["contender"] in VARIANTS]
        width = min((r["hidden_size"] for r in records), default=0)
        largest = max((r["num_experts"] for r in records), default=0)
        records = [r for r in records if r["hidden_size"] == width and r["num_experts"] == largest]
        _bars(axes, results, section, records, [look_of(r["contender"]).label for r in records])
        axes.set_title(f"{operation.replace('_', ' + ')}, N = {largest:,}, d = {width}")
    scaling = results.records("scaling")
    panels = list(figure.axes)[3:]
    for axes, name, other, label in (
        (panels[0], "num_experts", "num_tokens", "experts N"),
        (panels[1], "num_tokens", "num_experts", "tokens T"),
    ):
        _curves(axes, scaling, name, other)
        axes.set(xlabel=label, ylabel="ms", xscale="log", yscale="log", title=f"forward against {label}")
    experts = results.records("experts", contender="expert_part", operation="forward")
    decode = results.records("decode")
    labels = [f"experts, {r['indices']}, {r['dtype']}" for r in experts]
    labels += [f"token of {r['contender']}" for r in decode]
    _bars(panels[2], results, "experts", experts + decode, labels)
    panels[2].set_title("experts alone; a token of whole models")
    save_picture(figure, file)


def _bars(axes, results, section, records, labels):
    measured = [(r, label) for r, label in zip(records, labels, strict=True) if r["seconds"]]
    for place, (record, _) in enumerate(measured):
        time, floor = median(record["seconds"]) * 1e3, results.floor(section, record)
        contender = "peer" if record["contender"].startswith("expert_part") else record["contender"]
        axes.barh(place, time, color=look_of(contender).color)
        end = time if floor is None else max(time, floor * 1e3)
        axes.text(end, place, f" {time:,.0f}" if time >= 100 else f" {time:.3g}", va="center")
        if floor is not None:
            axes.plot([floor * 1e3] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set(xlabel="ms; a black line is the floor of the machine", yticks=range(len(measured)))
    axes.set_yticklabels([label for _, label in measured])
    axes.invert_yaxis()
    axes.margins(x=0.25)


def _curves(axes, records, name, other):
    """Plots times against `name`, at the most frequent value of `other`."""
    values = [record[other] for record in records]
    records = [r for r in records if r["seconds"] and r[other] == max(values, key=values.count)]
    for contender, look in VARIANTS.items():
        points = sorted((r[name], median(r["seconds"]) * 1e3) for r in records if r["contender"] == contender)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), **look.style, label=look.label)
    if records:
        add_legend(axes)
