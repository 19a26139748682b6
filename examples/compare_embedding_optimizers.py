# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compares optimizers for a large embedding: a small language model reads a table of 256,000 rows by the hash of its last
two tokens, and each optimizer trains it on the same text in a process of its own.

    ./run python examples/compare_embedding_optimizers.py

It takes a few minutes on two cores, and prints and saves the peak memory of each process, the bytes of the optimizer's
state of the table, the median time of a step, and the loss on held-out text at the end.
"""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging

from benchmark.worker import peak_bytes
from common.command_line import parse_arguments
from common.machine import machine
from common.text_data import DataTrainingArguments, standard_library, tokenize_into_blocks
from modeling_peer import RowAdamW, expert_parameter_groups
from studies.common.study_folder import write_json
from studies.common.tables import markdown_table


TOKENIZER = Path(__file__).parent / "checkpoints" / "peer-nano"
BLOCK, BATCH_SIZE, HELD_OUT, LEARNING_RATE = 128, 8, 32, 3e-3
MULTIPLIER = 1_000_003  # of the hash


def by_rows(model: nn.Module, **options: Any) -> RowAdamW:
    """[`RowAdamW`] with the embeddings of a model as rows."""
    return RowAdamW(expert_parameter_groups(model, LEARNING_RATE, embeddings=True), weight_decay=0.0, **options)


CONTENDERS = {
    "AdamW, fused": lambda model: torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    ),
    "RowAdamW": by_rows,
    "RowAdamW, 8 bytes a row": partial(by_rows, first_moment=None, second_moment="row"),
}


@dataclass
class ComparisonArguments:
    """How large the table is, and how long it is trained."""

    num_rows: int = field(default=256_000, metadata={"help": "Rows of the table."})
    width: int = field(default=640, metadata={"help": "Columns of the table."})
    steps: int = field(default=200, metadata={"help": "Training steps of each optimizer."})
    output_file: str = field(default="runs/embedding_optimizers.json", metadata={"help": "Where to save the results."})


class HashedModel(nn.Module):
    """A Llama of two layers that adds to each embedding a projected table row, by a hash of the last two tokens."""

    def __init__(self, vocab_size: int, num_rows: int, width: int):
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **sizes))
        self.table = nn.Embedding(num_rows, width)
        self.proj = nn.Linear(width, 64, bias=False)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss on `ids`, `(batch_size, sequence_length)`."""
        before = nn.functional.pad(ids[:, :-1], (1, 0))
        rows = (before * MULTIPLIER + ids) % self.table.num_embeddings
        embeddings = self.model.get_input_embeddings()(ids) + self.proj(self.table(rows))
        return self.model(inputs_embeds=embeddings, labels=ids).loss


def read_blocks(number: int) -> torch.Tensor:
    """Blocks of the source code of Python's standard library: the held-out ones, then `number` to train on."""
    tokenizer, texts = AutoTokenizer.from_pretrained(TOKENIZER), standard_library()
    options = DataTrainingArguments()
    held_out, train = (
        tokenize_into_blocks(texts[split], tokenizer, BLOCK, options) for split in ("validation", "train")
    )
    blocks = held_out.shuffle(seed=0)["input_ids"][:HELD_OUT] + train.shuffle(seed=0)["input_ids"][:number]
    return torch.tensor(blocks)


def measure(contender: str, args: ComparisonArguments, blocks: np.ndarray) -> dict[str, Any]:
    """Train a model with an optimizer, and measure how far the memory of this process rises."""
    result: dict[str, Any] = {}
    peak = peak_bytes(lambda: result.update(train(contender, args, blocks)))
    return {"peak_memory": peak, **result}


def train(contender: str, args: ComparisonArguments, blocks: np.ndarray) -> dict[str, float]:
    """Train a model. Returns bytes of the table's optimizer state, median seconds of a step, and the held-out loss."""
    set_seed(0)
    held_out, rest = torch.from_numpy(blocks).split([HELD_OUT, len(blocks) - HELD_OUT])
    batches = rest.split(BATCH_SIZE)
    model = HashedModel(int(blocks.max()) + 1, args.num_rows, args.width)
    optimizer = CONTENDERS[contender](model)
    seconds = []
    for step in tqdm(range(args.steps), desc=contender):
        start = time.perf_counter()
        model(batches[step % len(batches)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        loss = model(held_out).item()
    state = optimizer.state[model.table.weight]
    return {
        "state": sum(each.nbytes for each in state.values()),
        "seconds": statistics.median(seconds),
        "loss": loss,
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The results in Markdown."""
    rows = [["optimizer", "peak memory, GB", "state of the table, MB", "ms a step", "loss, held out"]]
    for name, each in results.items():
        cells = [f"{each['peak_memory'] / 1e9:.2f}", f"{each['state'] / 1e6:,.0f}", f"{1e3 * each['seconds']:.0f}"]
        rows.append([name, *cells, format(each["loss"], ".3f")])
    return markdown_table(rows)


def main():
    (args,) = parse_arguments((ComparisonArguments,), __doc__)
    logging.set_verbosity_error()
    blocks = read_blocks(args.steps * BATCH_SIZE)
    # Each optimizer runs in a process of its own, so that the peak memory is that of one optimizer.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        results = {name: pool.submit(measure, name, args, blocks.numpy()).result() for name in CONTENDERS}
    file = Path(args.output_file)
    write_json(file, {"results": results, "arguments": asdict(args), "machine": machine()})
    print(f"\n{table(results)}\n\nIn {file}.")


if __name__ == "__main__":
    main()
