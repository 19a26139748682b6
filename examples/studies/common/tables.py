# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and their cells."""


def markdown_table(rows: list[list[str]]) -> str:
    """
    A Markdown table with aligned source: the first row is the head, the first column is left-aligned, others
    right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
    return "\n".join(lines)


def spread_cell(value: float | None, deviation: float | None, digits: int = 3) -> str:
    """`"0.123 ± 0.004"`; the value alone where one seed gives no deviation; an empty string without a value."""
    return " ± ".join(f"{each:.{digits}f}" for each in (value, deviation) if each is not None)


def hyperparameters_cell(hyperparameters: dict[str, float]) -> str:
    """`"learning_rate 0.001, num_trained_experts 256"`."""
    return ", ".join(f"{name} {value:g}" for name, value in hyperparameters.items())
