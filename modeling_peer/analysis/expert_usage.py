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
"""How evenly experts are used: the measures of the paper's table 3, on their own or in the logs of a `Trainer`."""

import math
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from ..library_releases import in_backward, put_first
from ..product_key_router import ProductKeyRouter
from .arguments import check_integer, shown
from .evaluation import evaluation
from .expert_sets import find_expert_sets, module_label, observe_routers


class ExpertUsageMeter:
    """
    Accumulates the router weight of each expert, on the device of the router and without synchronizing with it.

    Args:
        num_experts (`int`): Number of experts N.
        device (`torch.device`, *optional*): Where to accumulate. Defaults to the default device of torch.

    Attributes:
        scores (`torch.Tensor` of shape `(num_experts,)`): Accumulated router weight of each expert, float32.
        top1_counts (`torch.Tensor` of shape `(num_experts,)`):
            How often each was the best expert of a head, with a non-zero weight, int64.

    Raises:
        `ValueError`: if `num_experts` is not a positive integer.
    """

    def __init__(self, num_experts: int, device: torch.device | str | None = None):
        check_integer("num_experts", num_experts)
        self.scores = torch.zeros(num_experts, device=device)
        self.top1_counts = torch.zeros(num_experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, indices: torch.Tensor, weights: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """
        Add the output of a router, see [`ProductKeyRouter`].

        Args:
            indices (`torch.Tensor` of shape `(batch_size, sequence_length, num_heads, k)`): Experts, best first.
            weights (`torch.Tensor` of the same shape): Their router weights, not negative.
            padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                True (or 1) where there is a token; other positions are not counted.

        Raises:
            `ValueError`: for other shapes, such as those of a MoE router.
        """
        if indices.ndim != 4 or weights.shape != indices.shape:
            raise ValueError(
                "`indices` and `weights` must both be of shape (batch_size, sequence_length, num_heads, k), as PEER "
                f"and PKM routers return them, got {tuple(indices.shape)} and {tuple(weights.shape)}."
            )
        device = self.scores.device
        indices, weights = indices.to(device), weights.to(device, torch.float32)
        is_token = torch.ones(1, dtype=torch.bool, device=device)
        if padding_mask is not None:
            is_token = padding_mask.to(device, torch.bool)[..., None]
        # Selected rather than multiplied by zero: weights of padding may be NaN.
        weights = torch.where(is_token[..., None], weights, 0.0)
        # Summed separately first: added one by one to a large float32 sum, small weights would be lost.
        self.scores += torch.zeros_like(self.scores).index_add_(0, indices.flatten(), weights.flatten())
        best = indices[..., 0]
        self.top1_counts.index_add_(0, best.flatten(), (weights[..., 0] > 0).flatten().long())

    def sum_over_ranks(self) -> None:
        """Replace what was accumulated by its sum over the ranks of torch.distributed, all of which must call this."""
        dist.all_reduce(self.scores)
        dist.all_reduce(self.top1_counts)

    def compute(self) -> dict[str, float]:
        """
        Compute the measures of what was accumulated; they are NaN if nothing was.

        Returns:
            `dict[str, float]`:
                - `usage`: fraction of experts with non-zero accumulated weight (paper, table 3);
                - `unevenness`: Kullback-Leibler divergence of the normalized accumulated weights from uniform, in
                  nats: 0 if all experts are used equally, log N if only one is used (paper, table 3);
                - `top1_usage`: fraction of experts that were ever the best of a head.
        """
        scores = self.scores.cpu().double()
        total = scores.sum()
        if total == 0:
            return dict.fromkeys(("usage", "unevenness", "top1_usage"), math.nan)
        shares = scores / total
        return {
            "usage": (scores > 0).double().mean().item(),
            "unevenness": torch.xlogy(shares, shares * len(shares)).sum().item(),
            "top1_usage": (self.top1_counts > 0).double().mean().item(),
        }

    def reset(self) -> None:
        """Reset the accumulators."""
        self.scores.zero_()
        self.top1_counts.zero_()


def measure_usage(model: nn.Module, **inputs: Any) -> dict[str, ExpertUsageMeter]:
    """
    Measure which experts a text uses: the router weights of all its tokens, in evaluation mode.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model with grafts.
        inputs: Arguments of the model, such as `input_ids` and `attention_mask`; padding is not counted.

    Returns:
        `dict[str, ExpertUsageMeter]`: a meter for each set of experts, under the name of the module that holds their
        tables. Experts that [`add_experts`] added to a layer come after its first ones.

    Raises:
        `ValueError`: if the model has no experts, or `input_ids` or `inputs_embeds` are not a batch of sequences.

    ```python
    >>> scores = measure_usage(model, input_ids=input_ids)["model.layers.1.mlp.expert_pool"].scores
    >>> scores.topk(10)  # the experts that the text uses most
    >>> scores[model.config.num_experts :].sum() / scores.sum()  # share of the added experts
    ```
    """
    _check_batch("input_ids", inputs.get("input_ids"), ("batch_size", "sequence_length"))
    _check_batch("inputs_embeds", inputs.get("inputs_embeds"), ("batch_size", "sequence_length", "hidden_size"))
    sets = find_expert_sets(model)
    device = next(model.parameters()).device
    meters = {name: ExpertUsageMeter(each.num_experts, device) for name, each in sets.items()}
    hooks = observe_routers(sets, lambda name, *retrieved: meters[name].update(*retrieved))
    try:
        with evaluation(model):
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return meters


def _check_batch(name, value, dimensions):
    if value is None:
        return
    expected = f"({', '.join(dimensions)})"
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor of shape {expected}, got {shown(value)}.")
    if value.ndim != len(dimensions):
        raise ValueError(
            f"`{name}` must be of shape {expected}, got {tuple(value.shape)}: one sequence is `{name}[None]`."
        )
    if name == "input_ids" and value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`{name}` must be token ids, int32 or int64, got {value.dtype}.")


class ExpertUsageCallback(TrainerCallback):
    """
    Adds the measures of [`ExpertUsageMeter`] for every PEER and PKM layer to the logs of a `Trainer`:

    ```python
    >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[ExpertUsageCallback()])
    ```

    Each log of a training loss gets `expert_usage/layer_{i}`, `expert_unevenness/layer_{i}` and
    `expert_top1_usage/layer_{i}` (`…_added_{j}` for a generation added in protected mode, `…_{adapter}` for a graft,
    `…_graft_{j}` for a merged one), of the training forward passes since the last such log and over all ranks. The
    metrics of an evaluation or prediction during training get the same of the forward passes in evaluation mode, with
    the prefix of the other metrics (`eval_`).

    All of them are in `trainer.state.log_history`, and reach TensorBoard, trackio, Weights & Biases and the other
    integrations of `report_to`: when a training begins, the callback puts itself before all others.
    """

    def __init__(self):
        self._hooks = []
        # The name of each layer and its meter, for forward passes in training (True) and evaluation (False).
        self._meters = {True: [], False: []}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        put_first(self)
        self._detach()
        modules = dict(model.named_modules())
        for name, router in modules.items():
            if isinstance(router, ProductKeyRouter):
                self._attach(_label(modules, name), router, args.device)

    def on_train_end(self, args, state, control, **kwargs):
        self._detach()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            values = self._read(training=True)
        elif prefix := _evaluation_prefix(logs):
            values = self._read(training=False, prefix=prefix)
        else:
            return
        logs.update(values)
        # The Trainer has already copied the logs into its history.
        state.log_history[-1].update(values)

    def on_predict(self, args, state, control, metrics, **kwargs):
        if prefix := _evaluation_prefix(metrics):
            metrics.update(self._read(training=False, prefix=prefix))

    def _attach(self, label, router, device):
        first_expert = router.generation.first_expert
        meters = {}
        for training in (True, False):
            meters[training] = ExpertUsageMeter(router.generation.num_experts, device)
            self._meters[training].append((label, meters[training]))

        # Not traced: a graph would keep the answer of the first forward pass to whether it runs in the backward pass.
        @torch.compiler.disable
        def measure(module, args, kwargs, output):
            # Activation checkpointing runs a forward pass again in the backward pass.
            if not in_backward():
                padding_mask = args[1] if len(args) > 1 else kwargs.get("padding_mask")
                indices, weights = output
                meters[module.training].update(indices - first_expert, weights, padding_mask)

        self._hooks.append(router.register_forward_hook(measure, with_kwargs=True))

    def _detach(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._meters = {True: [], False: []}

    def _read(self, training, prefix=""):
        """The values to log. A router that no token passed has none, as the original that PEFT keeps beside a copy."""
        values = {}
        for label, meter in self._meters[training]:
            if dist.is_available() and dist.is_initialized():
                meter.sum_over_ranks()
            measures = meter.compute()
            meter.reset()
            if not math.isnan(measures["usage"]):
                values |= {f"{prefix}expert_{name}/{label}": value for name, value in measures.items()}
        return values


def _label(modules, name):
    """The name of a router in logs: its layer, its graft, and its addition."""
    added = re.search(r"added_routers\.(\d+)", name)
    return module_label(modules, name) + (f"_added_{added[1]}" if added else "")


def _evaluation_prefix(metrics):
    """`"eval_"` if there is an `"eval_runtime"`, and so on; `None` if these are not metrics of an evaluation."""
    for name in metrics:
        if name.endswith("_runtime") and name != "train_runtime":
            return name.removesuffix("runtime")
    return None


__all__ = ["ExpertUsageCallback", "ExpertUsageMeter", "measure_usage"]
