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
"""
What `benchmark.py` compares, and the process that measures one contender of it: a job in JSON is its only argument, and
for each of the job's tasks it prints a line of JSON.

Retrieval costs all PEER contenders the same FLOPs: PEER-pytorch's heads have sub-keys of their own where ours share
them, but each query meets as many. None normalizes queries. Weights are random and do not stand for a trained layer's.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from modeling_peer import PeerConfig, PeerForCausalLM, configuration_path
from modeling_peer.expert_generations import first_generation
from modeling_peer.expert_kernels_cpu import CpuKernels
from modeling_peer.feed_forward_dense import DenseFeedForward
from modeling_peer.feed_forward_peer import ExpertPool, PeerFeedForward
from modeling_peer.feed_forward_pkm import PkmFeedForward
from modeling_peer.key_grid import grid_size
from modeling_peer.memory_advice import advise_huge_pages
from modeling_peer.optim.row_adamw import RowAdamW


# One-token steps of a decoding measurement, and the tokens before them.
DECODED_TOKENS, PROMPT_TOKENS = 16, 64


@dataclass(frozen=True)
class Task:
    """One measurement: a contender, what it does, and at which size. `indices` are those of the experts alone."""

    contender: str
    operation: str
    hidden_size: int = 512
    num_experts: int = 1024**2
    num_tokens: int = 1024
    num_retrieval_heads: int = 8
    num_experts_per_head: int = 16
    query_size: int = 256
    dtype: str = "float32"
    indices: str | None = None

    @property
    def num_active(self) -> int:
        """Experts that a token runs."""
        return self.num_retrieval_heads * self.num_experts_per_head

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def table_bytes(self) -> int:
        """Of one table of experts."""
        return self.num_experts * self.hidden_size * self.torch_dtype.itemsize


def peer_config(task: Task, **fields) -> PeerConfig:
    """The configuration of our layers at a task's size."""
    sizes = ("hidden_size", "num_experts", "num_retrieval_heads", "num_experts_per_head", "query_size")
    fields = {"num_attention_heads": 1, "num_hidden_layers": 1, "query_norm": None} | fields
    fields = {"sparse_expert_gradients": True, "intermediate_size": 4 * task.hidden_size} | fields
    return PeerConfig(**{name: getattr(task, name) for name in sizes}, **fields)


def peer_eager(task: Task) -> nn.Module:
    """Algorithm 1 as printed, with the gradients that torch gives it."""
    return PeerFeedForward(peer_config(task, expert_kernels="eager", sparse_expert_gradients=False), 0)


def peer_pytorch(task: Task) -> nn.Module:
    """The PyPI package `peer-pytorch`, set up to compute what our layer does."""
    from PEER_pytorch import PEER

    return PEER(
        task.hidden_size,
        heads=task.num_retrieval_heads,
        num_experts=task.num_experts,
        num_experts_per_head=task.num_experts_per_head,
        dim_key=task.query_size // 2,
        non_competing_scores=False,
    )


def doge_cdmoe(task: Task) -> nn.Module:
    """The cross-domain experts of Doge in the library; a shared expert comes with them, here of one neuron."""
    from transformers.models.doge.modeling_doge import DogeCDMoE, DogeConfig

    class RoutedExperts(DogeCDMoE):
        def forward(self, hidden_states):
            return super().forward(hidden_states)[0]

    return RoutedExperts(
        DogeConfig(
            hidden_size=task.hidden_size,
            intermediate_size=1,
            num_attention_heads=1,
            hidden_act="gelu",
            num_experts=task.num_experts,
            num_experts_per_tok=task.num_active,
        )
    )


class EmbeddingBagMemory(nn.Module):
    """Product-key memory as the PyPI package `product-key-memory` computes it, less its norm of queries."""

    def __init__(self, task: Task):
        super().__init__()
        self.num_heads, self.k = task.num_retrieval_heads, task.num_experts_per_head
        self.to_queries = nn.Linear(task.hidden_size, self.num_heads * task.query_size, bias=False)
        size = grid_size(task.num_experts)
        self.keys = nn.Parameter(torch.empty(self.num_heads, size, 2, task.query_size // 2))
        self.values = nn.EmbeddingBag(task.num_experts, task.hidden_size, mode="sum")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        queries = self.to_queries(hidden_states).view(-1, 2, self.num_heads, self.keys.shape[-1])
        scores, ranks = torch.einsum("tphd,hnpd->thpn", queries, self.keys).topk(self.k)
        scores = scores[:, :, 0, :, None] + scores[:, :, 1, None]
        indices = ranks[:, :, 0, :, None] * self.keys.shape[1] + ranks[:, :, 1, None]
        scores, best = scores.flatten(2).topk(self.k)
        indices = indices.flatten(2).gather(-1, best).flatten(1)
        return self.values(indices, per_sample_weights=scores.softmax(-1).flatten(1)).view_as(hidden_states)


def dense(task: Task) -> nn.Module:
    """The two-matrix feed-forward, of width 4 d."""
    width = 4 * task.hidden_size
    return nn.Sequential(
        nn.Linear(task.hidden_size, width, bias=False), nn.GELU(), nn.Linear(width, task.hidden_size, bias=False)
    )


def named_model(name: str) -> Callable[[Task], nn.Module]:
    """A whole model by the name of its configuration."""
    return lambda task: PeerForCausalLM(AutoConfig.from_pretrained(configuration_path(name)))


def mid_model(task: Task, **fields) -> nn.Module:
    """A model of twelve layers at a task's size, its query norm as in the paper."""
    num_heads = max(1, task.hidden_size // 64)
    return PeerForCausalLM(
        peer_config(task, num_hidden_layers=12, num_attention_heads=num_heads, query_norm="batch", **fields)
    )


# Contenders by name, in the order of tables and plots.
CONTENDERS: dict[str, Callable[[Task], nn.Module]] = {
    "peer": lambda task: PeerFeedForward(peer_config(task), 0),
    "peer_eager": peer_eager,
    "peer_pytorch": peer_pytorch,
    "doge_cdmoe": doge_cdmoe,
    "pkm": lambda task: PkmFeedForward(peer_config(task), 0),
    "pkm_embedding_bag": EmbeddingBagMemory,
    "dense": dense,
    "dense_gated": lambda task: DenseFeedForward(peer_config(task), 0),
    "expert_part": lambda task: ExpertPool(peer_config(task), [first_generation(peer_config(task))]),
    "peer-tiny": named_model("peer-tiny"),
    "dense-tiny": named_model("dense-tiny"),
    "peer-mid": mid_model,
    "dense-mid": lambda task: mid_model(task, feed_forward_types=["dense"] * 12),
}
OURS = ("peer", "pkm", "expert_part", "peer-mid", "peer-tiny")
NUM_TABLES = {"pkm": 1, "pkm_embedding_bag": 1, "dense": 0, "dense_gated": 0, "dense-tiny": 0, "dense-mid": 0}


def build(task: Task, device: str) -> nn.Module:
    """A contender with random weights, drawn at a speed that suits tables of gigabytes: they repeat."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(task.torch_dtype)
    try:
        with no_init_weights(), torch.device(device):
            module = CONTENDERS[task.contender](task)
    finally:
        torch.set_default_dtype(default)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
            continue
        values = torch.randn(min(parameter.numel(), 2**22), device=device) * 0.02
        for piece in parameter.data.view(-1).split(len(values)):
            piece.copy_(values[: len(piece)])
    return module


def expert_kernels(module: nn.Module, device: str, allow_fallback: bool) -> str | None:
    """What runs the experts of one of our modules. Raises `RuntimeError` if it is not what is made for the device."""
    names = {part.kernels for part in module.modules() if hasattr(part, "kernels")}
    fastest = {"cpu": "cpu", "cuda": "triton"}[device]
    if names - {fastest} and not allow_fallback:
        raise RuntimeError(
            f"Experts run by {sorted(names)} here, not {fastest!r}: --allow_fallback measures them too."
        )
    return ", ".join(sorted(names)) or None


def unavailable_reason(task: Task, device: str, built: bool) -> str | None:
    """Why a task cannot be measured here: what it needs, at least, is more memory than there is, or a package."""
    if task.contender == "peer_pytorch" and find_spec("PEER_pytorch") is None:
        return "needs `pip install peer-pytorch`"
    dense_gradients = task.contender not in OURS
    copies = {"forward_backward": 1 + dense_gradients, "step": 3 + dense_gradients}.get(task.operation, 1)
    needed = (copies - built) * NUM_TABLES.get(task.contender, 2) * task.table_bytes
    if task.contender in ("peer_eager", "peer_pytorch", "doge_cdmoe"):  # they gather the rows of all active experts
        needed += 3 * task.num_tokens * task.num_active * task.hidden_size * task.torch_dtype.itemsize
    if task.contender == "doge_cdmoe":  # and this one scores all experts for every token
        needed += 16 * task.num_tokens * task.num_experts
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    if needed <= 0.9 * free:
        return None
    return f"needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def seconds(function: Callable[[], object], device: str) -> float:
    """How long a call takes; on a GPU, between two events."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """How far memory in use rises in a call. `None` where the system does not say."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = psutil.Process().memory_info().rss
    function()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def make_optimizer(module: nn.Module, task: Task) -> torch.optim.Optimizer:
    """Ours for our layers, whose gradients have the rows that a batch retrieved; torch's fastest for all others."""
    if task.contender not in OURS:
        return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    second_moment = "row" if task.operation == "step_row_moment" else "full"
    return RowAdamW(module.parameters(), lr=1e-4, second_moment=second_moment)


class LayerRun:
    """One operation of a layer, on new tokens at every repetition."""

    per_call = 1

    def __init__(self, module: nn.Module, task: Task, device: str, indices_file: str | None):
        self.module, self.task, self.device = module, task, device
        self.trained_indices = torch.load(indices_file) if task.indices == "trained" else None
        self.optimizer = make_optimizer(module, task) if task.operation.startswith("step") else None

    def prepare(self) -> None:
        """Draws tokens, and throws the last gradients away, what a training step does itself."""
        task = self.task
        self.inputs = [torch.randn(1, task.num_tokens, task.hidden_size, device=self.device, dtype=task.torch_dtype)]
        self.gradient = torch.randn_like(self.inputs[0])
        if task.contender == "expert_part":
            indices = draw_indices(task, self.trained_indices).to(self.device)
            weights = torch.rand(indices.shape, device=self.device, dtype=task.torch_dtype)
            self.inputs, self.gradient = [self.inputs[0][0], indices, weights], self.gradient[0]
        if task.operation != "forward":
            self.inputs[0].requires_grad_()  # as everywhere but in a first layer
        if self.optimizer is None:
            self.module.zero_grad()

    def __call__(self) -> None:
        if self.task.operation == "forward":
            with torch.no_grad():
                self.module(*self.inputs)
            return
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.module(*self.inputs).backward(self.gradient)
        if self.optimizer is not None:
            self.optimizer.step()

    def facts(self) -> dict:
        """What is measured once, aside of time."""
        self.prepare()
        self.module.zero_grad()
        CpuKernels.gradient_memory.release()  # it counts as memory that a step takes
        facts = {"peak_bytes": peak_bytes(self, self.device)}
        if self.optimizer is not None:
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            facts["state_bytes"] = sum(s.numel() * s.element_size() for s in states if isinstance(s, torch.Tensor))
        if self.task.contender == "expert_part":
            facts["unique_rows"] = self.inputs[1].unique().numel()
        elif self.task.contender in OURS:
            with torch.no_grad():
                facts["unique_rows"] = self.module.router(self.inputs[0])[0].unique().numel()
        return facts


def draw_indices(task: Task, trained: torch.Tensor | None) -> torch.Tensor:
    """Experts `[num_tokens, num_active]`: uniform, by Zipf's law, or of random tokens of a trained model."""
    shape = (task.num_tokens, task.num_active)
    if task.indices == "uniform":
        return torch.randint(task.num_experts, shape)
    if task.indices == "zipf":
        share = torch.arange(1, task.num_experts + 1, dtype=torch.float64).reciprocal().cumsum(0)
        ranks = torch.searchsorted(share, torch.rand(shape, dtype=torch.float64) * share[-1])
        return torch.randperm(task.num_experts)[ranks]
    tokens = trained.view(-1, task.num_active)
    return tokens[torch.randint(len(tokens), shape[:1])].long()


class DecodeRun:
    """A few tokens of a model's greedy decoding, one at a time, after a prompt."""

    per_call = DECODED_TOKENS

    def __init__(self, module: nn.Module, task: Task, device: str, indices_file: str | None):
        self.model, self.device = module.eval(), device

    @torch.no_grad()
    def prepare(self) -> None:
        """Reads a random prompt."""
        prompt = torch.randint(self.model.config.vocab_size, (1, PROMPT_TOKENS), device=self.device)
        self.output = self.model(prompt, use_cache=True)

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(DECODED_TOKENS):
            token = self.output.logits[:, -1:].argmax(-1)
            self.output = self.model(token, cache=self.output.cache, use_cache=True)

    def facts(self) -> dict:
        return {}


class MachineRun:
    """What the machine does at best, in bytes or FLOPs a call: `work`. Floors come from it."""

    per_call = 1

    def __init__(self, module: nn.Module, task: Task, device: str, indices_file: str | None):
        self.task, self.device = task, device
        self.count = min(task.num_tokens * task.num_active, task.num_experts)
        width, queries = task.hidden_size, task.num_retrieval_heads * task.query_size
        keys, half = grid_size(task.num_experts), task.query_size // 2
        products = {
            "query_product": (task.num_tokens, width, queries),
            "query_product_dx": (task.num_tokens, queries, width),
            "query_product_dw": (queries, task.num_tokens, width),
            "key_product": (2 * task.num_tokens * task.num_retrieval_heads, half, keys),
        }
        if task.operation in products:
            rows, inner, columns = products[task.operation]
            dtype = torch.float32 if task.operation == "key_product" else task.torch_dtype
            self.left, self.right = (self._new(*shape, dtype=dtype) for shape in ((rows, inner), (columns, inner)))
            self.out = self._new(rows, columns, dtype=dtype)
            self.work = 2 * rows * inner * columns
        else:
            self.table = self._new(task.num_experts, width, dtype=task.torch_dtype)
            self.out = self._new(self.count, width, dtype=task.torch_dtype)
            self.work = self.count * width * task.torch_dtype.itemsize * (1 + (task.operation == "copy"))

    def _new(self, *shape, dtype):
        return advise_huge_pages(torch.empty(*shape, dtype=dtype, device=self.device)).fill_(0.5)

    def prepare(self) -> None:
        """Draws rows, none twice."""
        if hasattr(self, "table"):
            self.rows = torch.randperm(self.task.num_experts, device=self.device)[: self.count]

    @torch.no_grad()
    def __call__(self) -> None:
        operation = self.task.operation
        if operation == "row_read_bag":  # the best of these two
            bags = self.rows[: self.count // 128 * 128].view(-1, 128) if self.count >= 128 else self.rows[None]
            F.embedding_bag(bags, self.table, mode="sum")
        elif operation == "row_read_select":
            step = 512 if self.device == "cpu" else self.count  # what is written stays in the cache
            for rows in self.rows.split(step):
                torch.index_select(self.table, 0, rows, out=self.out[: len(rows)])
        elif operation == "write":
            self.out.fill_(1.0)
        elif operation == "copy":
            self.out.copy_(self.table[: self.count])
        else:
            torch.mm(self.left, self.right.T, out=self.out)

    def facts(self) -> dict:
        return {"work": self.work}


def measure(task: Task, module: nn.Module | None, job: dict) -> dict:
    """Times of a task's repetitions, in seconds, and its facts if the job asks for them."""
    device = job["device"]
    kind = {"machine": MachineRun}.get(task.contender, DecodeRun if task.operation == "decode" else LayerRun)
    result = {}
    if task.contender in OURS:
        result["kernels"] = expert_kernels(module, device, job["allow_fallback"])
    try:
        run = kind(module, task, device, job["indices"])
        for _ in range(1 if device == "cpu" else 5):  # compiles, tunes, allocates the optimizer's state
            run.prepare()
            run()
        if job["facts"]:
            result |= run.facts()
        times = []
        for _ in range(job["repetitions"]):
            run.prepare()
            times.append(seconds(run, device) / run.per_call)
    except torch.OutOfMemoryError:
        return {"seconds": [], "reason": "out of memory"}
    return {"seconds": times, **result}


def run_job(job: dict) -> Iterator[dict]:
    """Measures the tasks of a job, each as soon as the one before is asked for."""
    torch.manual_seed(job["seed"])
    tasks = [Task(**fields) for fields in job["tasks"]]
    # A module is built once for all that it does at a size.
    for _, group in groupby(tasks, lambda task: replace(task, operation="", num_tokens=0, indices=None)):
        module = None
        for task in group:
            reason = unavailable_reason(task, job["device"], built=module is not None)
            if reason is None and module is None and task.contender != "machine":
                module = build(task, job["device"])
            result = {"seconds": [], "reason": reason} if reason else measure(task, module, job)
            if module is not None:
                module.zero_grad()  # the next one may need the memory
            yield {**vars(task), **result}


if __name__ == "__main__":
    for record in run_job(json.loads(sys.argv[1])):
        print(json.dumps(record), flush=True)
