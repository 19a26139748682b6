# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the worker scripts of the distributed tests share: tiny models, padded batches, and how results are handed over."""

import json
from functools import partial
from pathlib import Path

import tiny_models
import torch
from kernels_used import record_kernels
from safetensors.torch import save_file

from modeling_peer import PeerConfig, PeerForCausalLM


VOCAB_SIZE = 61  # odd, as the vocabularies of real tokenizers: the head splits unevenly
IGNORED = -100
USED_KERNELS = record_kernels()

tiny_config = partial(
    tiny_models.tiny_config,
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    intermediate_size=20,
    head_dim=4,
    num_experts=64,
    moe_intermediate_size=8,
    initializer_range=0.2,  # large, so that what goes wrong in one place is seen in the logits
)


def tiny_model(config: PeerConfig) -> PeerForCausalLM:
    """The model of `config`, the same in every process, with running statistics that are not those of a fresh one."""
    torch.manual_seed(0)
    model = PeerForCausalLM(config)
    for name, parameter in model.named_parameters():
        if ".added." in name and "down_proj" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # added experts start with rows of zeros
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.2, 0.6)
    return model


PROTECTED = {"mode": "protected", "num_experts": 16, "num_retrieval_heads": 1, "num_experts_per_head": 3}

# One model of every variant, for what splits models; widths of 49 and 61 do not divide by two processes.
MODELS = {
    "dense": tiny_config("dense", "dense"),
    "moe": tiny_config("dense", "moe"),
    "pkm": tiny_config("dense", "pkm"),
    "peer": tiny_config("dense", "peer"),
    "rms_norm": tiny_config("dense", "peer", query_norm="rms", sub_keys_per_head=True, scoring_func="sigmoid"),
    "gated_experts": tiny_config("peer", "dense", gated_experts=True),
    "shared_expert": tiny_config("dense", "peer", shared_expert_intermediate_size=10),
    "shared_pool": tiny_config("peer", "dense", "peer", share_experts_across_layers=True, gated_experts=True),
    "tied_embeddings": tiny_config("dense", "peer", tie_word_embeddings=True),
    "grown": tiny_config("dense", "peer", expert_additions=[{"layers": [1], **PROTECTED}]),
    "odd_width": tiny_config("peer", "pkm", hidden_size=49, gated_experts=True, shared_expert_intermediate_size=7),
}


def padded_batch(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """
    Rows of different lengths as a batch of the longest's length, padded on `side`.

    A row's first token is no target: left of it stands padding or nothing, by how long the other rows of the batch are.
    """
    width = max(len(row) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        padding = width - len(row)
        before, after = (padding, 0) if side == "left" else (0, padding)
        batch["input_ids"].append([0] * before + row + [0] * after)
        batch["attention_mask"].append([0] * before + [1] * len(row) + [0] * after)
        batch["labels"].append([IGNORED] * (before + 1) + row[1:] + [IGNORED] * after)
    return {name: torch.tensor(values) for name, values in batch.items()}


def random_rows(*lengths: int) -> list[list[int]]:
    """Rows of random tokens of these lengths, the same in every process."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def outputs(model: PeerForCausalLM, padded_cache: bool = True) -> dict[str, torch.Tensor]:
    """
    In evaluation, logits where a left-padded batch has tokens, and greedy continuations of rows with and without padding;
    of padded rows with a cache if `padded_cache`.
    """
    model.eval()
    padded, whole = padded_batch(random_rows(7, 3), "left"), padded_batch(random_rows(5, 5), "left")
    del padded["labels"], whole["labels"]
    with torch.no_grad():
        logits = model(**padded).logits[padded["attention_mask"].bool()]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    return {
        "logits": logits,
        "tokens": model.generate(**whole, **greedy),
        "padded_tokens": model.generate(**padded, **greedy, use_cache=padded_cache),
    }


def hand_over(folder: Path, name: str, tensors: dict[str, torch.Tensor], facts: dict | None = None) -> None:
    """
    Writes `name`.safetensors and `name`.json into `folder`, for the test to look at. What ran the experts since the last
    time is among the facts.
    """
    facts = {**(facts or {}), "kernels": sorted(USED_KERNELS)}
    USED_KERNELS.clear()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors"
    )
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2))
