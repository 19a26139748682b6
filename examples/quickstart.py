# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains a small PEER language model and its dense twin of the same width in under five minutes on two cores.

    ./run quickstart

Both are trained on the same text for the same number of steps: the Python standard library, or the text of
--dataset_name or --train_file. The script prints their held-out perplexity before and after training, and that of the
PEER model when it has been trained for as many seconds as its twin; expert usage; and a sample of the PEER model. The
models, the results and a plot of both losses are saved in --output_dir.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

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
from common.pictures import add_legend, look_of, new_figure, save_picture
from common.text_data import DataTrainingArguments
from common.training import run, usage_range
from modeling_peer import model_costs


PEER, DENSE = "peer-toy", "dense-toy"


@dataclass
class QuickstartArguments:
    """How long to train, and which prompt to continue."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Output folder."})
    max_steps: int = field(default=500, metadata={"help": "Training steps per model."})
    prompt: str = field(
        default='class LineReader:\n    def __init__(self, path, encoding="utf-8"):\n',
        metadata={"help": "Text that the PEER model continues at the end."},
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
    """The same arguments for both models. At this size, more steps improve a model more than larger batches."""
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


def plot_losses(results: dict[str, Result], file: Path) -> None:
    """Plots training loss and held-out loss of all models against the step."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for name, result in results.items():
        look = look_of(name)
        steps, losses = zip(*result.train_losses.items(), strict=True)
        axes.plot(steps, losses, color=look.color, alpha=0.45, label=f"{name}, training")
        steps, losses = zip(*result.eval_losses.items(), strict=True)
        axes.plot(steps, losses, **look.style, label=f"{name}, held-out text")
    peer = results[PEER]
    equal = peer.steps_at_equal_seconds
    if equal < max(peer.eval_losses):
        axes.axvline(equal, color=look_of(PEER).color, linestyle=":", label=f"{PEER}, after the seconds of {DENSE}")
    axes.set(xlabel="training step", ylabel="loss, nats per token", title="Two models of one width")
    add_legend(axes)
    save_picture(figure, file)


def table(results: dict[str, Result]) -> str:
    """A table of the results of the models."""
    (sequence_length,) = {result.sequence_length for result in results.values()}
    rows = {
        "": list(results),
        "parameters": [f"{result.parameters:,}" for result in results.values()],
        f"MFLOPs per token, in {sequence_length} tokens": [
            f"{result.flops_per_token / 1e6:.2f}" for result in results.values()
        ],
        "seconds per step": [f"{result.seconds_per_step:.3f}" for result in results.values()],
        "held-out perplexity before": [f"{result.perplexity_before:.1f}" for result in results.values()],
        "held-out perplexity after": [f"{result.perplexity_after:.1f}" for result in results.values()],
        "the same, after equal seconds": [f"{result.perplexity_at_equal_seconds:.1f}" for result in results.values()],
    }
    return "\n".join(f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows.items())


def verdict(results: dict[str, Result]) -> str:
    """Describes how the PEER model compares after as many steps and after as many seconds, and the expert usage."""
    peer, dense = results[PEER], results[DENSE]
    step, steps = peer.steps_at_equal_seconds, max(peer.eval_losses)
    at_equal_seconds = "It took no longer for them."
    if step < steps:
        at_equal_seconds = (
            f"After as many seconds it was at step {step} of {steps}, with a learning rate still to fall, and "
            f"{_against(peer.perplexity_at_equal_seconds, dense)} {DENSE} at its end."
        )
    usage = [value for name, value in peer.expert_usage.items() if name.startswith("usage/")]
    return (
        f"In one short run of two tiny models with one seed, {PEER} ends {_against(peer.perplexity_after, dense)} "
        f"{DENSE} after as many steps.\n{at_equal_seconds}\n"
        f"Of the experts of a layer, the held-out text used {usage_range(usage)}."
    )


def _against(perplexity, dense):
    difference = 1 - perplexity / dense.perplexity_after
    return f"{abs(difference):.1%} {'below' if difference > 0 else 'above'}"


def write_sample(folder: Path, prompt: str) -> None:
    """Loads the PEER model from its folder, and prints a continuation of the prompt."""
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
    model_args = ModelArguments(config_name=PEER)
    print("Reading the text and training a tokenizer on it ...")
    tokenizer, blocks = load_text(model_args, data_args, training_arguments(args, PEER), load_config(model_args))
    results = {}
    for name in (DENSE, PEER):
        print(f"\nTraining {name} ...")
        seconds = results[DENSE].seconds_per_step * args.max_steps if results else math.inf
        results[name] = train_model(name, args, tokenizer, blocks, data_args.description, seconds)
    results = {name: results[name] for name in (PEER, DENSE)}
    plot_losses(results, folder / "losses.png")
    (folder / "results.json").write_text(
        json.dumps({name: vars(result) for name, result in results.items()}, indent=2)
    )

    print(f"\nA continuation by {PEER}:\n")
    write_sample(folder / PEER, args.prompt)
    print(f"\n{table(results)}\n\n{verdict(results)}")
    print(f"""
Finished after {time.time() - start:.0f} seconds. In {folder}:
  losses.png, results.json   a plot of the losses of both models, and all results
  {PEER}, {DENSE}      the models with their tokenizer, to load with `from_pretrained`
What to do next:
  ./run python examples/run_generation.py --model_name_or_path {folder / PEER} --prompt "class " --do_sample
  ./run python examples/run_classification.py --model_name_or_path {folder / PEER} --help
  ./run python examples/push_to_hub.py --model_name_or_path {folder / PEER} --repo_id USER/{PEER} --pull
  ./run python examples/run_clm.py --help   to train longer, on other text or with other configurations""")


if __name__ == "__main__":
    main()
