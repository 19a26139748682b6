# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains a small PEER language model and its dense twin of the same width in under five minutes on two cores.

    ./run quickstart
    ./run quickstart --models dense pkm peer --train_file my_text.txt

All models are trained on the same tokens: of the Python standard library, or the text of --dataset_name or
--train_file. The script prints their costs and held-out perplexities, and those after as many seconds as the first
model took; the perplexity of 5-grams; expert usage; and a sample of the last model. The models, the results and a plot
of the losses are saved in --output_dir.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from run_clm import evaluate_perplexity, load_text, make_trainer
from run_generation import describe_experts, generate
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from common.command_line import ends_on_usage_error, parse_arguments
from common.model_arguments import ModelArguments, load_config
from common.pictures import NEUTRAL, add_legend, look_of, new_figure, save_picture
from common.text_data import DataTrainingArguments, take_samples
from common.training import run, usage_range
from modeling_peer import model_costs
from studies.common.ngrams import KneserNey, counts_in_sequence, losses, with_cache


@dataclass
class QuickstartArguments:
    """Which models to train, how long, and which prompt to continue."""

    models: list[str] = field(
        default_factory=lambda: ["dense", "peer"],
        metadata={
            "help": "Feed-forwards of the models. The others are compared with the first.",
            "choices": ["dense", "pkm", "peer"],
        },
    )
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Output folder."})
    max_steps: int = field(default=500, metadata={"help": "Training steps per model."})
    prompt: str = field(
        default='class LineReader:\n    def __init__(self, path, encoding="utf-8"):\n',
        metadata={"help": "Text that the last model continues at the end."},
    )


@dataclass
class QuickstartDataArguments(DataTrainingArguments):
    """Which text to train on."""

    block_size: int = field(default=256, metadata={"help": "Tokens per sequence."})
    max_eval_samples: int = field(
        default=64, metadata={"help": "Number of held-out sequences to evaluate on, evenly spaced."}
    )


@dataclass
class Result:
    """Costs and results of one model."""

    parameters: int
    flops_per_token: int
    sequence_length: int
    perplexity_before: float
    perplexity_after: float
    perplexity_at_equal_seconds: float
    steps_at_equal_seconds: int
    seconds_per_step: float
    train_losses: dict[int, float]
    eval_losses: dict[int, float]
    expert_usage: dict[str, float]


def training_arguments(args: QuickstartArguments, name: str) -> TrainingArguments:
    """The same arguments for all models. At this size, more steps improve a model more than larger batches."""
    return TrainingArguments(
        output_dir=str(Path(args.output_dir, name)),
        do_train=True,
        do_eval=True,
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=max(1, args.max_steps // 32),
        eval_strategy="steps",
        eval_steps=max(1, args.max_steps // 8),
        eval_on_start=True,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        log_level="error",
    )


class StepClock(TrainerCallback):
    """Adds up the seconds of training steps, and has the model evaluated after the first step that reaches a time."""

    def __init__(self, limit: float):
        self.limit = limit
        self.seconds = 0.0
        self.last_step = 0  # the first that reached the limit, or the last of the training
        self._start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        was_before = self.seconds < self.limit
        self.seconds += time.perf_counter() - self._start
        if was_before:
            self.last_step = state.global_step
            control.should_evaluate |= self.seconds >= self.limit


def train_model(
    name: str,
    args: QuickstartArguments,
    tokenizer: PreTrainedTokenizerBase,
    blocks: dict[str, Dataset],
    data: str,
    seconds: float = math.inf,
) -> Result:
    """
    Train, evaluate and save a model of a named configuration. It is also evaluated when its steps have taken
    `seconds`. The description `data` of the training text is saved with it.
    """
    model_args = ModelArguments(config_name=name)
    config = load_config(model_args)
    trainer = make_trainer(model_args, training_arguments(args, name), config, tokenizer, blocks)
    clock = StepClock(seconds)
    trainer.add_callback(clock)
    metrics = run(trainer, evaluation=evaluate_perplexity, data=data)
    history = trainer.state.log_history
    eval_losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    costs = model_costs(config)
    return Result(
        parameters=costs.parameters,
        flops_per_token=costs.flops,
        sequence_length=costs.sequence_length,
        perplexity_before=math.exp(eval_losses[0]),
        perplexity_after=metrics["perplexity"],
        perplexity_at_equal_seconds=math.exp(eval_losses[clock.last_step]),
        steps_at_equal_seconds=clock.last_step,
        seconds_per_step=clock.seconds / args.max_steps,
        train_losses={entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        eval_losses=eval_losses,
        expert_usage={
            key.removeprefix("eval_expert_"): value for key, value in metrics.items() if key.startswith("eval_expert_")
        },
    )


def loss_of_ngrams(blocks: dict[str, Dataset], vocabulary: int, num_sequences: int) -> float:
    """
    Held-out loss of 5-grams of at most so many training sequences, with a cache of the n-grams of the sequence so far,
    whose weights are those of the recipe study.
    """
    samples = take_samples(blocks["train"], num_sequences), blocks["validation"]
    train, held_out = (np.array([block["input_ids"] for block in each]) for each in samples)
    alone = KneserNey(train, vocabulary).probabilities(held_out)
    return losses(with_cache(alone, counts_in_sequence(held_out), (300.0, 8.0)))


def plot_losses(file: Path, results: dict[str, Result], ngrams: float | None = None) -> None:
    """
    Plots training loss and held-out loss of all models against the step, and held-out loss against the seconds. A line
    shows the held-out loss of n-grams.
    """
    figure = new_figure(11, 5)
    by_step, by_seconds = figure.subplots(1, 2, sharey=True)
    for name, result in results.items():
        look = look_of(name)
        steps, values = zip(*result.train_losses.items(), strict=True)
        by_step.plot(steps, values, color=look.color, alpha=0.45, label=f"{name}, training")
        steps, values = zip(*result.eval_losses.items(), strict=True)
        by_step.plot(steps, values, **look.style, label=f"{name}, held-out text")
        by_seconds.plot([step * result.seconds_per_step for step in steps], values, **look.style, label=name)
    for axes, label in ((by_step, "training step"), (by_seconds, "seconds of training steps")):
        if ngrams is not None:
            axes.axhline(ngrams, color=NEUTRAL, linestyle=":", label="5-grams and a cache, held-out text")
        axes.set(xlabel=label, ylabel="loss, nats per token")
        add_legend(axes)
    figure.suptitle("\n".join(findings(results)))
    save_picture(figure, file)


def table(results: dict[str, Result]) -> str:
    """A table of the results of the models."""
    (sequence_length,) = {result.sequence_length for result in results.values()}
    rows: dict[str, Callable[[Result], str]] = {
        "parameters": lambda result: f"{result.parameters:,}",
        f"MFLOPs per token, in {sequence_length} tokens": lambda result: f"{result.flops_per_token / 1e6:.2f}",
        "seconds per step": lambda result: f"{result.seconds_per_step:.3f}",
        "seconds of all steps": lambda result: f"{result.seconds_per_step * max(result.eval_losses):.0f}",
        "held-out perplexity before": lambda result: f"{result.perplexity_before:.1f}",
        "held-out perplexity after": lambda result: f"{result.perplexity_after:.1f}",
        "held-out loss after, nats": lambda result: f"{math.log(result.perplexity_after):.3f}",
        f"perplexity in the seconds of {next(iter(results))}": lambda result: (
            f"{result.perplexity_at_equal_seconds:.1f}"
        ),
    }
    lines = {"": list(results)} | {name: [cell(each) for each in results.values()] for name, cell in rows.items()}
    return "\n".join(f"{name:<36}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in lines.items())


def findings(results: dict[str, Result]) -> list[str]:
    """How each model compares with the first one after as many steps and after as many seconds."""
    (first, baseline), *others = results.items()
    found = []
    for name, result in others:
        after, step = _against(result.perplexity_after, baseline), result.steps_at_equal_seconds
        in_seconds = "which took no longer"
        if step < max(result.eval_losses):
            in_seconds = (
                f"{_against(result.perplexity_at_equal_seconds, baseline)} it after as many seconds, at step {step}"
            )
        found.append(f"{name}: perplexity {after} {first} after as many steps, {in_seconds}")
    return found or [f"{first}: perplexity {baseline.perplexity_after:.1f}"]


def _against(perplexity, baseline):
    difference = 1 - perplexity / baseline.perplexity_after
    return f"{abs(difference):.1%} {'below' if difference > 0 else 'above'}"


def verdict(results: dict[str, Result], ngrams: float) -> str:
    """Describes how the models compare with each other and with n-grams, and their expert usage."""
    used = {
        name: [value for key, value in result.expert_usage.items() if key.startswith("usage/")]
        for name, result in results.items()
    }
    lines = [
        "In one short run of tiny models with one seed, slower ones with a rate still to fall after as many seconds:",
        *findings(results),
        f"5-grams of at most as many tokens, with a cache of the sequence so far: perplexity {math.exp(ngrams):.1f}",
        *(
            f"Of the experts of a layer of {name}, the held-out text used {usage_range(each)}."
            for name, each in used.items()
            if each
        ),
    ]
    return "\n".join(lines)


def write_sample(folder: Path, prompt: str) -> None:
    """Loads a model from its folder, and prints a continuation of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    set_seed(0)
    tokens = generate(model, tokenizer, prompt, max_new_tokens=100, do_sample=True, temperature=0.7, top_p=0.9)
    print("\n" + describe_experts(model, tokens))


@ends_on_usage_error()
def main():
    start = time.time()
    args, data_args = parse_arguments((QuickstartArguments, QuickstartDataArguments), __doc__)
    logging.set_verbosity_error()
    folder = Path(args.output_dir)
    names = [f"{name}-toy" for name in args.models]
    first, last = names[0], names[-1]
    model_args = ModelArguments(config_name=last)
    print("Reading the text and training a tokenizer on it ...")
    tokenizer, blocks = load_text(model_args, data_args, training_arguments(args, last), load_config(model_args))
    results: dict[str, Result] = {}
    for name in names:
        print(f"\nTraining {name} ...")
        seconds = results[first].seconds_per_step * args.max_steps if results else math.inf
        results[name] = train_model(name, args, tokenizer, blocks, data_args.description, seconds)
    batch_size = training_arguments(args, last).per_device_train_batch_size
    ngrams = loss_of_ngrams(blocks, len(tokenizer), args.max_steps * batch_size)
    plot_losses(folder / "losses.png", results, ngrams)
    saved = {name: vars(result) for name, result in results.items()} | {"5-grams": {"eval_loss": ngrams}}
    (folder / "results.json").write_text(json.dumps(saved, indent=2))

    print(f"\nA continuation by {last}:\n")
    write_sample(folder / last, args.prompt)
    print(f"\n{table(results)}\n\n{verdict(results, ngrams)}")
    print(f"""
Finished after {time.time() - start:.0f} seconds. In {folder}:
  losses.png, results.json   a plot of the losses of all models, and all results
  {", ".join(names)}   the models with their tokenizer, to load with `from_pretrained`
What to do next:
  ./run python examples/run_generation.py --model_name_or_path {folder / last} --prompt "class " --do_sample
  ./run python examples/run_classification.py --model_name_or_path {folder / last} --help
  ./run python examples/push_to_hub.py --model_name_or_path {folder / last} --repo_id USER/{last} --pull
  ./run python examples/run_clm.py --help   to train longer, on other text or with other configurations""")


if __name__ == "__main__":
    main()
