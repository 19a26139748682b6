# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Results of the benchmark: floors, a table of times, targets, and plots."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from statistics import median, quantiles

import torch

from benchmark.contenders import BITS
from common.pictures import VARIANTS, add_legend, look_of, new_figure, save_picture


SIZE = ("hidden_size", "num_experts", "num_tokens", "dtype", "indices")
LARGE, SMALL = 1024**2, 512**2

# Added to the name of a section that was measured with the code of another checkout, in turn with it.
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
        The value `name` of one record, `"seconds"` for the median time; of several records, that of the smallest
        width.
        """
        found = [record for record in self.records(section, **fields) if record["seconds"]]
        if not found:
            return None
        record = min(found, key=lambda record: record["hidden_size"])
        return median(record["seconds"]) if name == "seconds" else record.get(name)

    def ratio(self, section: str, over: dict, under: dict, **fields) -> float | None:
        """The time of one record divided by that of another."""
        return _divide(
            self.value(section, "seconds", **fields, **over), self.value(section, "seconds", **fields, **under)
        )

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

    def over_floor(self, section: str, **fields) -> float | None:
        """The time of a record divided by its floor."""
        found = [record for record in self.records(section, **fields) if record["seconds"]]
        return _divide(median(found[0]["seconds"]), self.floor(section, found[0])) if found else None


def _divide(over, under):
    return None if over is None or under is None else over / under


def table(results: Results, section: str) -> str:
    """The table of all records of a section, grouped by operation and size."""
    head = f"{'':<20}{'ms':>10}{'x peer':>9}{'GB above':>10}{'GB state':>10}{'rows':>9}{'floor ms':>10}{'x floor':>9}"
    lines = []
    machine = results.records(section, contender="machine")
    layers = [record for record in results.records(section) if record not in machine]
    names = ("operation", *SIZE)
    layers.sort(key=lambda record: tuple(str(record[name]).zfill(9) for name in names))  # numbers by size
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
    """The table of the times of this checkout over those of another, medians, with 95 % intervals."""
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
    """The 95 % interval of the ratio of two medians, by a bootstrap of either list."""
    draw = Random(0).choices
    ratios = [median(draw(over, k=len(over))) / median(draw(under, k=len(under))) for _ in range(2000)]
    ends = quantiles(ratios, n=40)
    return ends[0], ends[-1]


@dataclass(frozen=True)
class Target:
    """A limit that a value should reach, at least or at most. `device` is `"cpu"` or `"cuda"`."""

    name: str
    value: Callable[[Results], float | None]
    limit: float
    at_most: bool = False
    device: str = "cpu"


def _against_pytorch(section, operation, num_experts):
    return lambda results: results.ratio(
        section, {"contender": "peer_pytorch"}, {"contender": "peer"}, operation=operation, num_experts=num_experts
    )


def _gigabytes(section, operation):
    return lambda results: _divide(
        results.value(section, "peak_bytes", contender="peer", operation=operation, num_experts=LARGE), 1e9
    )


def _state(operation):
    tables = 2 * LARGE * 512 * 4
    fields = {"contender": "peer", "num_experts": LARGE, "hidden_size": 512, "dtype": "float32"}
    return lambda results: _divide(results.value("training", "state_bytes", operation=operation, **fields), tables)


def _wide(rival):
    return lambda results: results.ratio(
        "forward", {"contender": "peer"}, {"contender": rival}, hidden_size=1024, num_experts=LARGE
    )


def _decode(size, **fields):
    return lambda results: results.ratio(
        "decode", {"contender": f"peer-{size}"}, {"contender": f"dense-{size}"}, **fields
    )


def _half_precision(results):
    fields = {"operation": "forward", "indices": "uniform", "num_experts": LARGE}
    return results.ratio("experts", {"dtype": "float32"}, {"dtype": "bfloat16"}, contender="expert_part", **fields)


def _integer_gain(results):
    """How much faster experts are with 8 bits than in bfloat16, over how much faster bare reads of rows are."""
    ours = _quantized(8, operation="forward", num_tokens=1024)(results)
    bare = results.ratio(
        "quantized", {"dtype": "bfloat16"}, {"dtype": "int8"}, contender="machine", operation="row_read_select"
    )
    return _divide(_divide(1.0, ours), bare)


def _quantized(bits, contender="expert_part", **fields):
    """The time with quantized tables over that with tables in bfloat16."""
    return lambda results: results.ratio(
        "quantized", {"contender": f"{contender}_int{bits}"}, {"contender": contender}, **fields
    )


def _copy_bandwidth(results):
    fields = {"operation": "forward", "indices": "uniform", "num_experts": LARGE, "dtype": "float32"}
    found = [r for r in results.records("experts", contender="expert_part", **fields) if r["seconds"]]
    if not found:
        return None
    read = 2 * found[0]["unique_rows"] * found[0]["hidden_size"] * 4 / median(found[0]["seconds"])
    return _divide(read, results.rate("experts", found[0], "copy"))


_BOTH = {"contender": "peer", "operation": "forward_backward", "num_experts": LARGE}
TARGETS = (
    Target("forward, N = 1024²: x PEER-pytorch", _against_pytorch("forward", "forward", LARGE), 3.5),
    Target(
        "forward + backward, N = 1024²: x PEER-pytorch", _against_pytorch("training", _BOTH["operation"], LARGE), 8
    ),
    Target(
        "forward + backward, N = 1024²: x floor", lambda results: results.over_floor("training", **_BOTH), 1.9, True
    ),
    Target("step, N = 1024²: x PEER-pytorch", _against_pytorch("training", "step", LARGE), 6),
    Target("forward + backward, N = 512²: x PEER-pytorch", _against_pytorch("training", _BOTH["operation"], SMALL), 4),
    Target("step, N = 512²: x PEER-pytorch", _against_pytorch("training", "step", SMALL), 2.75),
    Target("forward, N = 1024²: GB above parameters", _gigabytes("forward", "forward"), 0.07, True),
    Target(
        "forward + backward, N = 1024²: GB above parameters", _gigabytes("training", _BOTH["operation"]), 0.65, True
    ),
    Target("step, N = 1024²: GB of gradients and temporaries", _gigabytes("training", "step"), 0.65, True),
    Target("step, N = 1024²: optimizer state / tables", _state("step"), 2.01, True),
    Target("step, one second moment a row: optimizer state / tables", _state("step_row_moment"), 1.01, True),
    Target("forward, d = 1024: time / gated dense", _wide("dense_gated"), 1.0, True),
    Target("forward, d = 1024: time / two-matrix dense", _wide("dense"), 1.2, True),
    Target("experts alone: x bfloat16 over float32", _half_precision, 1.6),
    Target("decode, 12 layers, d = 512: time / dense twin", _decode("mid", num_experts=LARGE), 1.3, True),
    Target("decode, peer-tiny: time / dense twin", _decode("tiny"), 1.3, True),
    Target("experts alone, d = 1024: gain by 8 bits / gain of bare reads", _integer_gain, 0.85),
    Target(
        "experts alone, d = 1024: time of 4 bits / bfloat16",
        _quantized(4, operation="forward", num_tokens=1024),
        1.0,
        True,
    ),
    Target("decode, 12 layers, d = 1024: time of 8 bits / bfloat16", _quantized(8, "peer-mid"), 1.0, True),
    Target("decode, 12 layers, d = 1024: time of 4 bits / bfloat16", _quantized(4, "peer-mid"), 1.0, True),
    Target("forward, N = 1024²: x PEER-pytorch", _against_pytorch("forward", "forward", LARGE), 3, device="cuda"),
    Target("step, N = 1024²: x PEER-pytorch", _against_pytorch("training", "step", LARGE), 3, device="cuda"),
    Target("experts alone: unique rows' bytes / copy bandwidth", _copy_bandwidth, 0.8, device="cuda"),
)


def target_table(results: Results) -> str:
    """The table of the targets of the device and the values that were reached."""
    device = next((section["settings"]["device"] for section in results.sections.values()), "cpu")
    lines = [f"{'target':<62}{'':>9}{'reached':>9}"]
    for target in TARGETS:
        if (target.device == "cpu") == (device == "cpu"):
            value = target.value(results)
            reached = "not measured" if value is None else f"{value:.2f}"
            if value is not None and (value > target.limit if target.at_most else value < target.limit):
                reached += "  missed"
            lines.append(f"{target.name:<62}{'≤' if target.at_most else '≥'} {target.limit:<7g}{reached:>9}")
    return "\n".join(lines)


def plot(results: Results, file: Path) -> None:
    """Plots bars of times with their floors, curves against N and T, and experts alone and decoding."""
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
