# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
For tests of the stock `Trainer`: tiny models, data that can be learned, the trainer of both, and what came out of it.
"""

import torch
from tiny_models import tiny_config
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from modeling_peer import PeerForCausalLM
from modeling_peer.router import QueryBatchNorm


PERIOD = 20

# Names under which a batch is padded, and with what.
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def small_model(*feed_forward_types, model_class=PeerForCausalLM, seed=0, **fields):
    """A model of a dense and a PEER layer, or of the variants named, as it is before its training."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_experts": 8**2, "num_experts_per_head": 4, "initializer_range": 0.1}
    return model_class(tiny_config(*(feed_forward_types or ("dense", "peer")), **{**sizes, **fields}))


def counting_sequences(number, seed=1):
    """Sequences of different lengths that count on from a random start, modulo `PERIOD`; tokens 1 to `PERIOD`."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(number):
        start, length = (int(torch.randint(high, (), generator=generator)) for high in (PERIOD, 10))
        input_ids = (start + torch.arange(3 + length)) % PERIOD + 1
        examples.append({"input_ids": input_ids, "labels": input_ids})
    return examples


def pad_right(examples):
    """A batch, padded to its own longest sequence where it holds sequences."""
    columns = {name: [torch.as_tensor(example[name]) for example in examples] for name in examples[0]}
    columns["attention_mask"] = [torch.ones_like(input_ids) for input_ids in columns["input_ids"]]
    return {
        name: pad_sequence(column, batch_first=True, padding_value=PADDING.get(name, 0))
        if column[0].ndim
        else torch.stack(column)
        for name, column in columns.items()
    }


def trainer_of(model, folder, train_dataset=None, eval_dataset=None, callbacks=None, **options):
    """`Trainer` of Transformers on a CPU, logging every step; `options` are `TrainingArguments`."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 40,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        data_collator=pad_right,
        train_dataset=train_dataset or counting_sequences(160),
        eval_dataset=eval_dataset or counting_sequences(16, seed=2),
        callbacks=callbacks,
    )


def train(*args, **options):
    """What `trainer_of` makes of the arguments, trained."""
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def logged(trainer, name="loss"):
    """What a trainer logged under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def copy_of_state(model):
    """Parameters and buffers, the running statistics among them, as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def query_batch_norms(model):
    return [module for module in model.modules() if isinstance(module, QueryBatchNorm)]
