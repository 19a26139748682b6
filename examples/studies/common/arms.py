# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The arms of a study: which of them are run, with which hyperparameters and seeds, and how a model is trained."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from modeling_peer import RowAdamW, expert_parameter_groups


def run_all(
    arms: dict[str, Any],
    seeds: int,
    run: Callable[[str, dict[str, float], int], dict[str, Any]],
    choose: Callable[[list[dict[str, Any]]], tuple[float, dict[str, dict[str, float]]]],
    extend: Callable[[list[dict[str, Any]]], list[tuple[str, dict[str, float]]]] = lambda runs: [],
) -> tuple[list[dict[str, Any]], float, dict[str, dict[str, float]]]:
    """
    Sweeps the hyperparameters of all arms with one seed, and runs the chosen ones of each arm with several seeds. The
    choice may fall on values that were not swept: these are run with the first seed, and the choice is repeated with
    the new runs.

    Args:
        arms (`dict[str, Any]`): Arms by name. The attribute `sweep` of an arm holds the hyperparameters to try.
        seeds (`int`): Number of seeds for the chosen hyperparameters.
        run (`Callable`): Makes a run from the name of an arm, its hyperparameters and a seed.
        choose (`Callable`):
            Returns, from the runs, the level of learning at which arms are compared, and the hyperparameters of each
            arm.
        extend (`Callable`, *optional*):
            Returns, from the runs of the sweep, arms and hyperparameters with which it goes on, until there are none.

    Returns:
        `tuple`: all runs, the level of learning, and the chosen hyperparameters of each arm.
    """
    swept = [(name, hyperparameters) for name, arm in arms.items() for hyperparameters in arm.sweep]
    runs = [run(*each, 0) for each in tqdm(swept, desc="Sweep")]
    tried = swept
    while further := extend(runs):
        runs += [run(*each, 0) for each in tqdm(further, desc="Beyond the sweep")]
        tried = tried + further
    level, chosen = choose(runs)
    while untried := [(name, chosen[name]) for name in arms if (name, chosen[name]) not in tried]:
        runs += [run(*each, 0) for each in tqdm(untried, desc="Chosen hyperparameters")]
        tried = tried + untried
        level, chosen = choose(runs)
    return runs + run_chosen(chosen, range(1, seeds), run), level, chosen


def run_chosen(
    chosen: dict[str, dict[str, float]],
    seeds: Iterable[int],
    run: Callable[[str, dict[str, float], int], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Runs the chosen hyperparameters of each arm with each of the seeds, see [`run_all`]."""
    repeated = [(name, hyperparameters, seed) for seed in seeds for name, hyperparameters in chosen.items()]
    return [run(*each) for each in tqdm(repeated, desc="Seeds")]


def with_rates(*rates: float, **hyperparameters: float) -> tuple[dict[str, float], ...]:
    """The same hyperparameters, once with each of the learning rates."""
    return tuple({"learning_rate": rate, **hyperparameters} for rate in rates)


def named_arms(names: list[str], arms: dict[str, Any]) -> dict[str, Any]:
    """The arms with the given names. Raises `ValueError` for a name that no arm has."""
    if unknown := set(names) - set(arms):
        raise ValueError(f"--arms must be some of {list(arms)}, got {sorted(unknown)} among them.")
    return {name: arms[name] for name in names}


def train(
    model: nn.Module,
    dataset: Any,
    folder: Path,
    learning_rate: float,
    steps: int,
    batch_size: int,
    data_collator: Callable = default_data_collator,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> None:
    """
    Trains the parameters of a model that require a gradient, with `Trainer` and [`RowAdamW`], and leaves the model in
    evaluation mode.

    Args:
        model (`nn.Module`): Model to train in place.
        dataset (`Dataset` or list): Training examples.
        folder (`Path`): Output folder of the `Trainer`.
        learning_rate (`float`): Learning rate after a warm-up of a tenth of the steps.
        steps (`int`): Number of training steps.
        batch_size (`int`): Number of examples per step.
        data_collator (`Callable`, *optional*): Collator of the examples. Defaults to that of Transformers.
        callbacks (`list[TrainerCallback]`, *optional*): Callbacks of the `Trainer`.
        options: Further `TrainingArguments`.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        save_strategy="no",
        logging_steps=steps,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        **{"lr_scheduler_type": "cosine", **options},
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=data_collator,
        optimizers=(RowAdamW(expert_parameter_groups(model, learning_rate), weight_decay=0.0), None),
        callbacks=callbacks,
    )
    trainer.train()
    # Accelerate wraps the forward in autocast for bf16: unwrapped, evaluation does not depend on the training.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
