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
