# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the launcher of a script has decided for it."""

import os

from transformers import TrainingArguments


def uses_fsdp(training_args: TrainingArguments) -> bool:
    """
    Whether FSDP splits the model: by `--fsdp`, or by the configuration file of `accelerate launch`, which only sets
    variables of the environment.
    """
    return bool(training_args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
