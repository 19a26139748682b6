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
"""How many documents of a reference corpus use each expert, kept beside the model."""

from collections.abc import Callable, Iterable
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

from .evaluation import evaluation
from .expert_sets import find_expert_sets, observe_retrievals


FILE_NAME = "expert_background.safetensors"
COUNTS = "document_counts."


class ExpertBackground:
    """
    Which experts a reference corpus uses: of each set of experts, in how many documents, a document being one sequence of
    a batch. Experts of a pool that layers share are used in a document if any of the layers retrieved them; experts of
    weight zero, and those that padding retrieved, are not used.

    Args:
        document_counts (`dict[str, torch.Tensor]`):
            Of each set of experts, under the path of the module that holds their tables, the number of documents that
            used each: int64, of shape `(num_experts,)`.
        num_documents (`int`): Number of documents.

    ```python
    >>> background = ExpertBackground.measure(model, dataset, batch_size=8)
    >>> background.save_pretrained("checkpoint")  # beside the model's weights
    >>> background = ExpertBackground.from_pretrained("checkpoint")
    ```
    """

    def __init__(self, document_counts: dict[str, torch.Tensor], num_documents: int):
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
        Runs a corpus through a model, in evaluation mode and without gradients.

        Args:
            model (`nn.Module`): Any module with PEER or PKM layers.
            dataset (`DataLoader`, `Dataset` or iterable):
                Batches of a `DataLoader` are what the model takes by name (`labels` are left out). Otherwise examples, each
                with `input_ids`, and perhaps an `attention_mask`, of one sequence.
            batch_size (`int`, *optional*, defaults to 8): Of examples; a `DataLoader` has its own.
            data_collator (`Callable`, *optional*):
                Makes a batch of examples. If not given, sequences are padded on the right, with a mask that says so.
            progress_bar (`bool`, *optional*, defaults to `True`)

        Raises:
            `ValueError`: if the model has no experts or the corpus no documents.
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
            numbers = (documents * len(counts[name]) + indices.flatten(1))[count.flatten(1)]
            used[name].view(-1)[numbers.to(used[name].device)] = True

        # Without its head, if it has one: what it says is not asked.
        decoder = getattr(model, "base_model", model)
        device = next(model.parameters()).device
        hooks = observe_retrievals(sets, note)
        try:
            with evaluation(model):
                for batch in tqdm(batches, disable=not progress_bar, desc="Background"):
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
        """Adds the documents of another corpus. Raises `ValueError` if they were measured on other experts."""
        self._check_sizes(other.sizes, "the other background")
        for name, counts in other.document_counts.items():
            self.document_counts[name] = self.document_counts[name] + counts
        self.num_documents += other.num_documents

    @property
    def sizes(self) -> dict[str, int]:
        """The number of experts of each set."""
        return {name: len(counts) for name, counts in self.document_counts.items()}

    def used(self, name: str, min_documents: int = 1) -> torch.Tensor:
        """Which experts of a set at least `min_documents` documents used: bool, `(num_experts,)`."""
        return self.document_counts[name] >= min_documents

    def check(self, model: nn.Module) -> None:
        """
        Raises `ValueError` if it was measured on other experts than the model has, in name or number: the same model
        before it got more of them, for one.
        """
        sizes = {name: each.num_experts for name, each in find_expert_sets(model).items()}
        self._check_sizes(sizes, type(model).__name__)

    def _check_sizes(self, expected, whose):
        if self.sizes != expected:
            raise ValueError(
                f"The background counts are of other experts than those of {whose}: found {self.sizes}, expected "
                f"{expected}. Measure them anew on this model, as it is now."
            )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes `expert_background.safetensors` into a folder, that of a checkpoint for one."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {COUNTS + name: counts.contiguous() for name, counts in self.document_counts.items()}
        save_file(tensors, folder / FILE_NAME, {"format": "pt", "num_documents": str(self.num_documents)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "ExpertBackground":
        """
        Args:
            pretrained_model_name_or_path (`str`): A folder, or the id of a repository of the Hub.
            kwargs: `revision`, `subfolder`, `token` and the like, as in the library.

        Raises:
            `OSError`: if there is no `expert_background.safetensors`.
            `ValueError`: if it holds something else.
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
        return cls(counts, int(metadata["num_documents"]))


def batches_of(dataset: Any, batch_size: int, data_collator: Callable | None = None) -> DataLoader:
    """A `DataLoader` as it is, or one of examples, padded by [`pad_examples`] if there is no collator."""
    if isinstance(dataset, DataLoader):
        return dataset
    examples: Any = dataset if hasattr(dataset, "__len__") else list(dataset)
    return DataLoader(examples, batch_size, collate_fn=data_collator or pad_examples)


def pad_examples(examples: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of sequences, padded on the right."""
    columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": []}
    for example in examples:
        input_ids = torch.as_tensor(example["input_ids"])
        columns["input_ids"].append(input_ids)
        columns["attention_mask"].append(torch.as_tensor(example.get("attention_mask", torch.ones_like(input_ids))))
    return {name: pad_sequence(column, batch_first=True) for name, column in columns.items()}


__all__ = ["ExpertBackground"]
