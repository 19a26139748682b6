# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The figures of the page on many GPUs are those of `memory_group_bytes` and of the formulas in it."""

import re

import pytest
from documentation import ROOT

from modeling_peer.parallel.token_exchange import memory_group_bytes


TEXT = (ROOT / "docs/training-on-many-gpus.md").read_text()
MINUS = "\N{MINUS SIGN}"

# The rows of the page's table: what is exchanged, how, in which pass, and the formula of its bytes.
ROWS = re.findall(r"^\| ([a-z ]+): [a-z-]+ \| (?:forward|backward) \| ([^|]+) \| ([\d,]+) \|$", TEXT, flags=re.M)


def test_the_table_of_a_memory_group():
    sizes = memory_group_bytes(2048, 128, 8, 2)
    assert {name: int(size.replace(",", "")) for name, _, size in ROWS} == sizes
    assert f"| all | | | {sum(sizes.values()):,} |" in TEXT


@pytest.mark.parametrize("G, d, A, e", [(8, 2048, 128, 2), (3, 9, 5, 4), (1, 4, 2, 2)])
def test_the_formulas_are_what_is_computed(G, d, A, e):
    counted = memory_group_bytes(d, A, G, e)
    for name, formula, _ in ROWS:
        product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.replace(MINUS, "-"))
        assert eval(product, {"G": G, "d": d, "A": A, "e": e}) == counted[name], name


def test_figures_in_sentences():
    text = " ".join(TEXT.split())
    tables = 2 * 1024**2 * 2048 * 2
    assert f"the width 2,048 take {tables / 1e9:.1f} GB in bf16" in text
    group = sum(memory_group_bytes(2048, 128, 8, 2).values()) * 8 * 2 * 8192
    fsdp2 = 3 * tables * 7 / 8 * 8 * 2
    assert f"receives {group / 1e9:.1f} GB in a memory group and {fsdp2 / 1e9:.0f} GB under FSDP2" in text
