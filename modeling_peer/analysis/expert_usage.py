# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How evenly experts are used: the measures of the paper's table 3, on their own or in the logs of a `Trainer`."""

import inspect
import re
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..arguments.check_types import check_types
from ..router import ProductKeyRouter
from .evaluation import evaluation
from .expert_sets import find_expert_sets, module_label, observe_router, observe_routers


class ExpertUsageMeter:
    """
    Accumulates the router weight of each expert on a device, without synchronizing with it.

    Args:
        num_experts (`int`): Number of experts N.
        device (`torch.device`, *optional*): Where to accumulate. Defaults to the default device of torch.

    Attributes:
        scores (`torch.Tensor` of shape `(num_experts,)`): Accumulated router weight of each expert, float32.
        top1_counts (`torch.Tensor` of shape `(num_experts,)`):
            How often each expert was the best of a head, with a non-zero weight, int64.
    """

    @check_types
    def __init__(self, num_experts: int, device: torch.device | str | None = None):
        self.scores = torch.zeros(num_experts, device=device)
        self.top1_counts = torch.zeros(num_experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, indices: torch.Tensor, weights: torch.Tensor) -> None:
        """
        Add the output of a router, see [`ProductKeyRouter`].

        Args:
            indices (`torch.Tensor` of shape `(batch_size, sequence_length, num_heads, k)`): Experts, best first.
            weights (`torch.Tensor` of the same shape): Their router weights, not negative, 0 where there is no token.
        """
        if indices.is_floating_point():
            raise ValueError(f"`indices` must be integers, got {indices.dtype}.")
        device = self.scores.device
        indices, weights = indices.to(device), weights.to(device, torch.float32)
        # Summed separately first: added one by one to a large float32 sum, small weights would be lost.
        self.scores += torch.zeros_like(self.scores).index_add_(0, indices.flatten(), weights.flatten())
        best = indices[..., 0]
        self.top1_counts.index_add_(0, best.flatten(), (weights[..., 0] > 0).flatten().long())

    def compute(self) -> dict[str, float]:
        """
        Compute the measures of the accumulated weights; the unevenness is NaN if there are none.

        Returns:
            `dict[str, float]`:
                - `usage`: fraction of experts with non-zero accumulated weight (paper, table 3);
                - `unevenness`: Kullback-Leibler divergence of the normalized accumulated weights from uniform, in
                  nats: 0 if all experts are used equally, log N if only one is used (paper, table 3);
                - `top1_usage`: fraction of experts that were ever the best of a head.
        """
        scores = self.scores.cpu().double()
        shares = scores / scores.sum()
        return {
            "usage": (scores > 0).double().mean().item(),
            "unevenness": torch.xlogy(shares, shares * len(shares)).sum().item(),
            "top1_usage": (self.top1_counts > 0).double().mean().item(),
        }


@check_types
def measure_usage(model: nn.Module, **inputs: Any) -> dict[str, ExpertUsageMeter]:
    """
    Measure which experts a text uses: the router weights of all its tokens, in evaluation mode.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model with grafts.
        inputs: Arguments of the model, such as `input_ids` and `attention_mask`, in batches; padding is not counted.

    Returns:
        `dict[str, ExpertUsageMeter]`: a meter for each set of experts, under the name of the module that holds their
        tables. Experts that [`add_experts`] added to a layer come after its first ones.

    Raises:
        `ValueError`: if the model has no experts.

    ```python
    >>> scores = measure_usage(model, input_ids=input_ids)["model.layers.1.mlp.expert_pool"].scores
    >>> scores.topk(10)  # the experts that the text uses most
    >>> scores[model.config.num_experts :].sum() / scores.sum()  # share of the added experts
    ```
    """
    sets = find_expert_sets(model)
    device = next(model.parameters()).device
    meters = {name: ExpertUsageMeter(each.num_experts, device) for name, each in sets.items()}
    hooks = observe_routers(sets, lambda name, *retrieved: meters[name].update(*retrieved))
    with evaluation(model, hooks):
        model(**inputs)
    return meters


class ExpertUsageCallback(TrainerCallback):
    """
    Adds the measures of [`ExpertUsageMeter`] to the logs of a `Trainer`:

    ```python
    >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[ExpertUsageCallback()])
    ```

    Each log of a training loss gets `expert_usage` and `expert_unevenness`, means over PEER and PKM layers. They cover
    the training forward passes since the last such log, over all ranks. `trainer.state.log_history` also gets those of
    each layer, `expert_usage/layer_{i}`, `expert_unevenness/layer_{i}` and `expert_top1_usage/layer_{i}`
    (`…_added_{j}` for a generation added in protected mode, `…_{adapter}` for a graft, `…_graft_{j}` for a merged
    one). The metrics of an evaluation or prediction during training get the means and those of each layer, of the
    forward passes in evaluation mode, with the prefix of the other metrics (`eval_`).

    Logs and metrics reach TensorBoard, trackio, Weights & Biases and the other integrations of `report_to`: when a
    training begins, the callback puts itself before all others. If a release of Transformers calls callbacks in
    another way, the measures reach only the history of the training.
    """

    def __init__(self):
        self._hooks = []
        # The name of each router in logs, and its meters of forward passes in evaluation and in training.
        self._meters = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # An event passes everything but the list of callbacks, so it is taken from the caller. It is changed in place,
        # so that the event that runs now still calls the later callbacks.
        handler = inspect.currentframe().f_back.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
        self.on_train_end(args, state, control)
        modules = dict(model.named_modules())
        for name, router in modules.items():
            if isinstance(router, ProductKeyRouter):
                added = re.search(r"added_routers\.(\d+)", name)
                label = module_label(modules, name) + (f"_added_{added[1]}" if added else "")
                self._attach(label, router, args.device)

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._meters = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        prefix = "" if "loss" in logs else _evaluation_prefix(logs)
        if prefix is not None:
            means, of_layers = self._read(prefix)
            logs.update(means | of_layers if prefix else means)
            # The Trainer has already copied the logs into its history.
            state.log_history[-1].update(means | of_layers)

    def on_predict(self, args, state, control, metrics, **kwargs):
        if prefix := _evaluation_prefix(metrics):
            means, of_layers = self._read(prefix)
            metrics.update(means | of_layers)

    def _attach(self, label, router, device):
        own = [ExpertUsageMeter(router.generation.num_experts, device) for _ in range(2)]
        self._meters.append((label, own))

        def measure(router, indices, weights):
            own[router.training].update(indices - router.generation.first_expert, weights)

        self._hooks.append(observe_router(router, measure))

    def _read(self, prefix):
        """
        The means to log, and the values of each layer: of training if there is no prefix. A router without tokens has
        none, such as the original that PEFT keeps beside a copy.
        """
        measures = {}
        for label, own in self._meters:
            meter = own[not prefix]
            for total in (meter.scores, meter.top1_counts):
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(total)
            if meter.scores.any():
                measures[label] = meter.compute()
            meter.scores.zero_()
            meter.top1_counts.zero_()
        means = {
            f"{prefix}expert_{name}": fmean(each[name] for each in measures.values())
            for name in ("usage", "unevenness")
            if measures
        }
        return means, {
            f"{prefix}expert_{name}/{label}": value for label, own in measures.items() for name, value in own.items()
        }


def _evaluation_prefix(metrics):
    """`"eval_"` if there is an `"eval_runtime"`, and so on; `None` if these are not metrics of an evaluation."""
    names = (name for name in metrics if name.endswith("_runtime") and name != "train_runtime")
    return next((name.removesuffix("runtime") for name in names), None)
