# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and their cells."""

from statistics import mean, stdev


def markdown_table(rows: list[list[str]]) -> str:
    """
    A Markdown table with aligned source: the first row is the head, the first column is left-aligned, others
    right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
    return "\n".join(lines)


def spread(values: list[float], form: str = ".2f") -> str:
    """`"0.12 ± 0.04"`, mean and standard deviation over seeds; of one seed, the value alone."""
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")
