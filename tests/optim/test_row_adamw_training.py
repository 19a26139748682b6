# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`RowAdamW` in the stock `Trainer`, and on tables that are split over two processes."""

from unittest import mock

import pytest
import torch
from release_names import CHECKPOINTING
from row_tables import WIDTH, assert_same, copied, random_gradients, random_table, rows_of, take_steps
from table_gradients import DenseRowAdamW
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing import assert_close
from trainer_worker import counting_sequences, logged, small_model, trainer_of
from two_processes import run_on_two_processes, save_parts

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Factors


def trainer_with_rows(folder, factored=True, second_moment="full", seed=0, optimizer_options=None, **options):
    """The stock trainer of a tiny model, as `examples/common/training.py` makes it."""
    model = small_model(
        "peer",
        "pkm",
        "peer",
        share_experts_across_layers=True,
        attention_dropout=0.1,
        seed=seed,
    )
    # In 16 bits later steps amplify the rounding of earlier ones, by processors differently.
    rate = 1e-3 if options.get("bf16") else 1e-2
    groups = expert_parameter_groups(model, learning_rate=rate, weight_decay=0.1, expert_lr_multiplier=2.0)
    trainer = trainer_of(model, folder, counting_sequences(40), max_steps=8, max_grad_norm=0.5, **options)
    trainer.optimizer = (RowAdamW if factored else DenseRowAdamW)(groups, second_moment=second_moment)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {CHECKPOINTING: True, "gradient_accumulation_steps": 2},
        {"bf16": True},
    ],
    ids=["plain", "accumulated", "checkpointed", "bfloat16"],
)
def test_gradients_in_factors_train_as_dense_ones(tmp_path, options):
    trainers, layouts = [], []
    for factored in (True, False):
        trainer = trainer_with_rows(tmp_path, factored=factored, **options)
        table = trainer.model.model.expert_pool.up_proj.weight
        trainer.optimizer.register_step_pre_hook(lambda *_, table=table: layouts.append(type(table.grad)))
        trainer.train()
        trainers.append(trainer)
    factored, dense = trainers
    assert layouts == [FactoredGradient] * 8 + [torch.Tensor] * 8
    losses, norms = (1e-2, 1e-2) if "bf16" in options else (1e-4, 1e-3)
    assert logged(factored) == pytest.approx(logged(dense), rel=losses)
    assert logged(factored, "grad_norm") == pytest.approx(logged(dense, "grad_norm"), rel=norms)
    assert min(logged(factored, "grad_norm")) > 0.5
    assert logged(factored)[-1] < logged(factored)[0]
    steps = factored.optimizer.state[factored.model.model.expert_pool.up_proj.weight]["row_steps"]
    assert 0 < steps.max() <= 8
    assert steps.float().mean() < 8


@pytest.mark.parametrize(
    ("second_moment", "dtype"),
    [("full", torch.float32), ("row", torch.float32), ("full", torch.bfloat16)],
    ids=["full", "row", "bfloat16"],
)
def test_resumes_to_the_bit(tmp_path, second_moment, dtype):
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5}
    trainers = []
    for seed, checkpoint in ((0, None), (1, str(tmp_path / "checkpoint-5"))):
        trainer = trainer_with_rows(tmp_path, second_moment=second_moment, seed=seed, **options)
        trainer.model.to(dtype)
        trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.optimizer.state[trainer.model.model.expert_pool.up_proj.weight]
        assert state["exp_avg"].dtype == torch.float32
        trainers.append(trainer)
    unbroken, resumed = trainers
    assert logged(resumed) == logged(unbroken)
    assert logged(resumed, "grad_norm") == logged(unbroken, "grad_norm")
    assert_same(resumed.model.state_dict(), unbroken.model.state_dict())
    # The log has the rate of other parameters than tables.
    assert logged(resumed, "learning_rate")[0] == 1e-2


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def tensor_parallel(rank):
    """A table split along its width; some of its rows have a gradient in one half alone."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for second_moment in ("full", "row"):
        table = nn.Parameter(distribute_tensor(random_table().detach(), mesh, [Shard(1)]))
        optimizer = rows_of(table, second_moment=second_moment)
        take_steps(optimizer, table, [distribute_tensor(gradient, mesh, [Shard(1)]) for gradient in half_gradients()])
        found |= {f"{second_moment}.{name}": whole(value) for name, value in optimizer.state[table].items()}
        found[f"{second_moment}.table"] = whole(table)
    return found


def tensor_parallel_factors(rank):
    """The same with gradients in factors, whose sums nobody writes."""
    mesh = init_device_mesh("cpu", (2,))
    table = nn.Parameter(distribute_tensor(random_table().detach(), mesh, [Shard(1)]))
    optimizer = rows_of(table)

    def in_factors(gradient):
        part = gradient.chunk(2, dim=1)[rank].contiguous()
        factored = FactoredGradient(part, [Factors.of_rows(part)])
        shapes = {"shape": gradient.shape, "stride": gradient.stride()}
        return DTensor.from_local(factored, mesh, [Shard(1)], run_check=False, **shapes)

    with mock.patch.object(Factors, "sums", None):
        take_steps(optimizer, table, map(in_factors, half_gradients()))
    return {name: whole(value) for name, value in optimizer.state[table].items()} | {"table": whole(table)}


def half_gradients():
    gradients = list(random_gradients(5))
    for gradient in gradients:
        gradient[::2, WIDTH // 2 :] = 0
    return gradients


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_on_two_processes(save_parts, str(folder), (tensor_parallel, tensor_parallel_factors))
    return folder


def assert_found_by_both(folder, name, expected):
    for rank in (0, 1):
        found = torch.load(folder / f"{name}-{rank}")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda message, key=key: f"{key}: {message}")


def test_tables_split_along_their_width(distributed):
    expected = {}
    for second_moment in ("full", "row"):
        table = random_table()
        optimizer = rows_of(table, second_moment=second_moment)
        take_steps(optimizer, table, half_gradients())
        expected |= {f"{second_moment}.{name}": value for name, value in copied(optimizer, table).items()}
    assert_found_by_both(distributed, "tensor_parallel", expected)
    of_factors = {name.removeprefix("full."): value for name, value in expected.items() if "full." in name}
    assert_found_by_both(distributed, "tensor_parallel_factors", of_factors)
