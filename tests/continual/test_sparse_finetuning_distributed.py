# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse finetuning on two processes, each of which gets half of the rows of each micro-batch."""

import os
import tempfile

import pytest
import torch
from sparse_trainer import Observer, T, sparse_trainer
from torch.testing import assert_close
from trainer_worker import logged
from two_processes import run_on_two_processes, save_parts


def joint_sparse_training(optimizer, world_size=1):
    """Of each step the rows that moved, and what the tables are in the end."""
    observer = Observer()
    options = {"per_device_train_batch_size": 8 // world_size, "gradient_accumulation_steps": 2, "max_steps": 4}
    options |= {"num_examples": 64, "train_sampling_strategy": "sequential"}  # whole batches
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = sparse_trainer(folder, optimizer, observer=observer, **options)
        # A copy of the model would take part in reductions.
        observer.on_pre_optimizer_step = lambda *args, **kwargs: None
        trainer.train()
    return {
        "moved": observer.moved,
        "tables": {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad},
        "wrapper": type(trainer.model_wrapped).__name__,
        "num_trained": logged(trainer, "sparse_finetuning/trained_experts/layer_0"),
        "norms": logged(trainer, "grad_norm"),
    }


def sparse_training(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    return {optimizer: joint_sparse_training(optimizer, world_size=2) for optimizer in ("sgd", "rows")}


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_on_two_processes(save_parts, str(folder), (sparse_training,))
    return folder


@pytest.mark.parametrize("optimizer", ["sgd", "rows"])
def test_sparse_training_moves_what_that_of_the_joint_batch_moves(distributed, optimizer):
    expected = joint_sparse_training(optimizer)
    for rank in (0, 1):
        found = torch.load(distributed / f"sparse_training-{rank}")[optimizer]
        assert found["wrapper"] == "DistributedDataParallel"
        assert found["num_trained"] == expected["num_trained"] == [T] * 4
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for moved, by_one in zip(found["moved"], expected["moved"], strict=True):
            for name in expected["tables"]:
                assert torch.equal(moved[name], by_one[name])
                assert moved[name].sum() == T
        assert_close(found["tables"], expected["tables"], rtol=1e-3, atol=1e-5)
