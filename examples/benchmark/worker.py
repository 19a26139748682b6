# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The process that measures one contender of the benchmark: its only argument is a job in JSON, and for each task of the
job it prints a line of JSON.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.nn import functional as F

from benchmark.contenders import NUM_TABLES, OURS, Task, build
from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.configuration_peer import grid_size
from modeling_peer.experts import expert_tables
from modeling_peer.memory.advice import advise_huge_pages
from modeling_peer.ops.kernels import resolve_kernels


# One-token steps of a decoding measurement, and the number of tokens of its prompt.
DECODED_TOKENS, PROMPT_TOKENS = 16, 64


def expert_kernels(module: nn.Module, allow_fallback: bool) -> str | None:
    """Names of the kernels of a module's experts. Raises `RuntimeError` for others than C, unless `allow_fallback`."""
    configured = {part.config.expert_kernels for part in module.modules() if hasattr(part, "config")} - {"auto"}
    # The last parameter of a quantized table is its scales, whose dtype the kernels know.
    tables = [[*table.parameters()][-1] for table in expert_tables(module).values()]
    names = configured or {resolve_kernels(None, table) for table in tables}
    if names - {"cpu"} and not allow_fallback:
        raise RuntimeError(
            f"Experts run on the kernels {sorted(names)} here instead of 'cpu': --allow_fallback measures them too."
        )
    return ", ".join(sorted(names)) or None


def unavailable_reason(task: Task, built: bool) -> str | None:
    """Why a task cannot be measured here: it needs more memory than is free, or a package. `None` if it can."""
    if task.contender == "peer_pytorch" and find_spec("PEER_pytorch") is None:
        return "needs `pip install peer-pytorch`"
    dense_gradients = task.contender not in OURS
    moments = {"forward_backward": 0, "step": 2, "step_row_moment": 1}
    copies = 1 + dense_gradients + moments[task.operation] if task.operation in moments else 1
    needed = (copies - built) * NUM_TABLES.get(task.contender, 2) * task.table_bytes
    if task.contender in ("peer_eager", "peer_pytorch", "doge_cdmoe"):  # these gather the rows of all active experts
        needed += 3 * task.num_tokens * task.num_active * task.hidden_size * task.torch_dtype.itemsize
    if task.contender == "doge_cdmoe":  # this one scores all experts for every token
        needed += 16 * task.num_tokens * task.num_experts
    free = psutil.virtual_memory().available
    if needed <= 0.9 * free:
        return None
    return f"needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def seconds(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object]) -> int | None:
    """The bytes by which memory use rises during a call. `None` where the system does not report it."""
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = psutil.Process().memory_info().rss
    function()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def make_optimizer(module: nn.Module, task: Task) -> torch.optim.Optimizer:
    """[`RowAdamW`] for layers of this package, whose gradients are factored; torch's fused AdamW for others."""
    if task.contender not in OURS:
        return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    second_moment = "row" if task.operation == "step_row_moment" else "full"
    return RowAdamW(expert_parameter_groups(module, 1e-4, weight_decay=0.01), second_moment=second_moment)


class LayerRun:
    """One operation of a layer, with new tokens in every repetition."""

    per_call = 1

    def __init__(self, module: nn.Module, task: Task, indices_file: str | None):
        self.module, self.task = module, task
        self.trained_indices = torch.load(indices_file) if task.indices == "trained" else None
        self.steps = task.operation.startswith("step")
        # A backward alone needs an optimizer too: without one that takes factors, gradients would be dense.
        self.optimizer = None if task.operation == "forward" else make_optimizer(module, task)

    def prepare(self) -> None:
        """Draws tokens and clears gradients, unless the measured training step does that itself."""
        task = self.task
        self.inputs = [torch.randn(1, task.num_tokens, task.hidden_size, dtype=task.torch_dtype)]
        self.gradient = torch.randn_like(self.inputs[0])
        if task.contender.startswith("expert_part"):
            indices = draw_indices(task, self.trained_indices)
            weights = torch.rand(indices.shape, dtype=task.torch_dtype)
            self.inputs, self.gradient = [self.inputs[0][0], indices, weights], self.gradient[0]
        if task.operation != "forward":
            self.inputs[0].requires_grad_()  # as in every layer but the first
        if not self.steps:
            self.module.zero_grad()

    def __call__(self) -> None:
        if self.task.operation == "forward":
            with torch.no_grad():
                self.module(*self.inputs)
            return
        if self.steps:
            self.optimizer.zero_grad()
        self.module(*self.inputs).backward(self.gradient)
        if self.steps:
            self.optimizer.step()

    def facts(self) -> dict:
        """Measurements besides time, made once: peak memory, optimizer state and the number of distinct rows."""
        self.prepare()
        self.module.zero_grad()
        facts = {"peak_bytes": peak_bytes(self)}
        if self.steps:
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            facts["state_bytes"] = sum(s.numel() * s.element_size() for s in states if isinstance(s, torch.Tensor))
        if self.task.contender.startswith("expert_part"):
            facts["unique_rows"] = self.inputs[1].unique().numel()
        elif self.task.contender in OURS:
            with torch.no_grad():
                facts["unique_rows"] = self.module.router(self.inputs[0])[0].unique().numel()
        return facts


def draw_indices(task: Task, trained: torch.Tensor | None) -> torch.Tensor:
    """Draw expert indices `(num_tokens, num_active)`: uniformly, by Zipf's law, or from those of a trained model."""
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
    """Greedy decoding of a few tokens, one at a time, after a prompt."""

    per_call = DECODED_TOKENS

    def __init__(self, module: nn.Module, task: Task, indices_file: str | None):
        self.model = module.eval()

    @torch.no_grad()
    def prepare(self) -> None:
        """Runs the forward of a random prompt."""
        prompt = torch.randint(self.model.config.vocab_size, (1, PROMPT_TOKENS))
        self.output = self.model(prompt, use_cache=True)
        # The name of the cache depends on the release of Transformers.
        self.cache = next(name for name in ("cache", "past_key_values") if name in self.output)

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(DECODED_TOKENS):
            token = self.output.logits[:, -1:].argmax(-1)
            self.output = self.model(token, **{self.cache: self.output[self.cache]}, use_cache=True)

    def facts(self) -> dict:
        return {}


class MachineRun:
    """A memory or matrix operation from which floors are derived. `work` is its bytes or FLOPs per call."""

    per_call = 1

    def __init__(self, module: nn.Module, task: Task, indices_file: str | None):
        self.task = task
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
        return advise_huge_pages(torch.empty(*shape, dtype=dtype)).fill_(0.5)

    def prepare(self) -> None:
        """Draws distinct rows."""
        if hasattr(self, "table"):
            self.rows = torch.randperm(self.task.num_experts)[: self.count]

    @torch.no_grad()
    def __call__(self) -> None:
        operation = self.task.operation
        if operation == "row_read_bag":  # of this and the next, the faster one counts
            bags = self.rows[: self.count // 128 * 128].view(-1, 128) if self.count >= 128 else self.rows[None]
            F.embedding_bag(bags, self.table, mode="sum")
        elif operation == "row_read_select":
            for rows in self.rows.split(512):  # small pieces: written rows stay in the cache
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
    """Seconds of all repetitions of a task, and its facts if the job asks for them."""
    kind = {"machine": MachineRun}.get(task.contender, DecodeRun if task.operation == "decode" else LayerRun)
    result = {}
    if task.contender in OURS:
        result["kernels"] = expert_kernels(module, job["allow_fallback"])
    run = kind(module, task, job["indices"])
    run.prepare()
    run()  # compiles, and allocates optimizer state
    if job["facts"]:
        result |= run.facts()
    times = []
    for _ in range(job["repetitions"]):
        run.prepare()
        times.append(seconds(run) / run.per_call)
    return {"seconds": times, **result}


def run_job(job: dict) -> Iterator[dict]:
    """Measures the tasks of a job one after the other, and yields a record of each."""
    torch.manual_seed(job["seed"])
    tasks = [Task(**fields) for fields in job["tasks"]]
    # A module is built once for all operations at one size.
    for _, group in groupby(tasks, lambda task: replace(task, operation="", num_tokens=0, indices=None)):
        module = None
        for task in group:
            reason = unavailable_reason(task, built=module is not None)
            if reason is None and module is None and task.contender != "machine":
                module = build(task)
            result = {"seconds": [], "reason": reason} if reason else measure(task, module, job)
            if module is not None:
                module.zero_grad()  # the next task may need the memory
            yield {**vars(task), **result}


if __name__ == "__main__":
    for record in run_job(json.loads(sys.argv[1])):
        print(json.dumps(record), flush=True)
