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
"""The figures of the page on many GPUs are those that `communication_costs` counts for the configurations in it."""

import re

import pytest
from documentation import ROOT, code_blocks

from modeling_peer import PeerConfig, communication_costs, memory_group_bytes, model_costs
from modeling_peer.analysis.collectives import GROUP_COLLECTIVES


PAGE = ROOT / "docs/training-on-many-gpus.md"

DESIGNS = {
    "ddp": "DDP, dense gradients",
    "ddp_factors": "DDP, gradients in factors",
    "fsdp2": "FSDP2",
    "tensor_parallel": "tensor parallelism",
    "memory_group": "memory group, rest under DDP",
    "memory_group_fsdp2": "memory group, rest under FSDP2",
}
STEP = {"tokens_per_rank": 8192, "micro_batches": 2}

MINUS = "\N{MINUS SIGN}"

# Bytes of each collective, as the page writes them.
FORMULAS = {
    "indices": "4 (G - 1) A",
    "hidden states": "e d (G - 1) / G",
    "dot products": "4 (G - 1) A",
    "weighted activations": "e (G - 1) A",
    "outputs": "e d (G - 1) / G",
    "output gradients": "e d (G - 1) / G",
    "weight gradients": "4 (G - 1) A",
    "neuron gradients": "e (G - 1) A",
    "hidden state gradients": "e d (G - 1) / G",
}

PHRASES = (
    "would have {twins} billion parameters",
    "they have {num_layers} PEER layers and {totals} billion parameters",
    "the matrix products of a step take {compute} seconds",
    "the width 2,048 take {tables} GB in bf16",
    "One GPU would have to keep {whole} GB",
    "{pools} GB of tables in the smaller model",
    "it is {in_node} GB instead of {fsdp2_in_node} GB for the smaller model",
    "FSDP2 takes {fsdp2_eight} seconds and the memory group with the rest under FSDP2 {group_eight}",
    "{layer_small} GB each for the smaller model, {layer_large} GB for the larger one",
    "which a memory group keeps in {shared} GB on each of 8 GPUs",
    "a GPU of 32 keeps {group_of_32} GB of the tables",
    "one after the other**: {exposed} ms for the 8,192 tokens of a micro-batch",
)


def gigabytes(size):
    return "0" if not size else f"{size / 1e9:,.{1 if size >= 1e9 else 2}f}"


def table_of_designs(configurations, cluster):
    lines = [
        "| model | GPUs | design | GB received in a node | GB received by network | seconds | GB kept of tables | of the rest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, config in configurations.items():
        for num_ranks in (1, 8, 64, 512):
            costs = communication_costs(config, num_ranks, **STEP, **cluster)
            designs = {"ddp_factors": "one process"} if num_ranks == 1 else DESIGNS
            for name, label in designs.items():
                design = costs[name]
                received = f"{gigabytes(design.node_bytes)} | {gigabytes(design.network_bytes)}"
                seconds = f"{design.seconds:.3f}" if design.seconds else "0"
                kept = f"{gigabytes(design.tables.total)} | {gigabytes(design.rest.total)}"
                lines.append(f"| {model} | {num_ranks} | {label} | {received} | {seconds} | {kept} |")
    return "\n".join(lines)


def table_of_the_group():
    lines = []
    sizes = memory_group_bytes(2048, 128, 8, 2)
    for name, (direction, operation) in GROUP_COLLECTIVES.items():
        lines.append(f"| {name}: {operation} | {direction} | {FORMULAS[name].replace('-', MINUS)} | {sizes[name]:,} |")
    return "\n".join([*lines, f"| all | | | {sum(sizes.values()):,} |"])


def pair(values, digits):
    return " and ".join(f"{value:.{digits}f}" for value in values)


def figures(configurations, cluster):
    small, large = configurations.values()

    def design(config, name, num_ranks=8, **changes):
        return communication_costs(config, num_ranks, **{**STEP, **cluster, **changes})[name]

    def changed(config, **fields):
        return PeerConfig.from_dict(config.to_dict() | fields)

    def dense(config):
        return changed(config, feed_forward_types=["dense"] * config.num_hidden_layers)

    num_tokens = STEP["tokens_per_rank"] * STEP["micro_batches"]
    of_group = memory_group_bytes(2048, 128, 8, 2)
    exposed = sum(size for name, size in of_group.items() if name != "hidden states")
    both = (small, large)
    return {
        "twins": pair((model_costs(dense(config)).parameters / 1e9 for config in both), 1),
        "num_layers": pair((config.feed_forward_types.count("peer") for config in both), 0),
        "totals": pair((model_costs(config).parameters / 1e9 for config in both), 0),
        "compute": pair((3 * model_costs(config).flops * num_tokens / 400e12 for config in both), 2),
        "tables": gigabytes(2 * 1024**2 * 2048 * 2),
        "whole": pair((design(config, "ddp_factors", 1).kept_bytes / 1e9 for config in both), 0),
        "pools": gigabytes(design(changed(small, num_experts=256**2), "ddp_factors").tables.total),
        "in_node": gigabytes(design(small, "memory_group_fsdp2").node_bytes),
        "fsdp2_in_node": gigabytes(design(small, "fsdp2").node_bytes),
        "fsdp2_eight": f"{design(small, 'fsdp2', 64, micro_batches=8).seconds:.1f}",
        "group_eight": f"{design(small, 'memory_group_fsdp2', 64, micro_batches=8).seconds:.1f}",
        "layer_small": gigabytes(2 * small.num_experts * small.hidden_size * 2),
        "layer_large": gigabytes(2 * large.num_experts * large.hidden_size * 2),
        "shared": gigabytes(
            design(changed(large, share_experts_across_layers=True), "memory_group_fsdp2").tables.total
        ),
        "group_of_32": gigabytes(design(large, "memory_group_fsdp2", 32, ranks_per_node=32).tables.total),
        "exposed": f"{1e3 * exposed * STEP['tokens_per_rank'] / cluster['node_bandwidth']:.2f}",
    }


@pytest.fixture(scope="module")
def text():
    return PAGE.read_text()


@pytest.fixture(scope="module")
def arguments():
    """The configurations and the cluster of the page's code."""
    names = {}
    (code,) = [code for _, code in code_blocks(PAGE, "python") if "communication_costs" in code]
    exec(code, names)
    return names["configurations"], names["cluster"]


def test_the_table_of_designs(text, arguments):
    assert table_of_designs(*arguments) in text


def test_the_table_of_a_memory_group(text):
    assert table_of_the_group() in text


def test_the_formulas_are_what_is_computed():
    for sizes in (
        {"G": 8, "d": 2048, "A": 128, "e": 2},
        {"G": 3, "d": 9, "A": 5, "e": 4},
        {"G": 1, "d": 4, "A": 2, "e": 2},
    ):
        counted = memory_group_bytes(sizes["d"], sizes["A"], sizes["G"], sizes["e"])
        for name, formula in FORMULAS.items():
            product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
            assert eval(product, dict(sizes)) == counted[name], name


@pytest.mark.parametrize("phrase", PHRASES)
def test_figures_in_sentences(text, arguments, phrase):
    assert phrase.format(**figures(*arguments)) in " ".join(text.split())


def test_what_the_page_reads_from_the_table(arguments):
    configurations, cluster = arguments
    for config in configurations.values():
        by_ranks = {ranks: communication_costs(config, ranks, **STEP, **cluster) for ranks in (8, 16, 32, 64, 512)}
        for ranks, costs in by_ranks.items():
            assert costs["memory_group_fsdp2"].node_bytes < costs["fsdp2"].node_bytes / 10
            assert costs["memory_group_fsdp2"].seconds < costs["fsdp2"].seconds / 2
            names = {each.name for each in costs["memory_group"].received}
            assert ("gradients of tables" in names) == (ranks >= 32), "four groups or more sum densely"
            assert ("factors of tables" in names) == (ranks == 16)
            assert (costs["ddp_factors"] == costs["ddp"]) == (ranks >= 64)
            assert costs["ddp_factors"].received_bytes <= costs["ddp"].received_bytes
        assert by_ranks[64]["fsdp2"].kept_bytes < by_ranks[64]["memory_group_fsdp2"].kept_bytes
    small, large = (communication_costs(config, 8) for config in configurations.values())
    assert small["memory_group_fsdp2"].kept_bytes < 80e9 < large["memory_group_fsdp2"].kept_bytes
