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
"""What the studies have in common: a folder that one study owns, files that are there whole or not at all, the machine."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from modeling_peer import RowAdamW, expert_parameter_groups


# What may differ from call to call: it changes which runs are made, not what comes of them.
FREE_ARGUMENTS = ("output_dir", "arms", "seeds")


def claim_folder(folder: Path, arguments: dict[str, Any]) -> None:
    """
    Makes the folder of a study, or goes on with it.

    Args:
        folder (`Path`)
        arguments (`dict[str, Any]`): The study's, kept in `arguments.json`.

    Raises:
        `ValueError`: if it holds a study with other arguments.
    """
    arguments = {name: value for name, value in arguments.items() if name not in FREE_ARGUMENTS}
    file = folder / "arguments.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = {name for name in arguments.keys() | before.keys() if arguments.get(name) != before.get(name)}
        if changed:
            raise ValueError(
                f"{folder} holds a study with other arguments: "
                + ", ".join(f"{name} was {before.get(name)}, got {arguments.get(name)}" for name in sorted(changed))
                + ". Choose another --output_dir, or remove it."
            )
        return
    write_json(file, arguments)


def write_json(file: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    write_text(file, json.dumps(content, indent=1))


def write_text(file: Path, content: str) -> None:
    """Writes a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished-{os.getpid()}")
    unfinished.write_text(content)
    unfinished.rename(file)


def read_json(file: Path) -> Any:
    """What is in a file of [`write_json`]."""
    return json.loads(file.read_text())


def saved_run(folder: Path, label: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    What came of a run, made or read.

    Args:
        folder (`Path`): Holds a file for each run.
        label (`dict[str, Any]`): The run's `arm`, `settings` and `seed`, which name its file and stand in it.
        make (`Callable`): Makes the run and returns what else is to be kept.
    """
    settings = (f"{key}={value:g}" for key, value in label["settings"].items())
    file = folder / ("-".join([label["arm"], *settings, f"seed={label['seed']}"]) + ".json")
    if not file.exists():
        start = time.time()
        write_json(file, {**label, **make(), "seconds": time.time() - start})
    return read_json(file)


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


def markdown_table(rows: list[list[str]]) -> str:
    """A table of cells, the first row its head, that reads well as it is too: the first column to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
    return "\n".join(lines)


def spread_cell(value: float | None, deviation: float | None, digits: int = 3) -> str:
    """`"0.123 ± 0.004"`; without a deviation, of one seed, the value alone; nothing if there is none."""
    return " ± ".join(f"{each:.{digits}f}" for each in (value, deviation) if each is not None)


def settings_cell(settings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def machine() -> dict[str, Any]:
    """What a study ran on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
