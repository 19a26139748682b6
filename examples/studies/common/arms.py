# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The arms of a study: which of them are run, with which hyperparameters and seeds, and how a model is trained."""

from collections.abc import Callable
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
) -> tuple[list[dict[str, Any]], float, dict[str, dict[str, float]]]:
    """
    Sweeps the settings of all arms with one seed, and runs those chosen of each with several. What is chosen need not have
    been swept: it is run with the first seed, and chosen again with what came of that.

    Args:
        arms (`dict[str, Any]`): The settings to try are their `sweep`.
        seeds (`int`): How many seeds the chosen settings get.
        run (`Callable`): Makes a run of an arm with settings and a seed.
        choose (`Callable`): Of these runs, the level of learning at which arms are compared, and the settings of each.

    Returns:
        `tuple`: all runs, the level, the chosen settings.
    """
    swept = [(name, settings) for name, arm in arms.items() for settings in arm.sweep]
    runs = [run(*each, 0) for each in tqdm(swept, desc="Sweep")]
    level, chosen = choose(runs)
    tried = swept
    while untried := [(name, chosen[name]) for name in arms if (name, chosen[name]) not in tried]:
        runs += [run(*each, 0) for each in tqdm(untried, desc="Chosen settings")]
        tried = tried + untried
        level, chosen = choose(runs)
    repeated = [(name, chosen[name], seed) for seed in range(1, seeds) for name in arms]
    runs += [run(*each) for each in tqdm(repeated, desc="Seeds")]
    return runs, level, chosen


def with_rates(*rates: float, **settings: float) -> tuple[dict[str, float], ...]:
    """The same settings with each of some learning rates."""
    return tuple({"learning_rate": rate, **settings} for rate in rates)


def named_arms(names: list[str], arms: dict[str, Any]) -> dict[str, Any]:
    """Those of the arms that are named. Raises `ValueError` if a name is none of theirs."""
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
    Trains what of a model requires a gradient, with the stock `Trainer` and [`RowAdamW`], and leaves it in evaluation.

    Args:
        model (`nn.Module`)
        dataset (`Dataset` or list): Examples.
        folder (`Path`): For what a `Trainer` writes.
        learning_rate (`float`): After a warm-up of a tenth of the steps.
        steps (`int`)
        batch_size (`int`): Examples of a step.
        data_collator (`Callable`, *optional*): The library's default if not given.
        callbacks (`list[TrainerCallback]`, *optional*)
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
    # Autocast was a part of its forward.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
