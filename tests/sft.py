# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""For tests with TRL: texts, their tokenizer, `SFTTrainer` on them, and pairs of answers to prefer one of."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_worker import PERIOD, counting_sequences, pad_right
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def save_tokenizer(folder):
    """Puts the tokenizer of `texts` into a folder."""
    words = ["<pad>", *(f"w{number}" for number in range(PERIOD)), "<eos>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def texts(number, seed=1):
    sequences = (example["input_ids"] - 1 for example in counting_sequences(number, seed))
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in sequence.tolist()) for sequence in sequences]})


def preferences(number):
    """Prompts, an answer that counts on, and a shorter one of one word, of many lengths."""
    columns = {"prompt": [], "chosen": [], "rejected": []}
    for text in texts(number)["text"]:
        words = text.split()
        columns["prompt"].append(" ".join(words[:2]))
        columns["chosen"].append(" " + " ".join(words[2:]))
        columns["rejected"].append(f" {words[0]} {words[0]}")
    return Dataset.from_dict(columns)


# What trainers of TRL are given here, on a CPU.
TRL_OPTIONS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def sft_trainer(model, folder, peft_config=None, **options):
    """TRL's trainer as it is by default, on CPU."""
    defaults = {**TRL_OPTIONS, "per_device_eval_batch_size": 16, "max_steps": 20}
    return SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=texts(80),
        eval_dataset=texts(16, seed=2),
        peft_config=peft_config,
    )


@torch.no_grad()
def logits_of(model):
    """In evaluation, of padded sequences as trainers get them."""
    batch = pad_right(counting_sequences(8, seed=3))
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
