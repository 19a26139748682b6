# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of a million experts: loading, forward and generation take only that of the rows that tokens read."""

import json
import sys
from pathlib import Path

import pytest
import torch
from compare_disk import random_values, write_checkpoint
from script_runs import run_script
from slow_tests import slow
from tiny_models import tiny_config

from modeling_peer import PeerConfig
from modeling_peer.feed_forward import PeerFeedForward


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, which only Linux has")

# Peak resident memory in MB, from the moment that `start_of_peak()` is called.
MEMORY = """
import sys
from pathlib import Path
from common.machine import OwnMemory
def start_of_peak():
    Path("/proc/self/clear_refs").write_text("5")
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
def advised(address, flag="rr"):
    "Whether the mapping at an address is advised to be read at random, or by `hg` to come in huge pages."
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(number, 16) for number in words[0].split("-"))
            here = start <= address + 2**20 < end
        elif here and words[0] == "VmFlags:":
            return flag in words
"""


# A layer that `LAYER` makes, a step of which is `step(num_tokens)`.
LAYER = """
import json, torch
from modeling_peer import PeerConfig, RowAdamW, expert_parameter_groups
from modeling_peer.feed_forward import PeerFeedForward
sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_experts": int(sys.argv[1])**2, "query_size": 64}
layer = PeerFeedForward(PeerConfig(**sizes, expert_kernels=sys.argv[2]), 0)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
def step(num_tokens):
    layer.zero_grad()
    layer(torch.randn(1, num_tokens, 512)).square().sum().backward()
"""


def run(script: str, *arguments) -> dict:
    """What a script prints last, as JSON, in a process of its own."""
    return json.loads(run_script(MEMORY + script, *arguments, OMP_NUM_THREADS="1").splitlines()[-1])


def write_with_holes(folder: Path) -> None:
    """A bfloat16 checkpoint of 4.5 GB, whose expert tables are holes in its file: a million experts of width 1,024."""
    config = PeerConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_hidden_layers=2,
        feed_forward_types=["dense", "peer"],
        num_experts=1024**2,
        eos_token_id=None,
        dtype="bfloat16",
        architectures=["PeerForCausalLM"],
    )
    fill = lambda name, piece: None if "expert_pool" in name else random_values(name, piece)  # noqa: E731
    assert write_checkpoint(folder, config, fill) > 4.3e9


# Generates after a short and a long prompt, with rows read by page faults or from the disk.
GENERATE = """
import json, torch
from modeling_peer import PeerForCausalLM, keep_tables_on_disk
facts = {}
with OwnMemory(0.002) as loading:
    model = PeerForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    if sys.argv[2] == "disk":
        keep_tables_on_disk(model, buffer_bytes=2**24)
table = model.model.layers[1].mlp.expert_pool.up_proj
for name, length in (("short", 3), ("long", 1000)):
    start_of_peak()
    prompt = torch.arange(length)[None] * 31 + 5
    with OwnMemory(0.002) as generating:
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    facts[name] = {
        "tokens": tokens.shape[1], "own": generating.peak / 2**20, "resident": resident("VmHWM"), "file": resident("RssFile")
    }
facts |= {
    "dtype": str(table.weight.dtype), "loading": loading.peak / 2**20,
    "advised": advised(table.weight.data_ptr()),
}
print(json.dumps(facts))
"""


@slow
def test_a_million_experts_generate_in_less_than_a_gigabyte_of_own_memory(tmp_path):
    """
    Pages of the checkpoint's file count as resident too, as many as experts were read, but belong to the page cache; what
    the process needs for itself stays the same for a prompt that reads most of the file.
    """
    write_with_holes(tmp_path)
    facts = run(GENERATE, tmp_path, "mapped")
    assert facts["dtype"] == "torch.bfloat16"
    assert (facts["short"]["tokens"], facts["long"]["tokens"]) == (23, 1020)
    assert facts["loading"] < 500
    assert facts["short"]["own"] < 500 and facts["short"]["resident"] < 1000
    assert facts["long"]["own"] < 600
    assert facts["long"]["file"] > 1000  # so the rows were read, and are not counted as the process's own
    assert facts["advised"]  # files on a disk are read ahead, those with holes are not


@slow
def test_tables_on_a_disk_are_no_part_of_a_process(tmp_path):
    """The rest of the model, 0.2 GB, is: a prompt of 1,000 tokens reads its rows in pieces of 8 MB."""
    write_with_holes(tmp_path)
    facts = run(GENERATE, tmp_path, "disk")
    assert facts["long"]["tokens"] == 1020
    assert facts["long"]["own"] < 850
    assert facts["long"]["file"] < 500


@pytest.mark.parametrize("kernels", ["cpu", pytest.param("torch", marks=slow)])
def test_no_gathered_rows_are_held(kernels):
    """Of 2,048 tokens and 128 experts each, `[T, A, d]` is 512 MB, twice."""
    script = """
step(8)
before = resident("VmRSS")
start_of_peak()
step(2048)
print(json.dumps({"more": resident("VmHWM") - before}))
"""
    # What remains: gradients of two tables of 32 MB, queries and scores of some MB each.
    assert run(LAYER + script, 128, kernels)["more"] < 300


@slow
def test_factors_take_memory_for_tokens():
    script = """
optimizer = RowAdamW(expert_parameter_groups(layer, 1e-3))
def backward(num_tokens):
    step(num_tokens)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
backward(8)
before = resident("VmRSS")
start_of_peak()
backward(2048)
tables = layer.expert_pool.up_proj, layer.expert_pool.down_proj
factors = sum(part.nbytes for table in tables for part in table.weight.grad._sum.factors)
print(json.dumps({"more": resident("VmHWM") - before, "factors": factors}))
"""
    facts = run(LAYER + script, 512, "auto")
    # 2,048 tokens of 2 KB with 128 assignments of 12 bytes each, twice. The rows would take 512 MB for each table.
    assert facts["factors"] == 2 * 2048 * (2048 + 128 * 12)
    assert facts["more"] < 100


def test_the_layer_reads_no_weight_but_by_rows():
    """On the meta device nothing can be read; with tables there, what is left of a forward touches only their rows."""
    layer = PeerFeedForward(tiny_config(), 0).eval()
    hidden_states = torch.randn(1, 2, 24)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        expected = layer(hidden_states)
        indices = layer.router(hidden_states)[0].unique()
        for table in (layer.expert_pool.up_proj, layer.expert_pool.down_proj):
            others = torch.ones(36, dtype=torch.bool).index_fill_(0, indices, False)
            table.weight[others] = float("nan")
        assert torch.equal(layer(hidden_states), expected)


def test_tables_of_models_and_of_grafts_come_in_huge_pages():
    script = """
import json
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from modeling_peer import PeerConfig, PeerForCausalLM, PeerGraftConfig
from modeling_peer.experts import expert_tables
sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
model = PeerForCausalLM(PeerConfig(**sizes, feed_forward_types=["peer"], num_experts=256**2))
graft = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), PeerGraftConfig(num_experts=256**2))
tables = [table.weight for each in (model, graft) for table in expert_tables(each).values()]
print(json.dumps([advised(weight.data_ptr(), "hg") for weight in tables]))
"""
    assert json.loads(run_script(MEMORY + script).splitlines()[-1]) == [True] * 4
