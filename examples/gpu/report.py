# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of the results, and which aims were met."""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu.layer import row_name as layer_row
from gpu.tuning import line_to_change
from gpu.worker import PARTS, summary


# Characters of a line about a row that failed.
MOST_CHARACTERS = 110

# Kernels that should reach the bandwidth of a copy on rows that are named once.
BOUND_BY_MEMORY = ("up", "down", "row_gradient", "step")

Rows = dict[str, dict[str, Any]]


def read_results(folder: Path) -> dict[str, Rows]:
    """The rows of all parts that have results."""
    files = {part: folder / f"{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text())["rows"] for part, file in files.items() if file.is_file()}


def is_without_failures(folder: Path, parts: list[str]) -> bool:
    """Whether no row of some parts failed."""
    results = read_results(folder)
    return not any(has_failed(row) for part in parts for row in results.get(part, {}).values())


def has_failed(row: dict[str, Any]) -> bool:
    """Whether a row ended with an error or a check did not pass."""
    return "error" in row or not row.get("passed", True)


def report(folder: Path) -> str:
    """Draws the pictures, writes report.txt, and returns what is in it."""
    results = read_results(folder)
    text = _where(folder)
    text += "\n".join(line for part, rows in results.items() for line in (*_header(part, rows), *TABLES[part](rows)))
    text += "\n\n" + "\n".join(_aim_lines(results))
    text += "\n\n" + _draw(results, folder)
    (folder / "report.txt").write_text(text + "\n")
    return text


def _where(folder: Path) -> str:
    """What the results are of, from the files of the parts, which may be of several machines."""
    found = [json.loads((folder / f"{part}.json").read_text())["conditions"] for part in read_results(folder)]
    lines = dict.fromkeys(
        f"{each.get('gpu', 'A CPU')}, kernels {each['kernels']!r}, torch {each['torch']}, "
        f"Transformers {each['transformers']}"
        for each in found
    )
    warning = "\nToy sizes: times and aims mean nothing." if any(each["tiny"] for each in found) else ""
    return "\n" + "\n".join(lines) + warning + "\n"


def _header(part: str, rows: Rows) -> Iterator[str]:
    failed = {name: row for name, row in rows.items() if has_failed(row)}
    skipped = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    done = len(rows) - len(failed) - len(skipped)
    yield f"\n{part}: {done} done, {len(failed)} failed, {len(skipped)} skipped"
    for name, row in failed.items():
        yield f"  FAILED  {name}: {_reason(row)}"[:MOST_CHARACTERS]
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, given in skipped.items() if given == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"  skipped {names[0]}{more}: {reason}"


def _reason(row):
    if "error" in row:
        return summary(row).removeprefix("FAILED: ")
    named = {key: row[key] for key in ("worst", "where", "code") if key in row}
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in named.items()
    )


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    """Aligned columns, the first to the left."""
    if not lines:
        return []
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def aligned(line):
        first, *others = (f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        return "  ".join(["", f"{first.strip():<{widths[0]}}", *others])

    return [aligned(line) for line in (head, *lines)]


def _timed(rows: Rows) -> list[dict[str, Any]]:
    return [row for row in rows.values() if "seconds" in row]


def _checks(rows: Rows) -> list[str]:
    found = {name: row["worst"] for name, row in rows.items() if row.get("passed") and "worst" in row}
    name = max(found, key=found.get, default=None)
    return [] if name is None else [f"  closest to its limit: {name}, {found[name]:.2f} of what is allowed"]


def copy_share(rows: Rows, row: dict[str, Any]) -> float | None:
    """The bandwidth of an operation, divided by that of a copy."""
    rate = rows.get("copy", {}).get("bytes_per_second")
    if rate is None or row.get("bytes") is None:
        return None
    return row["bytes"] / row["seconds"] / rate


def _kernel_table(rows: Rows) -> list[str]:
    lines = []
    for name, row in rows.items():
        if "seconds" in row:
            rate = row["bytes"] / row["seconds"] / 1e9 if row.get("bytes") else None
            share = None if name == "copy" else copy_share(rows, row)
            cells = [_number(row["seconds"] * 1e3, ".3f"), _number(rate, ".0f"), _number(share, ".2f")]
            lines.append([name, *cells])
    return _table(["", "ms", "GB/s", "of copy"], lines)


def layer_floor(rows: Rows, row: dict[str, Any]) -> float | None:
    """Seconds that the unavoidable bytes of an operation take at the bandwidth of a copy."""
    rate = rows.get("copy", {}).get("bytes_per_second")
    return row["bytes"] / rate if rate and "bytes" in row else None


def _layer_table(rows: Rows) -> list[str]:
    lines = []
    for name, row in rows.items():
        if "contender" in row and "seconds" in row:
            floor, ours = layer_floor(rows, row), rows.get(layer_row("peer", row["operation"], row["width"]), {})
            lines.append(
                [
                    name,
                    _number(row["seconds"] * 1e3, ".2f"),
                    _number(_ratio(row, ours), ".2f"),
                    _number(floor and floor * 1e3, ".2f"),
                    _number(floor and row["seconds"] / floor, ".2f"),
                    _number(row["peak_bytes"] and row["peak_bytes"] / 1e9, ".1f"),
                    str(row["pieces"]),
                ]
            )
    return _table(["", "ms", "x peer", "floor ms", "x floor", "GB", "parts"], lines)


def _ratio(row: dict[str, Any], other: dict[str, Any]) -> float | None:
    return row["seconds"] / other["seconds"] if "seconds" in row and "seconds" in other else None


def _decode_table(rows: Rows) -> list[str]:
    found: dict[str, dict[bool, float]] = {}
    for row in _timed(rows):
        found.setdefault(row["what"], {})[row["graph"]] = row["seconds"] * 1e3
    lines = [[what, *(_number(times.get(graph), ".3f") for graph in (False, True))] for what, times in found.items()]
    return _table(["one token, ms", "no graph", "graph"], lines)


def _training_table(rows: Rows) -> list[str]:
    lines = [
        [
            name,
            f"{row['parameters']:,}",
            f"{row['training_seconds']:.0f}",
            str(row["steps"]),
            f"{row['losses'][-1][1]:.4f}",
        ]
        for name, row in rows.items()
        if "losses" in row
    ]
    return _table(["", "parameters", "seconds", "steps", "held-out loss"], lines)


def _tuning_lines(rows: Rows) -> list[str]:
    lines = [line for row in rows.values() if "times" in row and (line := line_to_change(row))]
    return ["  lines to change:", *(f"    {line}" for line in lines)] if lines else ["  nothing to change"]


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "equality": _checks,
    "sanitizer": _checks,
    "tuning": _tuning_lines,
    "kernels": _kernel_table,
    "layer": _layer_table,
    "decode": _decode_table,
    "training": _training_table,
}


def aims(results: dict[str, Rows]) -> Iterator[tuple[str, float | None, float, bool]]:
    """All aims: name, value if it was measured, limit, and whether it should be at least the limit."""
    kernels, layers = results.get("kernels", {}), results.get("layer", {})
    for row in _timed(kernels):
        if row.get("operation") in BOUND_BY_MEMORY and row["kind"] == "unique":
            yield (
                f"{row['operation']}, d = {row['width']}, unique rows: share of copy bandwidth",
                copy_share(kernels, row),
                0.8,
                True,
            )
    widths = sorted({row["width"] for row in _timed(layers) if "width" in row})
    for width in widths:
        for operation, limit in (("forward", 3.0), ("step", 1.8)):
            rival, ours = (layers.get(layer_row(name, operation, width), {}) for name in ("peer_pytorch", "peer"))
            yield f"{operation}, d = {width}: x PEER-pytorch", _ratio(rival, ours), limit, True
    if widths:
        row = layers.get(layer_row("peer", "step", widths[0]), {})
        floor = layer_floor(layers, row) if "seconds" in row else None
        yield f"step, d = {widths[0]}: time / floor", floor and row["seconds"] / floor, 1.6, False


def _aim_lines(results: dict[str, Rows]) -> list[str]:
    lines = []
    for name, value, limit, at_least in aims(results):
        met = None if value is None else (value >= limit if at_least else value <= limit)
        verdict = {None: "not measured", True: "met", False: "missed"}[met]
        lines.append([name, f"{'≥' if at_least else '≤'} {limit:g}", _number(value, ".2f"), verdict])
    return _table(["aim", "", "reached", ""], lines) or ["No aim was measured."]


def _draw(results: dict[str, Rows], folder: Path) -> str:
    """Draws the pictures that there are results for."""
    if find_spec("matplotlib") is None:
        return f"In {folder}: report.txt; no pictures, because matplotlib is not installed."
    from gpu.pictures import PICTURES

    drawn = [f"{name}.png" for name, draw in PICTURES.items() if draw(results.get(name, {}), folder / f"{name}.png")]
    return f"In {folder}: {', '.join(['report.txt', *drawn])}"
