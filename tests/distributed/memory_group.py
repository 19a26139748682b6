# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
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
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from train import RANK, WORLD_SIZE, layout, local, whole, whole_state
from transformers import Trainer
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups, shard_experts
from modeling_peer.experts import expert_tables
from modeling_peer.feed_forward import PeerFeedForward
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.optim.frozen_rows import freeze_rows
from modeling_peer.parallel import gradient_exchange, split_initialization, token_exchange
from modeling_peer.parallel.gradient_exchange import average_gradients
from modeling_peer.parallel.split_initialization import make_split_model
from modeling_peer.router import ProductKeyRouter


ROWS_PER_STEP = 4
STEPS = 6

# Of the pools: tokens of the joint batch, those of each process of several, and experts of a token.
NUM_TOKENS, NUM_ACTIVE = 13, 5
UNEVEN = {2: [13, 0], 4: [6, 2, 5, 0]}

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
    "replicated": MODELS["rms_norm"],
}
# How, if not as all of them; see `train_in_loop`.
OPTIONS = {
    "gated_experts": {"second_moment": "row"},
    "grown": {"second_moment": "row"},
    "idle": {"idle": True},
    "compiled": {"compiled": True},
    "frozen": {"freezes": True},
}
ON_FOUR = {
    "loops": ("pkm", "shared_pool", "grown", "many_experts", "idle", "replicated", "rms_norm", "frozen"),
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
    The part of the joint batch that this process sees. If `idle`, the last process learns from none of it, and its
    neighbor from what it would have seen. Attention takes no empty batch: there is a row without targets.
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
    idle: bool = False,
    compiled: bool = False,
    freezes: bool = False,
) -> tuple[dict, dict]:
    """
    The weights and statistics after clipped steps, and what is seen of each step: where a process may be `idle`, PEER
    layers `compiled` in several processes, and every second expert frozen in the midst of the training (`freezes`).
    """
    groups = expert_parameter_groups(model.train(), learning_rate=1e-2, weight_decay=0.1)
    # With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    optimizer = RowAdamW(groups, second_moment=second_moment, eps=1e-2)
    if compiled and WORLD_SIZE > 1:
        # PEER layers alone: to compile what FSDP2 does around all layers takes minutes.
        for module in model.modules():
            if isinstance(module, PeerFeedForward):
                module.compile(backend="aot_eager", dynamic=True)
    facts = {"losses": [], "gradient_norms": [], "in_factors": []}
    frozen = {}
    for step in range(steps):
        if freezes and step == FROZEN_FROM:
            freeze_every_second(model)
            tables = expert_tables(model).items()
            frozen = {f"frozen.{name}.weight": whole(table.weight.detach()).clone() for name, table in tables}
        optimizer.zero_grad()
        loss = joint_loss(model, rows_of_step(step), idle)
        loss.backward()
        facts["losses"].append(over_processes(loss))
        gradients = [local(parameter.grad) for parameter in model.parameters()]
        facts["in_factors"].append(sum(isinstance(gradient, FactoredGradient) for gradient in gradients))
        # As `Trainer` clips where parameters are on different meshes.
        facts["gradient_norms"].append(Trainer._mixed_mesh_grad_norm(None, model, 0.5).item())
        optimizer.step()
    return whole_state(model) | frozen, facts


def freeze_every_second(model: torch.nn.Module) -> None:
    """Freezes every second expert."""
    for table in expert_tables(model).values():
        freeze_rows(table, "weight", torch.arange(len(table.weight)) % 2 == 0)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    joint_loss(model.train(), rows_of_step(0)).backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def run_pools(model: torch.nn.Module, memory: torch.nn.Module) -> tuple[dict, dict]:
    """
    The outputs of two pools, of PEER with gates and of PKM, for some hidden states of which the last process has none;
    their gradients, and the bytes that were received in forward and backward. All in the dtype of the models.
    """
    torch.manual_seed(3)
    pool, layer = model.model.expert_pool, memory.model.layers[1].mlp
    hidden_states, factors = torch.randn(2, NUM_TOKENS, 16)
    indices = torch.randint(64, (NUM_TOKENS, NUM_ACTIVE))
    weights = torch.rand(NUM_TOKENS, NUM_ACTIVE)
    hidden_states, factors, weights = (each.to(model.dtype) for each in (hidden_states, factors, weights))
    counts = [NUM_TOKENS] if WORLD_SIZE == 1 else UNEVEN[WORLD_SIZE]
    first = sum(counts[:RANK])
    own = slice(first, first + counts[RANK])
    hidden_states, weights = hidden_states[own].requires_grad_(), weights[own].requires_grad_()
    group = getattr(model.model, "memory_group", None)
    of_group = [counts[rank] for rank in ([0] if group is None else dist.get_process_group_ranks(group.columns))]
    tensors, facts = {}, {"num_tokens": max(of_group)}
    for name, run in {
        "peer": lambda: pool(hidden_states, indices[own], weights),
        "pkm": lambda: layer.sum_values(hidden_states, indices[own], weights),
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
    tables = {f"pool.{name}": table for name, table in pool.named_parameters()} | {"values": layer.values.weight}
    if group is not None and group.replicas is not None:
        average_gradients(tables.values(), group.replicas)
    return tensors | {name: whole(table.grad) for name, table in tables.items()}, facts


@contextlib.contextmanager
def counted_exchanges() -> Iterator[dict[str, int]]:
    """Counts how often gradients are averaged over replicas inside, and of how many tables by factors or by rows."""
    counted = dict.fromkeys(("average_gradients", "_average_factors", "_average_rows"), 0)
    functions = {name: mock.Mock(wraps=getattr(gradient_exchange, name)) for name in counted}
    with mock.patch.multiple(gradient_exchange, **functions):
        yield counted
    counted |= {name: function.call_count for name, function in functions.items()}


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


def order_of_a_forward(model: torch.nn.Module) -> list[str]:
    """What the PEER layers of a model do in a forward, in order."""
    events = []
    all_to_all, all_gather = dist.all_to_all_single, token_exchange.all_gather

    def watched_all_to_all(output, part, group=None, async_op=False):
        events.append("hidden states start" if async_op else "outputs")
        return all_to_all(output, part, group=group, async_op=async_op)

    def watched_all_gather(output, part, group=None):
        events.append("indices" if part.dtype == torch.int32 else "weighted activations")
        return all_gather(output, part, group=group)

    for router in (each for each in model.modules() if isinstance(each, ProductKeyRouter)):
        router.register_forward_hook(lambda *_: events.append("retrieval"))
    with (
        mock.patch.object(dist, "all_to_all_single", watched_all_to_all),
        mock.patch.object(token_exchange, "all_gather", watched_all_gather),
    ):
        joint_loss(model.train(), rows_of_step(0))
    return events


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
    def __init__(self, output: Path, group_size: int):
        self.output, self.group_size = output, group_size

    def start(self, name: str) -> Path:
        return self.output / f"{name}-begin-{RANK}"

    def load(self, name: str, **arguments) -> torch.nn.Module:
        if WORLD_SIZE > 1:
            replicas = self.group_size if name == "replicated" else 1
            arguments["distributed_config"] = DistributedConfig(
                dp_replicate_size=replicas, fsdp_size=WORLD_SIZE // replicas, ep_size=self.group_size
            )
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
            model = make_split_model(PeerForCausalLM, tiny_config("peer", "dense", num_experts=4096), **arguments)
        self.hand_over("new", whole_state(model), {"training": model.training, "largest": largest.num_elements})

    def refusals(self) -> None:
        """The messages with which models are refused."""
        size, config = self.group_size, tiny_config("peer")
        own = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=size)
        other = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=size // 2 if RANK else size)
        both = DistributedConfig(fsdp_size=1, tp_size=WORLD_SIZE, ep_size=WORLD_SIZE)
        cases = {
            "configuration": (tiny_config("peer", num_experts_per_head=2 + RANK), own),
            "group": (config, other),
            "tensor_parallel": (config, both),
            "unknown": (config, {"fsdp_size": WORLD_SIZE, "ep_sizes": size}),
        }
        messages = {name: refusal(make_split_model, PeerForCausalLM, *case) for name, case in cases.items()}
        torch.manual_seed(RANK)
        messages["seed"] = refusal(make_split_model, PeerForCausalLM, config, own)
        grid = (4 + RANK) ** 2
        messages["tables"] = refusal(shard_experts, tiny_model(tiny_config("peer", num_experts=grid)), size)
        torch.manual_seed(0)
        messages["hooks"] = refusal(run_with_a_hook, make_split_model(PeerForCausalLM, config, own))
        frozen = tiny_model(config)
        freeze_every_second(frozen)
        messages["frozen"] = refusal(shard_experts, frozen, size)
        messages["parts"] = refusal(shard_experts(tiny_model(config), size).save_pretrained, self.output / "parts")
        self.hand_over("refusals", {}, messages)

    def run(self) -> None:
        loops = ON_FOUR["loops"] if WORLD_SIZE == 4 else LOOPS
        trainers = ON_FOUR["trainers"] if WORLD_SIZE == 4 else [name for name in train.CASES if name != "moe"]
        # Before there is a process group: afterward only the first process would write.
        for name in loops:
            tiny_model(LOOPS[name]).save_pretrained(self.start(name))
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
