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
Trains tiny models whose expert tables are split over memory groups, by the stock `Trainer` and by a plain loop, and in
one process on the joint batch.

    python memory_group.py OUTPUT                                     one process
    torchrun --nproc_per_node 4 memory_group.py OUTPUT --group-size 2 two groups of two, FSDP2 for the rest
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import train
from cases import IGNORED, MODELS, hand_over, outputs, padded_batch, random_rows, tiny_config, tiny_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from train import RANK, WORLD_SIZE, local, whole
from transformers import Trainer
from transformers.distributed import DistributedConfig

from modeling_peer import (
    ExpertBackground,
    PeerForCausalLM,
    RowAdamW,
    SparseFinetuningCallback,
    add_experts,
    expert_parameter_groups,
    fit_gates,
    freeze_experts,
    gradient_exchange,
    memory_group,
    shard_experts,
    split_initialization,
    token_exchange,
    train_added_experts_only,
)
from modeling_peer.expert_table import ExpertTable
from modeling_peer.factored_gradient import FactoredGradient
from modeling_peer.feed_forward_peer import PeerFeedForward
from modeling_peer.gradient_exchange import average_gradients
from modeling_peer.product_key_router import ProductKeyRouter


ROWS_PER_STEP = 4
STEPS = 6

# Of the pools: tokens of the joint batch, those of each process of several, and experts of a token.
NUM_TOKENS, NUM_ACTIVE = 13, 5
UNEVEN = {2: [13, 0], 4: [6, 2, 5, 0]}

OPEN_ADDITION = [{"layers": [1], "mode": "open", "num_experts": 17}]
FROZEN = range(0, 64, 2)  # experts
FROZEN_FROM = 3  # the step

# What the plain loop trains; on four processes, those of these names alone.
LOOPS = {
    **{name: MODELS[name] for name in ("pkm", "peer", "rms_norm", "gated_experts", "shared_pool", "grown")},
    # Of so many rows that replicas exchange factors of gradients, and not the sums of rows.
    "many_experts": tiny_config("peer", "dense", num_experts=4096, gated_experts=True),
    "beside_moe": tiny_config("moe", "peer", shared_expert_intermediate_size=10),
    "idle": MODELS["rms_norm"],
    "compiled": MODELS["gated_experts"],
    "frozen": tiny_config("peer", "pkm", gated_experts=True),
    "frozen_copies": MODELS["peer"],
    "added": MODELS["grown"],
    "open": tiny_config("dense", "peer", expert_additions=OPEN_ADDITION),
    "replicated": MODELS["rms_norm"],
    "bfloat16": MODELS["shared_pool"],
}
# How, if not as all of them; see `train_in_loop`.
OPTIONS = {
    # In which rounding without bias has to show.
    "shared_pool": {"steps": 10},
    "bfloat16": {"steps": 10},
    "gated_experts": {"second_moment": "row"},
    "grown": {"second_moment": "row"},
    "idle": {"idle": True},
    "compiled": {"compiled": True},
    "frozen": {"freezes": True},
    "frozen_copies": {"freezes": True, "optimizer_class": torch.optim.AdamW},
    "added": {"added_alone": True},
    "open": {"added_alone": True},
}
ON_FOUR = {
    "loops": ("pkm", "shared_pool", "grown", "many_experts", "idle", "replicated", "bfloat16", "rms_norm", "frozen"),
    "trainers": ("accumulated", "rows"),
}
# What the stock Trainer trains under DistributedDataParallel.
UNDER_DDP = ("left", "rows")


def rows_of_step(step: int) -> list[list[int]]:
    """Rows of the joint batch, of lengths that differ from process to process."""
    lengths = [(step * 5 + place * place * 3 + place) % 11 + 2 for place in range(ROWS_PER_STEP)]
    return [[1 + (token + step) % 60 for token in row] for row in random_rows(*lengths)]


def own_batch(rows: list[list[int]], idle: bool = False) -> dict[str, torch.Tensor]:
    """
    The part of the joint batch that this process sees.

    Args:
        idle (`bool`):
            Whether the last process learns from none of it, and its neighbor from what it would have seen. Attention in
            Transformers takes no empty batch: there is a row without targets.
    """
    size = ROWS_PER_STEP // WORLD_SIZE
    first, last = RANK * size, (RANK + 1) * size
    if idle and WORLD_SIZE > 1:
        first, last = (0, 0) if RANK == WORLD_SIZE - 1 else (first, last + size * (RANK == WORLD_SIZE - 2))
    if first < last:
        return padded_batch(rows[first:last], "right")
    batch = padded_batch([[1, 2]], "right")
    return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


def joint_loss(model: torch.nn.Module, rows: list[list[int]], idle: bool = False) -> torch.Tensor:
    """The part of this process in the mean loss over the targets of the joint batch, times the number of processes."""
    targets = sum(len(row) - 1 for row in rows)
    return WORLD_SIZE * model(**own_batch(rows, idle), num_items_in_batch=targets).loss


def over_processes(value: torch.Tensor) -> float:
    """The mean over all processes."""
    value = value.detach().double()
    if WORLD_SIZE > 1:
        dist.all_reduce(value)
    return value.item() / WORLD_SIZE


def train_in_loop(
    model: torch.nn.Module,
    steps: int = STEPS,
    second_moment: str = "full",
    optimizer_class: type[torch.optim.Optimizer] = RowAdamW,
    idle: bool = False,
    compiled: bool = False,
    freezes: bool = False,
    added_alone: bool = False,
) -> tuple[dict, dict]:
    """
    The weights and statistics after clipped steps, and what is seen of each step.

    Args:
        model (`torch.nn.Module`)
        steps (`int`): Their number.
        second_moment (`str`): Of [`RowAdamW`].
        optimizer_class (`type`): [`RowAdamW`], or `torch.optim.AdamW`.
        idle (`bool`): Whether a process learns from none of a batch, see `own_batch`.
        compiled (`bool`): Whether its PEER layers are compiled, where there are several processes.
        freezes (`bool`): Whether experts are frozen in the midst of the training.
        added_alone (`bool`): Whether only added experts are trained.
    """
    if added_alone:
        train_added_experts_only(model)
    groups = expert_parameter_groups(model.train(), learning_rate=1e-2, weight_decay=0.1)
    # With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    if optimizer_class is RowAdamW:
        optimizer = RowAdamW(groups, second_moment=second_moment, eps=1e-2)
    else:
        groups = [{key: value for key, value in group.items() if key != "rows"} for group in groups]
        optimizer = optimizer_class(groups, eps=1e-2, foreach=False)  # or torch takes DTensors of one mesh alone
    run: torch.nn.Module = model
    if WORLD_SIZE > 1 and not has_parts_of_all(model):
        run = torch.nn.parallel.DistributedDataParallel(model)
    if compiled and WORLD_SIZE > 1:
        compile_layers(model)
    facts = {"losses": [], "gradient_norms": [], "in_factors": []}
    frozen = {}
    for step in range(steps):
        if freezes and step == FROZEN_FROM:
            freeze_experts(model, FROZEN)
            frozen = {f"frozen.{name}": tensor for name, tensor in rows_of(model, FROZEN).items()}
        optimizer.zero_grad()
        loss = joint_loss(run, rows_of_step(step), idle)
        loss.backward()
        facts["losses"].append(over_processes(loss))
        gradients = [local(parameter.grad) for parameter in model.parameters()]
        facts["in_factors"].append(sum(isinstance(gradient, FactoredGradient) for gradient in gradients))
        # As `Trainer` clips where parameters are on different meshes.
        facts["gradient_norms"].append(Trainer._mixed_mesh_grad_norm(None, model, 0.5).item())
        optimizer.step()
    return {name: whole(tensor.detach()) for name, tensor in model.state_dict().items()} | frozen, facts


def compile_layers(model: torch.nn.Module) -> None:
    """PEER layers alone: to compile what FSDP2 does around all layers takes minutes."""
    for module in model.modules():
        if isinstance(module, PeerFeedForward):
            module.compile(backend="aot_eager", dynamic=True)


def has_parts_of_all(model: torch.nn.Module) -> bool:
    """Whether FSDP2 splits what a memory group does not."""
    return isinstance(model, FSDPModule)


def rows_of(model: torch.nn.Module, rows: range) -> dict[str, torch.Tensor]:
    """Copies of some rows of all expert tables."""
    return {
        f"{name}.weight": whole(module.weight.detach())[rows].clone()
        for name, module in model.named_modules()
        if isinstance(module, ExpertTable)
    }


def layout(model: torch.nn.Module) -> dict[str, list]:
    """Of each split parameter, the names of the mesh that it is split over and the shape that is held here."""
    return {
        name: [list(parameter.device_mesh.mesh_dim_names), list(parameter.to_local().shape)]
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    joint_loss(model.train(), rows_of_step(0)).backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def run_pools(model: torch.nn.Module, memory: torch.nn.Module) -> tuple[dict, dict]:
    """
    The outputs of two pools, of PEER with gates and of PKM, for some hidden states of which the last process has none;
    their gradients, and the bytes that were received in forward and backward. All in the dtype of the models.
    """
    torch.manual_seed(3)
    pool, values = model.model.expert_pool, memory.model.layers[1].mlp.values
    hidden_states, factors = torch.randn(2, NUM_TOKENS, 16)
    indices = torch.randint(64, (NUM_TOKENS, NUM_ACTIVE))
    weights = torch.rand(NUM_TOKENS, NUM_ACTIVE)
    hidden_states, factors, weights = (each.to(model.dtype) for each in (hidden_states, factors, weights))
    counts = [NUM_TOKENS] if WORLD_SIZE == 1 else UNEVEN[WORLD_SIZE]
    first = sum(counts[:RANK])
    own = slice(first, first + counts[RANK])
    hidden_states, weights = hidden_states[own].requires_grad_(), weights[own].requires_grad_()
    group = model.model.memory_group
    of_group = [counts[rank] for rank in ([0] if group is None else dist.get_process_group_ranks(group.columns))]
    tensors, facts = {}, {"num_tokens": max(of_group)}
    for name, run in {
        "peer": lambda: pool(hidden_states, indices[own], weights),
        "pkm": lambda: values(weights, indices[own]),
    }.items():
        with counted_bytes() as forward:
            output = run()
        with counted_bytes() as backward:
            # What is averaged over processes is a sum here.
            (WORLD_SIZE * output * factors[own]).sum().backward()
        tensors[f"{name}.output"] = output
        tensors[f"{name}.of_weights"] = weights.grad / WORLD_SIZE
        facts[name] = {"forward": forward, "backward": backward}
        weights.grad = None
    tensors["peer.of_hidden_states"] = hidden_states.grad / WORLD_SIZE
    tables = {f"pool.{name}": table for name, table in pool.named_parameters()} | {"values": values.weight}
    if group is not None and group.replicas is not None:
        average_gradients(tables.values(), group.replicas)
    return tensors | {name: whole(table.grad) for name, table in tables.items()}, facts


@contextlib.contextmanager
def counted_exchanges() -> Iterator[dict[str, int]]:
    """Counts how often gradients are averaged over replicas inside, and of how many tables by factors or by rows."""
    counted = dict.fromkeys(("average_gradients", "_average_factors", "_average_rows"), 0)

    def counting(name, function):
        def run(*arguments):
            counted[name] += 1
            return function(*arguments)

        return run

    with contextlib.ExitStack() as stack:
        for name in counted:
            counter = counting(name, getattr(gradient_exchange, name))
            stack.enter_context(mock.patch.object(gradient_exchange, name, counter))
        yield counted


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Counts what this process receives from others inside, by the sizes of the tensors of every collective."""
    counted: dict[str, int] = {}

    def counting(name, collective, received):
        def run(output, part, group=None, **options):
            others = dist.get_world_size(group) - 1
            counted[name] = counted.get(name, 0) + received(output.nbytes, others)
            return collective(output, part, group=group, **options)

        return run

    # Of an all-to-all and an all-gather, a process's own part stays where it is; a reduce-scatter adds one part of
    # each of the others to its own.
    kinds = {
        "all_to_all": (dist, "all_to_all_single", lambda nbytes, others: nbytes * others // (others + 1)),
        "all_gather": (token_exchange, "all_gather", lambda nbytes, others: nbytes * others // (others + 1)),
        "reduce_scatter": (token_exchange, "reduce_scatter", lambda nbytes, others: nbytes * others),
    }
    with contextlib.ExitStack() as stack:
        for name, (module, attribute, received) in kinds.items():
            counter = counting(name, getattr(module, attribute), received)
            stack.enter_context(mock.patch.object(module, attribute, counter))
        yield counted


class Started:
    """A collective that runs, until it is waited for."""

    def __init__(self, work, wait):
        self.work, self.waits = work, wait

    def wait(self):
        self.waits()
        return self.work.wait()


def order_of_a_forward(model: torch.nn.Module) -> list[str]:
    """What the PEER layers of a model do in a forward, in order."""
    events = []
    all_to_all, all_gather = dist.all_to_all_single, token_exchange.all_gather

    def watched_all_to_all(output, part, group=None, async_op=False):
        work = all_to_all(output, part, group=group, async_op=async_op)
        events.append("all-to-all starts" if async_op else "all-to-all")
        return Started(work, lambda: events.append("all-to-all is waited for")) if async_op else work

    def watched_all_gather(output, part, group=None):
        events.append("indices are gathered" if part.dtype == torch.int32 else "weighted activations are gathered")
        return all_gather(output, part, group=group)

    routers = [each for each in model.modules() if isinstance(each, ProductKeyRouter)]
    hooks = [each.register_forward_hook(lambda *_: events.append("experts are retrieved")) for each in routers]
    with (
        mock.patch.object(dist, "all_to_all_single", watched_all_to_all),
        mock.patch.object(token_exchange, "all_gather", watched_all_gather),
    ):
        joint_loss(model.train(), rows_of_step(0))
    for hook in hooks:
        hook.remove()
    return events


def process_groups(model: torch.nn.Module) -> dict[str, list[str]]:
    """The names of the groups that a model has, by what is sent in them."""
    sums, all_reduce = set(), dist.all_reduce

    def watched_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, **options):
        if op == dist.ReduceOp.SUM:
            sums.add((dist.group.WORLD if group is None else group).group_name)
        return all_reduce(tensor, op, group=group, **options)

    group = model.model.memory_group
    meshes = {weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)}
    with mock.patch.object(dist, "all_reduce", watched_all_reduce):
        joint_loss(model.train(), rows_of_step(0))
    return {
        "query norms": sorted(sums),
        "memory group": [group.columns.group_name],
        "replicas": [] if group.replicas is None else [group.replicas.group_name],
        "fsdp2": [mesh.get_group().group_name for mesh in meshes if mesh.mesh_dim_names == ("fsdp",)],
    }


def refusal(make: Callable, *arguments, **options) -> str:
    """The message with which a model is refused."""
    try:
        make(*arguments, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return "not refused"


def run_with_a_hook(model: PeerForCausalLM) -> None:
    model.model.layers[0].mlp.expert_pool.up_proj.register_forward_hook(lambda module, args, output: 2 * output)
    model(torch.zeros(1, 3, dtype=torch.long))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor with memory that is made inside."""

    num_elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta and not isinstance(result, DTensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


class Cases:
    """
    Args:
        output (`Path`): Where results go.
        group_size (`int`): Number of processes of a memory group, 1 in one process.
    """

    def __init__(self, output: Path, group_size: int):
        self.output = output
        self.group_size = group_size

    def save_start(self, name: str, config) -> None:
        """Before there is a process group: afterwards only the first process would write."""
        tiny_model(config).save_pretrained(self.start(name))

    def start(self, name: str) -> Path:
        return self.output / f"{name}-begin-{RANK}"

    def load(self, name: str, **arguments) -> torch.nn.Module:
        if name == "open" and WORLD_SIZE > 1:
            # The old keys are frozen, of which FSDP2 would take parts.
            return shard_experts(PeerForCausalLM.from_pretrained(self.start(name)), self.group_size)
        if WORLD_SIZE > 1:
            replicas = self.group_size if name == "replicated" else 1
            arguments["distributed_config"] = DistributedConfig(
                dp_replicate_size=replicas, fsdp_size=WORLD_SIZE // replicas, ep_size=self.group_size
            )
        if name == "bfloat16":
            arguments["dtype"] = torch.bfloat16
        return PeerForCausalLM.from_pretrained(self.start(name), **arguments)

    def hand_over(self, name: str, tensors: dict, facts: dict | None = None) -> None:
        hand_over(self.output, f"{name}-{RANK}", tensors, facts)

    def new_weights(self) -> None:
        """Weights that are drawn, of a model with a table that is larger than all else, and what it took to draw it."""
        arguments = {}
        if WORLD_SIZE > 1:
            arguments["distributed_config"] = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=self.group_size)
        torch.manual_seed(4)
        with mock.patch.object(split_initialization, "CHUNK_ELEMENTS", 512), LargestTensor() as largest:
            model = PeerForCausalLM.from_config(tiny_config("peer", "dense", num_experts=4096), **arguments)
        tensors = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        self.hand_over("new", tensors, {"training": model.training, "largest": largest.num_elements})

    def saved_beside_replicas(self) -> dict[str, str]:
        """Saves a model of which the tables alone are split; the message with which it is refused at first."""
        model = shard_experts(tiny_model(LOOPS["peer"]), self.group_size)
        folder = self.output / f"parts-{RANK}"
        try:
            model.save_pretrained(folder)
            message = "not refused"
        except ValueError as error:
            message = str(error)
        gathered = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        if RANK == 0:
            model.save_pretrained(folder, state_dict=gathered)
        return {"parts": message}

    def refusals(self) -> None:
        """The messages with which models are refused."""
        own = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=self.group_size)
        other = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=self.group_size // 2 if RANK else self.group_size)
        both = DistributedConfig(fsdp_size=1, tp_size=WORLD_SIZE, ep_size=WORLD_SIZE)
        pipeline = {"pp_size": WORLD_SIZE, "ep_size": WORLD_SIZE}  # Transformers makes no `DistributedConfig` of it
        theirs = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=self.group_size, ep_implementation="all_to_all")
        dispatched = {"model.layers.*.mlp.expert_pool": "ep_dispatch_experts"}
        their_plan = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=self.group_size, ep_plan=dispatched)
        config = tiny_config("peer")
        cases = {
            "width": (tiny_config("peer", hidden_size=16 + self.group_size // 2), own),
            "configuration": (tiny_config("peer", num_experts_per_head=2 + RANK), own),
            "group": (config, other),
            "tensor_parallel": (config, both),
            "pipeline_parallel": (config, pipeline),
            "implementation": (config, theirs),
            "plan": (config, their_plan),
        }
        from_config = PeerForCausalLM.from_config
        messages = {
            name: refusal(from_config, config, distributed_config=split) for name, (config, split) in cases.items()
        }
        with mock.patch.object(memory_group, "_own_release", lambda: f"0.{RANK}"):
            messages["release"] = refusal(from_config, config, distributed_config=own)
        torch.manual_seed(RANK)
        messages["seed"] = refusal(from_config, config, distributed_config=own)
        torch.manual_seed(0)
        # All raise, also that which lacks what another has.
        more = tiny_config("peer", **({"only_here": 1} if RANK == 0 else {}))
        messages["field"] = refusal(from_config, more, distributed_config=own)
        grid = (4 + RANK) ** 2
        messages["tables"] = refusal(shard_experts, tiny_model(tiny_config("peer", num_experts=grid)), self.group_size)
        torch.manual_seed(0)
        messages["hooks"] = refusal(run_with_a_hook, from_config(config, distributed_config=own))
        messages |= self.refused_of_a_split_model(own)
        self.hand_over("refusals", {}, messages | self.saved_beside_replicas())

    def refused_of_a_split_model(self, split: DistributedConfig) -> dict[str, str]:
        """The messages with which a split model refuses to get other experts, and one that is to be split."""
        config = tiny_config("peer")
        model = PeerForCausalLM.from_config(config, distributed_config=split)
        whole_model = tiny_model(config)
        background = ExpertBackground.measure(whole_model, [{"input_ids": [1, 2, 3]}], progress_bar=False)
        freeze_experts(whole_model, FROZEN)
        grown = PeerForCausalLM.from_config(LOOPS["open"], distributed_config=split)
        return {
            "growth": refusal(add_experts, model, 16),
            "gates": refusal(fit_gates, model, [], []),
            "sparse_finetuning": refusal(SparseFinetuningCallback, model, background),
            "frozen": refusal(shard_experts, whole_model, self.group_size),
            "old_keys": refusal(train_added_experts_only, grown),
        }

    def run(self) -> None:
        loops = ON_FOUR["loops"] if WORLD_SIZE == 4 else LOOPS
        trainers = ON_FOUR["trainers"] if WORLD_SIZE == 4 else [name for name in train.CASES if name != "moe"]
        for name in loops:
            self.save_start(name, LOOPS[name])
        for name in trainers:
            tiny_model(train.CASES[name][0]).save_pretrained(train.start_folder(self.output, name))
        for name in loops:
            if name == "replicated" and WORLD_SIZE > 1 and 2 * self.group_size != WORLD_SIZE:
                continue  # `ep_size` divides `fsdp_size`, which is a part of the processes
            model = self.load(name)
            facts = {"layout": layout(model)}
            with counted_exchanges() as facts["exchanges"]:
                tensors, steps = train_in_loop(model, **OPTIONS.get(name, {}))
            self.hand_over(f"loop-{name}", tensors, facts | steps)
        # Of another model: a forward without a backward leaves gathered parameters, which an optimizer must not get.
        self.hand_over("outputs", outputs(self.load("shared_pool")))
        self.hand_over("pools", *run_pools(self.load("shared_pool"), self.load("pkm")))
        in_bfloat16 = {"dtype": torch.bfloat16}
        self.hand_over(
            "pools-bfloat16", *run_pools(self.load("shared_pool", **in_bfloat16), self.load("pkm", **in_bfloat16))
        )
        self.hand_over("bfloat16", gradients(self.load("shared_pool", **in_bfloat16)))
        self.new_weights()
        if WORLD_SIZE > 1:
            self.hand_over("order", {}, {"events": order_of_a_forward(self.load("grown"))})
            self.hand_over("groups", {}, process_groups(self.load("grown")))
            self.refusals()
        for name in trainers:
            with counted_exchanges() as exchanges:
                train.train(name, self.output, WORLD_SIZE > 1, self.group_size)
            self.hand_over(f"{name}-exchanges", {}, exchanges)
        if WORLD_SIZE > 1:
            for name in UNDER_DDP:
                with counted_exchanges() as exchanges:
                    train.train(name, self.output / "ddp", False, self.group_size)
                self.hand_over(f"{name}-ddp-exchanges", {}, exchanges)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=1)
    arguments = parser.parse_args()
    Cases(arguments.output, arguments.group_size).run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
