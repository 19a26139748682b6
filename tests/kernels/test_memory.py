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
"""Memory of a million experts: loading, forward and generation take only that of the rows that tokens read."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoConfig

from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.feed_forward_peer import PeerFeedForward
from modeling_peer.memory_advice import ReusedMemory


ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

# Peak resident memory in MB, from the moment that `start_of_peak()` is called.
MEMORY = """
import sys
import threading
from pathlib import Path
def start_of_peak():
    Path("/proc/self/clear_refs").write_text("5")
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
class OwnMemory:
    "The peak of RssAnon, which the system keeps no peak of, while the block lasts: read every two milliseconds."
    def __enter__(self):
        self.peak, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, resident("RssAnon"))
    def __exit__(self, *error):
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, resident("RssAnon"))
def advised(address):
    "Whether the mapping at an address is advised to be read at random."
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(number, 16) for number in words[0].split("-"))
            here = start <= address + 2**20 < end
        elif here and words[0] == "VmFlags:":
            return "rr" in words
"""


def run(script: str, *arguments) -> dict:
    """What a script prints last, as JSON, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", MEMORY + script, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def write_with_holes(folder: Path, config: PeerConfig) -> int:
    """
    A bfloat16 checkpoint of a model that is never made: the expert tables are holes in its file, the rest is small and
    random. Returns the size of the file.
    """
    config.dtype = torch.bfloat16
    config.architectures = ["PeerForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = PeerForCausalLM(AutoConfig.from_pretrained(folder)).state_dict()
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        dtype = torch.bfloat16 if tensor.dtype == torch.float32 and "running" not in name else tensor.dtype
        size = tensor.numel() * dtype.itemsize
        label = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}[dtype]
        header[name] = {"dtype": label, "shape": list(tensor.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
        for name, entry in header.items():
            if name == "__metadata__" or "expert_pool" in name or entry["dtype"] == "I64":
                continue
            file.seek(8 + len(text) + entry["data_offsets"][0])
            values = torch.ones(entry["shape"]) if "norm" in name else 0.02 * torch.randn(entry["shape"])
            values = values.to(torch.bfloat16) if entry["dtype"] == "BF16" else values
            file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
    return 8 + len(text) + start


def test_a_million_experts_generate_in_less_than_a_gigabyte_of_own_memory(tmp_path):
    """
    Pages of the checkpoint's file count as resident too, as many as experts were read, but belong to the page cache; what
    the process needs for itself stays the same for a prompt that reads most of the file.
    """
    config = PeerConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_hidden_layers=2,
        feed_forward_types=["dense", "peer"],
        num_experts=1024**2,
        eos_token_id=None,
    )
    assert write_with_holes(tmp_path, config) > 4.3e9
    script = """
import json, torch
from modeling_peer import PeerForCausalLM
facts = {}
with OwnMemory() as loading:
    model = PeerForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
table = model.model.layers[1].mlp.expert_pool.up_proj
for name, length in (("short", 3), ("long", 1000)):
    start_of_peak()
    prompt = torch.arange(length)[None] * 31 + 5
    with OwnMemory() as generating:
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    facts[name] = {
        "tokens": tokens.shape[1], "own": generating.peak, "resident": resident("VmHWM"), "file": resident("RssFile")
    }
facts |= {
    "kernels": table.kernels, "dtype": str(table.weight.dtype), "loading": loading.peak,
    "advised": advised(table.weight.data_ptr()),
}
print(json.dumps(facts))
"""
    facts = run(script, tmp_path)
    assert (facts["kernels"], facts["dtype"]) == ("cpu", "torch.bfloat16")
    assert (facts["short"]["tokens"], facts["long"]["tokens"]) == (23, 1020)
    assert facts["loading"] < 500
    assert facts["short"]["own"] < 500 and facts["short"]["resident"] < 1000
    assert facts["long"]["own"] < 600
    assert facts["long"]["file"] > 1000  # so the rows were read, and are not counted as the process's own
    assert facts["advised"]  # files on a disk are read ahead, those with holes are not


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_no_gathered_rows_are_held(kernels):
    """Of 2,048 tokens and 128 experts each, `[T, A, d]` is 512 MB, twice."""
    script = """
import json, torch
from modeling_peer import PeerConfig
from modeling_peer.feed_forward_peer import PeerFeedForward
sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_experts": 128**2, "query_size": 64}
config = PeerConfig(**sizes, expert_kernels=sys.argv[1])
layer = PeerFeedForward(config, 0)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
def step(num_tokens):
    layer.zero_grad()
    layer(torch.randn(1, num_tokens, 512)).square().sum().backward()
step(8)
before = resident("VmRSS")
start_of_peak()
step(2048)
print(json.dumps({"more": resident("VmHWM") - before}))
"""
    # What remains: gradients of two tables of 32 MB, queries and scores of some MB each.
    assert run(script, kernels)["more"] < 300


def test_sparse_gradients_take_memory_for_the_rows_they_touch():
    script = """
import json, torch
from modeling_peer import PeerConfig
from modeling_peer.feed_forward_peer import PeerFeedForward
sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_experts": 512**2, "query_size": 64}
config = PeerConfig(**sizes, sparse_expert_gradients=True)
layer = PeerFeedForward(config, 0)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
before = resident("VmRSS")
start_of_peak()
layer(torch.randn(1, 32, 512)).square().sum().backward()
print(json.dumps({"more": resident("VmHWM") - before}))
"""
    # 4,096 rows at most, of 2 KB, in each of two tables; a dense gradient would be 512 MB for each.
    assert run(script)["more"] < 80


class TestReusedMemory:
    SHAPE = (4096, 1024)  # 16 MB

    def test_it_is_reused_only_when_nothing_refers_to_it(self):
        memory = ReusedMemory()
        values = memory.empty(*self.SHAPE, dtype=torch.float32)
        address = values.data_ptr()
        gradient = torch.sparse_coo_tensor(
            torch.arange(4096)[None], values, (9999, 1024), is_coalesced=True, check_invariants=False
        )
        del values
        assert memory.empty(*self.SHAPE, dtype=torch.float32).data_ptr() != address
        view = gradient.values()[5:]
        del gradient
        assert memory.empty(*self.SHAPE, dtype=torch.float32).data_ptr() != address
        storage = view.untyped_storage()
        del view
        assert memory.empty(*self.SHAPE, dtype=torch.float32).data_ptr() != address
        del storage
        fewer = memory.empty(4000, 1024, dtype=torch.float32)
        others = [memory.empty(*self.SHAPE, dtype=torch.float32) for _ in range(2)]
        assert address in {tensor.data_ptr() for tensor in (fewer, *others)}

    def test_it_is_not_reused_while_another_process_may_have_it(self):
        memory = ReusedMemory()
        values = memory.empty(*self.SHAPE, dtype=torch.float32).share_memory_()
        address = values.data_ptr()
        del values
        assert memory.empty(*self.SHAPE, dtype=torch.float32).data_ptr() != address

    def test_release_frees_what_is_not_in_use(self):
        memory = ReusedMemory()
        kept = memory.empty(*self.SHAPE, dtype=torch.float32)
        memory.empty(*self.SHAPE, dtype=torch.float32)
        memory.release()
        assert [block.memory.data_ptr() for block in memory._blocks] == [kept.data_ptr()]

    def test_blocks_that_do_not_fit_are_freed(self):
        memory = ReusedMemory()
        for rows in (4096, 8192, 32768, 4096):
            memory.empty(rows, 1024, dtype=torch.bfloat16)
            assert len(memory._blocks) == 1

    def test_a_step_reuses_that_of_the_last(self):
        config = PeerConfig(hidden_size=512, num_attention_heads=8, num_experts=128**2, sparse_expert_gradients=True)
        layer, addresses = PeerFeedForward(config, 0), []
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        for _ in range(3):
            layer.zero_grad()
            layer(torch.randn(1, 256, 512)).square().sum().backward()
            tables = layer.expert_pool.up_proj, layer.expert_pool.down_proj
            addresses.append({table.weight.grad._values().data_ptr() for table in tables})
        assert len(addresses[0]) == 2
        assert addresses[0] == addresses[1] == addresses[2]


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
