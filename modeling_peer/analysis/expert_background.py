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
"""Background counts: how many documents of a reference corpus use each expert, saved beside the model."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils.hub import cached_file

from .arguments import check_integer, shown
from .evaluation import evaluation
from .expert_sets import find_expert_sets, observe_retrievals


FILE_NAME = "expert_background.safetensors"
COUNTS = "document_counts."


class ExpertBackground:
    """
    The number of documents of a reference corpus that use each expert. A document is one sequence of a batch. It uses
    an expert if a token retrieves it with a non-zero weight, in any of the layers that share a pool; padding does not
    count.

    Args:
        document_counts (`dict[str, torch.Tensor]`):
            For each set of experts, under the name of the module that holds their tables, the number of documents that
            use each expert: int64, of shape `(num_experts,)`.
        num_documents (`int`): Number of documents.

    Raises:
        `ValueError`: for counts that are not integers from 0 to `num_documents`.

    ```python
    >>> background = ExpertBackground.measure(model, dataset, batch_size=8)
    >>> background.save_pretrained("checkpoint")  # beside the model's weights
    >>> background = ExpertBackground.from_pretrained("checkpoint")
    ```
    """

    def __init__(self, document_counts: dict[str, torch.Tensor], num_documents: int):
        check_integer("num_documents", num_documents, minimum=0)
        if not isinstance(document_counts, Mapping):
            raise ValueError(f"`document_counts` must be tensors by name, got {shown(document_counts)}.")
        for name, counts in document_counts.items():
            _check_counts(name, counts, num_documents)
        self.document_counts = document_counts
        self.num_documents = num_documents

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        dataset: Any,
        batch_size: int = 8,
        data_collator: Callable | None = None,
        progress_bar: bool = True,
    ) -> "ExpertBackground":
        """
        Measure the counts of a corpus, in evaluation mode and without gradients.

        Args:
            model (`nn.Module`): Any module with PEER or PKM layers.
            dataset (`DataLoader`, `Dataset` or iterable):
                A `DataLoader` of batches with the model's arguments by name (`labels` are ignored), or examples with
                the `input_ids`, and optionally the `attention_mask`, of one sequence each.
            batch_size (`int`, *optional*, defaults to 8): Of examples; a `DataLoader` has its own.
            data_collator (`Callable`, *optional*):
                Makes a batch of examples. By default sequences are padded on the right, with an attention mask.
            progress_bar (`bool`, *optional*, defaults to `True`): Whether to show progress.

        Raises:
            `ValueError`: if the model has no experts, the corpus has no documents, or its examples are something else.
        """
        sets = find_expert_sets(model)
        batches = batches_of(dataset, batch_size, data_collator)
        counts = {name: torch.zeros(each.num_experts, dtype=torch.int64) for name, each in sets.items()}
        num_documents = 0
        used: dict[str, torch.Tensor] = {}

        def note(name, indices, count):
            if name not in used:
                used[name] = torch.zeros(len(indices), len(counts[name]), dtype=torch.bool, device=indices.device)
            documents = torch.arange(len(indices), device=indices.device)[:, None]
            cells = (documents * len(counts[name]) + indices.flatten(1))[count.flatten(1)]
            used[name].view(-1)[cells.to(used[name].device)] = True

        # Without the head, if there is one: its output is not needed.
        decoder = getattr(model, "base_model", model)
        device = next(model.parameters()).device
        hooks = observe_retrievals(sets, note)
        try:
            with evaluation(model):
                for batch in tqdm(batches, disable=not progress_bar, desc="Background"):
                    _check_batch(batch)
                    decoder(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
                    num_documents += max(map(len, used.values()), default=0)
                    for name, documents in used.items():
                        counts[name] += documents.sum(0).cpu()
                    used.clear()
        finally:
            for hook in hooks:
                hook.remove()
        if not num_documents:
            raise ValueError("`dataset` must have at least one document, got none.")
        return cls(counts, num_documents)

    def update(self, other: "ExpertBackground") -> None:
        """Add the counts of another corpus. Raises `ValueError` if they were measured on other experts."""
        self._check_sizes(other.sizes, "the other background")
        for name, counts in other.document_counts.items():
            self.document_counts[name] = self.document_counts[name] + counts
        self.num_documents += other.num_documents

    @property
    def sizes(self) -> dict[str, int]:
        """The number of experts of each set."""
        return {name: len(counts) for name, counts in self.document_counts.items()}

    def used(self, name: str, min_documents: int = 1) -> torch.Tensor:
        """Whether at least `min_documents` documents use each expert of a set: bool, `(num_experts,)`."""
        return self.document_counts[name] >= min_documents

    def check(self, model: nn.Module) -> None:
        """
        Raise `ValueError` if the counts were measured on other experts than the model has, by name or by number, such
        as those of the same model before it grew.
        """
        sizes = {name: each.num_experts for name, each in find_expert_sets(model).items()}
        self._check_sizes(sizes, type(model).__name__)

    def _check_sizes(self, expected, whose):
        if self.sizes != expected:
            raise ValueError(
                f"The background counts are of other experts than those of {whose}: found {self.sizes}, expected "
                f"{expected}. Measure them on this model as it is now."
            )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `expert_background.safetensors` into a folder, such as that of a checkpoint."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {COUNTS + name: counts.contiguous() for name, counts in self.document_counts.items()}
        save_file(tensors, folder / FILE_NAME, {"format": "pt", "num_documents": str(self.num_documents)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "ExpertBackground":
        """
        Read the counts that [`save_pretrained`] wrote.

        Args:
            pretrained_model_name_or_path (`str`): A folder, or the id of a repository on the Hub.
            kwargs: `revision`, `subfolder`, `token` and others, as in Transformers.

        Raises:
            `OSError`: if there is no `expert_background.safetensors`.
            `ValueError`: if it contains something else.
        """
        path = cached_file(pretrained_model_name_or_path, FILE_NAME, **kwargs)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                names = filter(lambda name: name.startswith(COUNTS), file.keys())
                counts = {name.removeprefix(COUNTS): file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from None
        if not counts or not metadata.get("num_documents", "").isdecimal():
            raise ValueError(
                f"{path} must have tensors named `{COUNTS}…` and `num_documents` in its metadata, got "
                f"{sorted(counts)} and {metadata}."
            )
        try:
            return cls(counts, int(metadata["num_documents"]))
        except ValueError as error:
            raise ValueError(f"{path} has no valid counts: {error}") from None


def _check_counts(name, counts, num_documents):
    if not isinstance(counts, torch.Tensor):
        raise ValueError(
            f"`document_counts[{name!r}]` must be a tensor of integers of shape (num_experts,), got {shown(counts)}."
        )
    if counts.ndim != 1 or counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(
            f"`document_counts[{name!r}]` must be integers of shape (num_experts,), got {counts.dtype} of shape "
            f"{tuple(counts.shape)}."
        )
    wrong = counts[(counts < 0) | (counts > num_documents)]
    if len(wrong):
        raise ValueError(
            f"`document_counts[{name!r}]` must be from 0 to `num_documents` = {num_documents}, got {len(wrong)} "
            f"others, such as {wrong[:5].tolist()}."
        )


def _check_batch(batch):
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"Batches of `dataset` must be arguments of the model by name, got a {type(batch).__name__}: "
            f"{batch!r:.80}."
        )


def batches_of(dataset: Any, batch_size: int, data_collator: Callable | None = None) -> DataLoader:
    """Make a `DataLoader` of examples, padded by [`pad_examples`] without a collator; one is returned as it is."""
    if isinstance(dataset, DataLoader):
        return dataset
    if isinstance(dataset, (str, bytes, Mapping)) or not (
        hasattr(dataset, "__len__") or isinstance(dataset, Iterable)
    ):
        raise ValueError(
            "`dataset` must be a DataLoader or an iterable of examples, each a dict with the `input_ids` of one "
            f"sequence, got {shown(dataset)}."
        )
    check_integer("batch_size", batch_size)
    examples: Any = dataset if hasattr(dataset, "__len__") else list(dataset)
    return DataLoader(examples, batch_size, collate_fn=data_collator or pad_examples)


def pad_examples(examples: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    Make a batch of sequences, padded on the right. Raises `ValueError` for examples without the `input_ids` of one
    sequence.
    """
    columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": []}
    for example in examples:
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise ValueError(
                "Examples of `dataset` must have `input_ids`, as a tokenizer returns them, got a "
                f"{type(example).__name__}: {example!r:.80}."
            )
        input_ids = _as_token_ids(example["input_ids"])
        if input_ids.ndim != 1:
            raise ValueError(
                f"`input_ids` of an example must be those of one sequence, got shape {tuple(input_ids.shape)}."
            )
        columns["input_ids"].append(input_ids)
        columns["attention_mask"].append(torch.as_tensor(example.get("attention_mask", torch.ones_like(input_ids))))
    return {name: pad_sequence(column, batch_first=True) for name, column in columns.items()}


def _as_token_ids(input_ids):
    try:
        tokens = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError):
        tokens = None
    if tokens is None or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`input_ids` of an example must be token ids, int32 or int64, got {shown(input_ids)}.")
    return tokens


__all__ = ["ExpertBackground"]
