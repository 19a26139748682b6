# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a memory group does in one process, in a group of gloo that the tests join for their time."""

from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import tiny_config, tiny_model
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import Trainer
from two_processes import run_on_two_processes, save_parts

from modeling_peer import (
    ExpertBackground,
    PeerForCausalLM,
    SparseFinetuningCallback,
    add_experts,
    quantize_experts,
    shard_experts,
)
from modeling_peer.ops.experts import run_expert_pool
from modeling_peer.parallel.columns import ExpertColumns, MemoryGroup
from modeling_peer.parallel.memory_group import form_memory_group
from modeling_peer.parallel.releases import HAS_PARALLEL_STYLES, timeout_of_default_group
from modeling_peer.parallel.token_exchange import TokenExchange
from modeling_peer.router import ForwardPass


TIMEOUT = timedelta(hours=3)

pytestmark = pytest.mark.skipif(not HAS_PARALLEL_STYLES, reason="memory groups need Transformers 5.24")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1, timeout=TIMEOUT)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_in_one_process_a_model_stays_whole():
    model = tiny_model(tiny_config("peer", "pkm"))
    before = [(weight, weight.detach().clone()) for weight in model.parameters()]
    assert shard_experts(model, 1) is model
    assert not hasattr(model.model, "memory_group")
    for weight, (same, values) in zip(model.parameters(), before, strict=True):
        assert weight is same and torch.equal(weight, values)


def test_one_process_is_no_group_of_two():
    with pytest.raises(ValueError, match="`ep_size`"):
        shard_experts(tiny_model(tiny_config("peer")), 2)


def test_a_model_is_split_once():
    model = tiny_model(tiny_config("peer"))
    form_memory_group(model, 1, "cpu")
    with pytest.raises(ValueError, match="split already: `shard_experts`"):
        shard_experts(model, 1)


def test_a_split_that_is_refused_leaves_the_model_whole(monkeypatch):
    def refuse(style, module, param, mesh, parameter_name):
        if "down_proj" in parameter_name:
            raise ValueError(parameter_name)

    monkeypatch.setattr(ExpertColumns, "validate_param", refuse)
    model, tokens = tiny_model(tiny_config("peer")), torch.arange(1, 13).view(2, 6)
    expected = model(tokens).logits
    with pytest.raises(ValueError, match="down_proj"):
        form_memory_group(model, 1, "cpu")
    assert torch.equal(model(tokens).logits, expected)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_processes_agree_once_on_the_number_of_tokens_of_a_forward_pass(group):
    memory_group, forward_pass = MemoryGroup(group, None), ForwardPass(learns=True)
    counted = []
    memory_group._most_tokens = lambda tokens: counted.append(len(tokens)) or 3
    for num_tokens in (3, 2):  # another process has more
        memory_group.begin(True, None, (torch.zeros(1, num_tokens, 4), None, forward_pass))
        assert memory_group.exchange(torch.zeros(num_tokens, 4), 4).most_tokens == 3
    assert counted == [3]


@pytest.mark.parametrize("kernels", ["eager", "torch", "cpu", "auto"])
@pytest.mark.parametrize("names", [("peer", "pkm"), ("pkm", "peer")])
def test_a_group_of_one_computes_what_whole_tables_do(kernels, names):
    """Whatever kernels are named, and with the time-out of the default group."""
    config = tiny_config(*names, expert_kernels=kernels, gated_experts=True)
    tokens = torch.arange(1, 13).view(2, 6)
    expected = tiny_model(config)(tokens).logits
    model: PeerForCausalLM = tiny_model(config)
    form_memory_group(model, 1, "cpu")
    torch.testing.assert_close(model(tokens).logits, expected)
    own = model.model.memory_group.columns
    assert own is not dist.group.WORLD
    assert own._get_backend(torch.device("cpu")).options._timeout == timeout_of_default_group() == TIMEOUT


def test_what_is_exchanged_under_autocast_is_in_float32():
    model = tiny_model(tiny_config("peer")).train()
    form_memory_group(model, 1, "cpu")
    tokens = torch.arange(1, 13).view(2, 6)
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanged:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
    assert [call.args[0].dtype for call in exchanged.call_args_list] == [torch.float32] * 4


UNEVEN, WIDTH, PART = (5, 2), 7, 4  # tokens of each process, columns of whole tables, and of the first process


def run_pool(rank: int | None) -> list[torch.Tensor]:
    """The output of a pool and all of its gradients: of one of two processes, or of one with the tokens of both."""
    torch.manual_seed(0)
    hidden_states, up, down = torch.randn(sum(UNEVEN), WIDTH), torch.randn(9, WIDTH), torch.randn(9, WIDTH)
    rows, weights = torch.randint(9, (sum(UNEVEN), 3)), torch.rand(sum(UNEVEN), 3)
    exchange = {}
    if rank is not None:
        rows, hidden_states, weights = (each.split(UNEVEN)[rank] for each in (rows.int(), hidden_states, weights))
        up, down = (each.split(PART, dim=1)[rank] for each in (up, down))
        exchange["exchange"] = TokenExchange(dist.group.WORLD, WIDTH, UNEVEN[rank], max(UNEVEN))
    inputs = [each.clone().requires_grad_() for each in (hidden_states, weights, up, down)]
    hidden_states, weights, up, down = inputs
    output = run_expert_pool(hidden_states, rows, weights, up, None, down, torch.relu, "torch", **exchange)
    output.square().sum().backward()
    return [output.detach(), *(each.grad for each in inputs)]


def run_split(rank: int | None) -> dict[str, torch.Tensor]:
    """Of one of two processes or of one: two continuations, one of them its own, and norms before and after clipping."""
    model = tiny_model(tiny_config("peer", "pkm"))
    model = model if rank is None else shard_experts(model, 2)
    tokens = torch.arange(1, 11)[None]
    continued = {
        f"continued-{each}": model.eval().generate(
            tokens[:, : 3 + 4 * each], max_new_tokens=2 + 3 * each, do_sample=False, synced_gpus=True
        )
        for each in ((0, 1) if rank is None else (rank,))
    }
    # No group of processes is made in a forward: the others might not be there.
    with mock.patch("torch.distributed.distributed_c10d._new_process_group_helper", None):
        model.train()(tokens, labels=tokens).loss.backward()
    norms = [Trainer._mixed_mesh_grad_norm(None, model, 0.5) for _ in range(2)]
    return continued | {"norms": torch.stack(norms).detach()}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """What both ranks found, by parts."""
    folder = tmp_path_factory.mktemp("two")
    run_on_two_processes(save_parts, str(folder), (run_pool, run_split))
    return {name: [torch.load(folder / f"{name}-{rank}") for rank in (0, 1)] for name in ("run_pool", "run_split")}


def test_a_loop_of_ones_own_clips_and_generates_unequal_lengths(of_ranks):
    """As the page says: other parameters are plain tensors, as DistributedDataParallel has them."""
    expected = run_split(None)
    assert expected["norms"][0] > 1
    for rank, found in enumerate(of_ranks["run_split"]):
        assert_close(found["norms"], expected["norms"])
        assert torch.equal(found[f"continued-{rank}"], expected[f"continued-{rank}"])


def test_two_processes_with_different_numbers_of_tokens(of_ranks):
    of_ranks = of_ranks["run_pool"]
    of_tokens, of_tables = zip(*(each[:3] for each in of_ranks), strict=True), [each[3:] for each in of_ranks]
    found = [*map(torch.cat, of_tokens), *(2 * torch.cat(each, dim=1) for each in zip(*of_tables, strict=True))]
    assert_close(found, run_pool(None))  # gradients of tables are the mean over the two


def test_what_needs_whole_tables_refuses_split_ones(group):
    model = tiny_model(tiny_config("peer"))
    background = ExpertBackground.measure(model, [{"input_ids": torch.arange(1, 7)}], progress_bar=False)
    form_memory_group(model, 1, "cpu")
    for change, said in (
        (lambda: add_experts(model, 16), "before a model is split"),
        (lambda: SparseFinetuningCallback(model, background), "split over processes"),
        (lambda: quantize_experts(model), "cannot be quantized"),
    ):
        with pytest.raises(ValueError, match=said):
            change()
