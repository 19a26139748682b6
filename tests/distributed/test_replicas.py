# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables of replicas get the gradient of the joint batch: two processes under DistributedDataParallel are as one."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from graft_models import grafted
from peft import LoraConfig, get_peft_model
from release_names import enable_checkpointing
from slow_tests import slow
from table_gradients import dense, literal_rows, random_parts, tables_of
from tiny_models import random_tokens, tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM
from two_processes import run_on_two_processes, save_parts

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Factors
from modeling_peer.optim.embedding_rows import embeddings_in_factors
from modeling_peer.parallel import gradient_exchange
from modeling_peer.parallel.gradient_exchange import average_gradients


# With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
EPS = 1e-3
CLIPPING = 0.05


def new_model(**fields):
    torch.manual_seed(0)
    fields = {"num_experts": 32**2, "share_experts_across_layers": True, **fields}
    return PeerForCausalLM(tiny_config("peer", "pkm", "peer", **fields)).train()


def new_graft():
    return grafted(num_experts=32**2).train()


def new_adapter():
    """Whose pools are trained in copies that PEFT makes, under names that are not those of the model."""
    config = LoraConfig(r=4, target_modules=["query_proj"], modules_to_save=["expert_pool"])
    model = new_model(share_experts_across_layers=False)
    torch.manual_seed(1)
    return get_peft_model(model, config).train()


def new_tables():
    """A model that is frozen except for its tables."""
    model = new_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for table in tables_of(model).values():
        table.requires_grad_(True)
    return model


def new_llama():
    """A model of another family with an embedding of many rows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).train()
    model.other = torch.nn.Embedding(512, 16)  # as encoder and decoder may share one
    model.other.weight = model.get_input_embeddings().weight
    return model


def embeddings_by_rows(model):
    return RowAdamW(expert_parameter_groups(model, 1e-2, weight_decay=0.1, embeddings=True), eps=EPS)


def by_rows(model):
    return RowAdamW(expert_parameter_groups(model, 1e-2, weight_decay=0.1), eps=EPS)


def without_decay(model):
    """By which parameters that a loss does not use stay, also where their gradients are zeros in place of none."""
    return RowAdamW(expert_parameter_groups(model, 1e-2, weight_decay=0.0), eps=EPS)


def stock(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS, weight_decay=0.1)


def causal_loss(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def loss_of_sums(model, tokens):
    """One that is a sum over tokens."""
    return model(input_ids=tokens).logits.square().sum() / 100


def loss_of_an_inner_state(model, tokens):
    """As of a probe: the last layer and the head are left out."""
    return 10 * model(input_ids=tokens, output_hidden_states=True).hidden_states[2].square().mean()


def halves(step):
    return random_tokens(4, 12, seed=step).chunk(2)


def one_of_four(step):
    return random_tokens(4, 12, seed=step).split([3, 1])


# Of each case: the model, its optimizer, the loss, and how a batch is split; how it is wrapped and made different.
CASES = {
    "factors": {"fields": {"gated_experts": True}},
    "small tables": {"fields": {"num_experts": 6**2}},
    "stock optimizer": {"optimizer": stock},
    "optimizer made late": {"late": True},
    "all micro-batches synchronized": {"no_sync": False},
    "unequal": {"fields": {"query_norm": "rms"}, "split": one_of_four, "loss": loss_of_sums},
    "checkpointed": {"checkpointing": {"use_reentrant": False}},
    "reentrant": {"checkpointing": {"use_reentrant": True}},
    "unused parameters": {"wrapping": {"find_unused_parameters": True, "gradient_as_bucket_view": True}},
    "inner state": {
        "loss": loss_of_an_inner_state,
        "optimizer": without_decay,
        "wrapping": {"find_unused_parameters": True},
    },
    "graft": {"model": new_graft},
    "adapter": {"model": new_adapter},
    "tables alone": {"model": new_tables},
    "embedding": {"model": new_llama, "optimizer": embeddings_by_rows},
}
# How often tables are averaged, once for each of three steps if not said otherwise, and how many DDP leaves to us, of
# some cases: it refuses to train none itself.
AVERAGES = {"all micro-batches synchronized": 6, "adapter": 0, "tables alone": 0}
IGNORED = {"factors": 4, "adapter": 4, "graft": 2, "tables alone": 0, "embedding": 1}


def training(
    rank=None,
    model=None,
    fields=None,
    optimizer=by_rows,
    loss=causal_loss,
    split=halves,
    late=False,
    no_sync=True,
    checkpointing=None,
    wrapping=None,
):
    """
    Three steps of two micro-batches, clipped: norms, kinds of the gradients of tables, and what the model has become.
    Of one process (`rank=None`) both parts of a batch.
    """
    model = new_model(**(fields or {})) if model is None else model()
    if rank == 1:  # the other's values are to come
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
        model.enable_input_require_grads()
    steps = None if late else optimizer(model)
    wrapped = model if rank is None else DistributedDataParallel(model, **(wrapping or {}))
    steps = optimizer(model) if late else steps
    norms, kinds = [], set()
    for step in range(3):
        steps.zero_grad()
        for micro in range(2):
            parts = split(10 * step + micro)
            waits = rank is not None and no_sync and micro == 0
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                if rank is not None:
                    loss(wrapped, parts[rank]).backward()
                elif split is halves:  # BatchNorm is over the joint batch
                    loss(model, torch.cat(parts)).backward()
                else:
                    (sum(loss(model, part) for part in parts) / 2).backward()
        tables = [*tables_of(model).values(), *(each.weight for each in embeddings_in_factors(model))]
        kinds |= {type(table.grad).__name__ for table in tables if table.requires_grad}
        norms.append(clip_grad_norm_(model.parameters(), CLIPPING))
        steps.step()
    ignored = len(wrapped.parameters_to_ignore) if rank is not None else None
    return {"norms": torch.stack(norms), "kinds": kinds, "state": model.state_dict(), "ignored": ignored}


def trainings(rank):
    """All cases, each with the number of times that gradients of tables were averaged."""
    found, average, calls = {}, gradient_exchange.average_gradients, []
    with mock.patch.object(gradient_exchange, "average_gradients", lambda *args: calls.append(1) or average(*args)):
        for name, case in CASES.items():
            calls.clear()
            found[name] = training(rank, **case) | {"averages": len(calls)}
    return found


SHAPES = {0: [(3, 4), (6, 2)], 1: [(8, 1)]}  # tokens and entries of each


def random_gradients(rank, num_rows):
    """Gradients of five tables of a process: two share their entries; some are dense, without entries or not there."""
    table = torch.empty(num_rows, 19)
    first, second = (random_parts(10 * rank + seed, num_rows, 19, SHAPES[rank]) for seed in (0, 1))
    second = [
        Factors(each.coefficients, each.tokens, other.assignments) for each, other in zip(second, first, strict=True)
    ]
    in_factors = [FactoredGradient(table, parts) for parts in (first, second)]
    others = random_parts(10 * rank + 2, num_rows, 19, SHAPES[rank])
    exact = [literal_rows(parts, num_rows, 19) for parts in (first, second, others)]
    zeros = torch.zeros(num_rows, 19, dtype=torch.float64)
    if rank == 0:
        gradients = [*in_factors, FactoredGradient(table, others).to_rows(), None, FactoredGradient(table, [])]
        return gradients, [*exact, zeros, zeros]
    gradients = [*in_factors, FactoredGradient(table, others), None, FactoredGradient(table, list(others))]
    return gradients, [*exact, zeros, exact[2]]


def averages(rank):
    """Of large tables and of small ones, while an optimizer takes their factors."""
    found = {}
    for num_rows in (1000, 7):
        tables = [nn.Parameter(torch.zeros(num_rows, 19)) for _ in range(5)]
        _optimizer = RowAdamW([{"params": tables, "rows": True}])
        for table, gradient in zip(tables, random_gradients(rank, num_rows)[0], strict=True):
            table.grad = gradient
        average_gradients(tables, dist.group.WORLD)
        shared = [getattr(table.grad, "factors", None) for table in tables[:2]]
        found[num_rows] = {
            "rows": [dense(table.grad).clone() for table in tables],
            "kinds": [type(table.grad).__name__ for table in tables],
            "shared": shared[0].assignments is shared[1].assignments,
        }
        for table in tables:  # what is added to an average
            table.grad += random_gradients(1 - rank, num_rows)[0][0]
        found[num_rows]["sums"] = [dense(table.grad) for table in tables]
    return found


def gradients_of(rank=None, compiled=None):
    """Of a batch, or a half of it, in a model that is compiled before or after it is wrapped."""
    torch.manual_seed(0)
    model = PeerForCausalLM(tiny_config("peer", num_experts=32**2, query_norm="rms")).train()
    _optimizer = by_rows(model) if compiled == "after" else stock(model)
    tokens = random_tokens(4, 12)
    if rank is None:
        causal_loss(model, tokens).backward()
    else:
        inner = torch.compile(model, backend="aot_eager") if compiled == "before" else model
        wrapped = DistributedDataParallel(inner)
        wrapped = torch.compile(wrapped, backend="aot_eager") if compiled == "after" else wrapped
        causal_loss(wrapped, tokens.chunk(2)[rank]).backward()
    return {name: dense(parameter.grad) for name, parameter in model.named_parameters()}


def compiled(rank):
    return [gradients_of(rank, when) for when in ("before", "after")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found, by parts."""
    folder = tmp_path_factory.mktemp("replicas")
    run_on_two_processes(save_parts, str(folder), (trainings, averages))
    return {name: [torch.load(folder / f"{name}-{rank}") for rank in (0, 1)] for name in ("trainings", "averages")}


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_one_process(found, name):
    """Also where values differ at first: those of the first process are taken. The norm is the same on both."""
    case = CASES[name]
    expected = training(**case)
    ranks = [rank[name] for rank in found["trainings"]]
    for rank in ranks:
        assert_close(rank["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
        assert rank["kinds"] == expected["kinds"]
        for key, tensor in expected["state"].items():
            assert_close(rank["state"][key], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert torch.equal(ranks[0]["norms"], ranks[1]["norms"])
    for key, tensor in ranks[0]["state"].items():
        if "running_" not in key:
            assert torch.equal(tensor, ranks[1]["state"][key]), key
    assert ranks[0]["kinds"] == ({"Tensor"} if case.get("optimizer") is stock else {"FactoredGradient"})
    assert ranks[0]["averages"] == AVERAGES.get(name, 3)
    assert ranks[0]["ignored"] == IGNORED.get(name, 3)
    assert ranks[0]["norms"].min() > CLIPPING


def test_keep_their_tables_where_torch_does_not_tell_of_them(monkeypatch):
    """Or nobody would average the gradients of tables that DistributedDataParallel leaves alone."""
    model = new_model()
    assert set(model._ddp_params_and_buffers_to_ignore) == tables_of(model).keys()
    for owner, name in (
        (DistributedDataParallel, "_active_ddp_module"),
        (torch.autograd.Variable, "_execution_engine"),
    ):
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            assert model._ddp_params_and_buffers_to_ignore == []


@slow
def test_compiled_models_have_the_gradients_of_the_joint_batch(tmp_path):
    """Compiled before or after they are wrapped."""
    run_on_two_processes(save_parts, str(tmp_path), (compiled,))
    expected = gradients_of()
    for first, second in zip(*(torch.load(tmp_path / f"compiled-{rank}") for rank in (0, 1)), strict=True):
        for name, gradient in expected.items():
            assert torch.equal(first[name], second[name])
            assert_close(first[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("num_rows", [1000, 7])
def test_averages_are_means_and_the_same_on_all(found, num_rows):
    """And stay in factors, of which tables with the same assignments share them if the factors were exchanged."""
    ranks = [rank[num_rows] for rank in found["averages"]]
    exact = [random_gradients(rank, num_rows)[1] for rank in (0, 1)]
    for place in range(5):
        mean = (exact[0][place] + exact[1][place]) / 2
        assert_close(ranks[0]["rows"][place].double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(ranks[0]["rows"][place], ranks[1]["rows"][place])
        for rank in (0, 1):
            assert_close(ranks[rank]["sums"][place].double(), mean + exact[1 - rank][0], rtol=1e-5, atol=1e-5)
    assert ranks[0]["kinds"] == ["FactoredGradient"] * 2 + ["Tensor"] + ["FactoredGradient"] * 2
    assert ranks[1]["kinds"] == ["FactoredGradient"] * 5
    assert ranks[0]["shared"] == ranks[1]["shared"] == (num_rows == 1000)


def test_averages_of_many_replicas_in_bfloat16_are_rounded_once(monkeypatch):
    """In several pieces, of which a slice of the last is padded. Threads stand for processes."""
    monkeypatch.setattr(gradient_exchange, "PIECE_ELEMENTS", 100)
    store, size = dist.HashStore(), 16
    gradients = torch.randn(size, 37, 19, generator=torch.Generator().manual_seed(0)).bfloat16()

    def averaged(rank):
        group, gloo = dist.ProcessGroup(store, rank, size), dist.ProcessGroup.BackendType.GLOO
        group._set_default_backend(gloo)
        group._register_backend(torch.device("cpu"), gloo, dist.ProcessGroupGloo(store, rank, size))
        rows = gradients[rank].clone()
        gradient_exchange._average_rows(rows, group)
        return rows

    with ThreadPoolExecutor(size) as threads:
        first, *others = threads.map(averaged, range(size))
    mean = gradients.double().mean(0)
    assert (first.double() - mean).norm() < 2e-3 * mean.norm()
    assert all(torch.equal(first, other) for other in others)


def test_widths_are_those_of_the_widest_part_on_all_processes():
    """Or they would decide differently what moves fewer bytes."""
    found = []
    for rank in range(2):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        mesh = init_device_mesh("cpu", (2,))
        part = torch.zeros(4, 3 - rank)  # of five columns
        table = DTensor.from_local(part, mesh, [Shard(1)], run_check=False, shape=(4, 5), stride=(5, 1))
        found.append(gradient_exchange._widest_part(table))
        dist.destroy_process_group()
    assert found == [3, 3]
