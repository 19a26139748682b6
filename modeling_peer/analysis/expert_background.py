# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Background counts: how many documents of a reference corpus use each expert, saved beside the model."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
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

from ..arguments.check_types import check_type, check_types
from .evaluation import evaluation
from .expert_sets import find_expert_sets, observe_routers


FILE_NAME = "expert_background.safetensors"
COUNTS = "document_counts."


@dataclass(eq=False)
class ExpertBackground:
    """
    The number of documents of a reference corpus that use each expert. A document is one sequence of a batch. It uses
    an expert if one of its tokens retrieves the expert with a non-zero weight, in any of the layers that share a pool.
    Padding does not count.

    Args:
        document_counts (`dict[str, torch.Tensor]`):
            For each set of experts, under the name of the module that holds their tables, the number of documents that
            use each expert: int64, of shape `(num_experts,)`.
        num_documents (`int`): Number of documents.

    ```python
    >>> background = ExpertBackground.measure(model, dataset, batch_size=8)
    >>> background.save_pretrained("checkpoint")  # beside the model's weights
    >>> background = ExpertBackground.from_pretrained("checkpoint")
    ```
    """

    document_counts: dict[str, torch.Tensor]
    num_documents: int

    def __post_init__(self):
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        for name, counts in self.document_counts.items():
            if counts.is_floating_point() or not 0 <= counts.min() <= counts.max() <= self.num_documents:
                raise ValueError(
                    f"`document_counts` of {name} must be integers from 0 to `num_documents`, which is "
                    f"{self.num_documents}, got {counts.dtype} from {counts.min()} to {counts.max()}."
                )

    @classmethod
    @check_types
    def measure(
        cls,
        model: nn.Module,
        dataset: Any,
        batch_size: int = 8,
        progress_bar: bool = True,
    ) -> "ExpertBackground":
        """
        Measure the counts of a corpus, in evaluation mode and without gradients.

        Args:
            model (`nn.Module`): Any module with PEER or PKM layers.
            dataset (`DataLoader`, `Dataset` or iterable):
                A `DataLoader` of batches with the model's arguments by name (`labels` are ignored), or examples with
                the `input_ids`, and optionally the `attention_mask`, of one sequence each.
            batch_size (`int`, *optional*, defaults to 8): Number of examples in a batch; unused for a `DataLoader`.
            progress_bar (`bool`, *optional*, defaults to `True`): Whether to show progress.

        Raises:
            `ValueError`: if the model has no experts, or the corpus has no documents.
        """
        sets = find_expert_sets(model)
        counts = {name: torch.zeros(each.num_experts, dtype=torch.int64) for name, each in sets.items()}
        num_documents = 0
        used: dict[str, torch.Tensor] = {}

        def note(name, indices, weights):
            if name not in used:
                used[name] = torch.zeros(len(indices), len(counts[name]), dtype=torch.bool, device=indices.device)
            documents = torch.arange(len(indices), device=indices.device)[:, None]
            cells = (documents * len(counts[name]) + indices.flatten(1))[weights.flatten(1) != 0]
            used[name].view(-1)[cells.to(used[name].device)] = True

        # Without the head, whose output is not needed.
        decoder = getattr(model, "base_model", model)
        device = next(model.parameters()).device
        hooks = observe_routers(sets, note)
        with evaluation(model, hooks):
            for batch in tqdm(batches_of(dataset, batch_size), "Background", disable=not progress_bar):
                decoder(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
                num_documents += max(map(len, used.values()), default=0)
                for name, documents in used.items():
                    counts[name] += documents.sum(0).cpu()
                used.clear()
        if not num_documents:
            raise ValueError("`dataset` must have at least one document, got none.")
        return cls(counts, num_documents)

    def used(self, name: str, min_documents: int = 1) -> torch.Tensor:
        """Whether at least `min_documents` documents use each expert of a set: bool, `(num_experts,)`."""
        return self.document_counts[name] >= min_documents

    def check(self, model: nn.Module) -> None:
        """
        Raise `ValueError` if the sets of experts of the counts and of a model differ in name or size. They do if the
        counts were measured before the model grew.
        """
        found = {name: len(counts) for name, counts in self.document_counts.items()}
        expected = {name: each.num_experts for name, each in find_expert_sets(model).items()}
        if found != expected:
            raise ValueError(
                f"The background counts are of other experts: found {found}, expected {expected}. Measure them on "
                "this model as it is now."
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
            `ValueError`: if the file is damaged, or another's.
        """
        path = cached_file(pretrained_model_name_or_path, FILE_NAME, **kwargs)
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(COUNTS)]  # noqa: SIM118
                counts = {name.removeprefix(COUNTS): file.get_tensor(name) for name in names}
                return cls(counts, int(file.metadata()["num_documents"]))
        except (SafetensorError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a whole file of `ExpertBackground`. Measure the counts again.") from error


def batches_of(dataset: Any, batch_size: int) -> DataLoader:
    """Make a `DataLoader` of examples, padded by [`pad_examples`]. A `DataLoader` is returned as it is."""
    if isinstance(dataset, DataLoader):
        return dataset
    if isinstance(dataset, Mapping):
        raise TypeError(f"Examples must be a `Dataset` or an iterable of dicts, got a {type(dataset).__name__}.")
    examples: Any = dataset if hasattr(dataset, "__len__") else list(dataset)
    return DataLoader(examples, batch_size, collate_fn=pad_examples)


def pad_examples(examples: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch of sequences, padded on the right, with an attention mask."""
    columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": []}
    for example in examples:
        is_tokenized = isinstance(example, Mapping) and "input_ids" in example
        input_ids = torch.as_tensor(example["input_ids"]) if is_tokenized else torch.empty(())
        if input_ids.ndim != 1:
            raise ValueError(
                "An example must be a dict with `input_ids` of shape (sequence_length,), as a tokenizer returns for a "
                f"text without `return_tensors`, got {reprlib.repr(example)}."
            )
        columns["input_ids"].append(input_ids)
        columns["attention_mask"].append(torch.as_tensor(example.get("attention_mask", torch.ones_like(input_ids))))
    return {name: pad_sequence(column, batch_first=True) for name, column in columns.items()}
