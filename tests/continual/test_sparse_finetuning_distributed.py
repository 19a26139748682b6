# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse finetuning on two processes, each of which gets half of the rows of each micro-batch."""

import os

import pytest
import torch
from sparse_trainer import Observer, T, sparse_trainer
from torch.testing import assert_close
from trainer_worker import logged
from two_processes import free_port, leave_together, run_on_two_processes


def joint_training(folder, optimizer, world_size=1):
    """Of each step the rows that moved, and what the tables are in the end."""
    observer = Observer()
    options = {"per_device_train_batch_size": 8 // world_size, "gradient_accumulation_steps": 2, "max_steps": 4}
    options |= {"num_examples": 64}  # whole batches
    trainer, _ = sparse_trainer(folder, optimizer, observer=observer, train_sampling_strategy="sequential", **options)
    # A copy of the model would take part in reductions.
    observer.on_pre_optimizer_step = lambda *args, **kwargs: None
    trainer.train()
    tables = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "moved": observer.moved,
        "tables": tables,
        "wrapper": type(trainer.model_wrapped).__name__,
        "num_trained": logged(trainer, "sparse_finetuning/trained_experts/layer_0"),
        "norms": logged(trainer, "grad_norm"),
    }


def work(rank, folder, port):
    """One of two processes, which leaves all that it found."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for optimizer in ("sgd", "rows"):
        torch.save(joint_training(f"{folder}/{rank}", optimizer, 2), f"{folder}/{optimizer}-{rank}")
    leave_together()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_on_two_processes(work, str(folder), free_port())
    return folder


@pytest.mark.parametrize("optimizer", ["sgd", "rows"])
def test_two_processes_move_what_one_moves_on_the_joint_batch(distributed, tmp_path, optimizer):
    expected = joint_training(tmp_path, optimizer)
    for rank in (0, 1):
        found = torch.load(distributed / f"{optimizer}-{rank}")
        assert found["wrapper"] == "DistributedDataParallel"
        assert found["num_trained"] == expected["num_trained"] == [T] * 4
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for moved, by_one in zip(found["moved"], expected["moved"], strict=True):
            for name in expected["tables"]:
                assert torch.equal(moved[name], by_one[name])
                assert moved[name].sum() == T
        assert_close(found["tables"], expected["tables"], rtol=1e-3, atol=1e-5)
