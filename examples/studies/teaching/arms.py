# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The ways to teach facts: a graft of facts, and trainings of the same prompts."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, set_seed

from modeling_peer import PeerGraftConfig, teach_facts
from modeling_peer.facts.index import LONGEST, FactIndex
from modeling_peer.facts.prompts import Prompt
from modeling_peer.graft_layer import PREFIX
from studies.common.finetuning import train
from studies.teaching.plan import EXPOSURES, Run
from studies.teaching.questions import Item, as_fact


WORDINGS, BATCH = 12, 32
# A late layer of the 30 of SmolLM2-135M, where a graft without a gate recalled most in a pilot.
LATE_LAYER = 24
ADD_ON_RANK = 228
# Batches have prompts of similar length, sorted within this number of exposures: else half of the tokens are padding.
EXPOSURES_TO_SORT = 4


def prepare(arm: str, model: Any) -> nn.Module:
    """The model of an arm, in which the parameters to train require a gradient."""
    if arm == "full":
        return model
    from peft import LoraConfig, get_peft_model

    if arm == "graft":
        config: Any = PeerGraftConfig(task_type="CAUSAL_LM", num_experts=64**2, layers_to_transform=[LATE_LAYER])
    elif arm == "lora":
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        # As many multiplications for each token as a graft of 240 facts takes.
        config = LoraConfig(
            r=ADD_ON_RANK,
            lora_alpha=ADD_ON_RANK,
            target_modules=["down_proj"],
            layers_to_transform=[LATE_LAYER],
            task_type="CAUSAL_LM",
        )
    return get_peft_model(model, config)


def examples_of(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict[str, Any]]:
    """
    Examples in the order of training: each fact once per exposure, in the wordings that a graft of facts reads, in
    alternating forms. Batches are in a random order within every few exposures.
    """
    index = FactIndex([as_fact(item) for item in items], tokenizer, WORDINGS, LONGEST)
    own: dict[tuple[int, str], list[Prompt]] = {}
    for number, form, prompt in index.prompts:
        own.setdefault((number, form), []).append(prompt)
    draw, examples = random.Random(seed), []
    for first in range(0, EXPOSURES, EXPOSURES_TO_SORT):
        some = []
        for turn in range(first, min(first + EXPOSURES_TO_SORT, EXPOSURES)):
            for number in range(len(items)):
                prompts = own[number, index.forms[(turn + number) % len(index.forms)]]
                some.append(prompts[turn // len(index.forms) % len(prompts)])
        draw.shuffle(some)
        some.sort(key=lambda prompt: len(prompt.tokens))
        batches = [some[start : start + BATCH] for start in range(0, len(some), BATCH)]
        draw.shuffle(batches)
        examples += [{"tokens": each.tokens, "answer_start": each.answer_start} for batch in batches for each in batch]
    return examples


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch that is padded on the left, so that the LM head runs only at answers."""
    longest = max(len(each["tokens"]) for each in examples)
    kept = max(len(each["tokens"]) - each["answer_start"] for each in examples) + 1
    batch: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
    for each in examples:
        tokens = torch.tensor(each["tokens"])
        labels = tokens.masked_fill(torch.arange(len(tokens)) < each["answer_start"], -100)
        rows = (tokens, 0), (torch.ones_like(tokens), 0), (labels, -100)
        for name, (row, value) in zip(batch, rows, strict=True):
            batch[name].append(F.pad(row, (longest - len(tokens), 0), value=value))
    batch = {name: torch.stack(rows) for name, rows in batch.items()}
    return {**batch, "labels": batch["labels"][:, -kept:], "logits_to_keep": kept}


def taught(
    run: Run, items: Sequence[Item], model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Teach a model the facts of a run. Returns it with its costs: `seconds` of one core, and `bytes` in bfloat16."""
    start = time.process_time()
    set_seed(run.block)
    if run.arm == "facts":
        saved = folder / "adapters" / run.name
        model = teach_facts(model, tokenizer, [as_fact(item) for item in items], progress_bar=False)
        model.save_pretrained(saved)
        parts = [each for name, each in model.named_parameters() if PREFIX in name]
    else:
        model = prepare(run.arm, model)
        parts = [each for each in model.parameters() if each.requires_grad]
        examples = examples_of(items, tokenizer, run.block)
        train(
            model,
            examples,
            folder / "trainer" / run.name,
            run.learning_rate,
            len(examples) // BATCH,
            BATCH,
            collate,
            use_cpu=True,
            bf16=True,
            train_sampling_strategy="sequential",
            seed=run.block,
            remove_unused_columns=False,
        )
    return model, {"seconds": time.process_time() - start, "bytes": 2 * sum(each.numel() for each in parts)}
