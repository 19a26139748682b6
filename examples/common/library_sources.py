# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Text that every machine has, the source code of Python's standard library, and a tokenizer that is trained on it."""

import sys
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from common.command_line import UsageError


# Skipped in the standard library: installed packages, tests, and tables of data in the form of code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_FILES = "_sysconfigdata"

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"

# Lets users try `transformers serve` and `transformers chat`. Chats are plain text, as new models know no roles.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def library_files(validation_split_percentage: int = 5) -> tuple[Path, dict[str, list[str]]]:
    """
    Finds the source files of the standard library of the running Python.

    Returns:
        `tuple`: the folder that they are in, and their names in it by split, `"train"` and `"validation"`. The order
        and the split depend only on the names.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py") if _is_library_source(path, root)]
    if not names:
        raise FileNotFoundError(
            f"There are no Python sources in {root}: choose another text, --dataset_name or --train_file."
        )
    hashes = {name: crc32(name.encode()) for name in sorted(names)}
    shuffled = sorted(hashes, key=hashes.get)
    held_out = [name for name in shuffled if hashes[name] % 100 < validation_split_percentage]
    return root, {"train": [name for name in shuffled if name not in held_out], "validation": held_out}


def _is_library_source(path, root):
    folders = path.relative_to(root).parts[:-1]
    return SKIPPED_FOLDERS.isdisjoint(folders) and not path.name.startswith(SKIPPED_FILES)


def read_source(file: Path) -> str:
    """Reads a source file in the encoding that it declares."""
    with tokenize.open(file) as opened:
        return opened.read()


def byte_level_tokenizer(
    texts: Iterable[str] | Iterable[list[str]], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer, which can encode any text, and chats as plain text. Training is deterministic.

    Args:
        texts (`Iterable`): Texts to train on, or batches of them.
        vocab_size (`int`): Maximum number of tokens; a short text gives fewer.
        max_length (`int`): Number of tokens to truncate to (`model_max_length`).
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise UsageError(
            f"A byte-level tokenizer has at least {smallest} tokens, but the `vocab_size` of the model is "
            f"{vocab_size}: choose a larger one (--config_overrides vocab_size=4096), or give a tokenizer "
            "(--tokenizer_name)."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=alphabet,
        show_progress=sys.stdout.isatty(),  # in a file, its bars are empty lines
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
