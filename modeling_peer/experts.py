# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A pool of experts of one neuron each: exact retrieval by product keys, and their weighted sum (Xu Owen He, "Mixture of
A Million Experts", arXiv 2407.04153, section 2.1 and Algorithm 1).

Two functions do the work, each found in a registry by `PeerConfig.expert_kernels`:

    retrieve(queries [T, h, 2, d_k/2], sub_keys [h or 1, 2, √N, d_k/2], k) -> indices [T, h, k], scores [T, h, k]
    run_experts(hidden [T, d], rows [T, A], weights [T, A], up, gate, down, act_fn) -> [T, d]

`up`, `gate` and `down` are modules that look up rows of a table, `(...) -> (..., d)`: an `nn.Embedding`, or the module
that an adapter or a quantizer put in its place. `up` and `gate` may be `None`. Register a function under a name, or,
as the fastest one for a device type, under `"auto:"` and that type: `RetrievalInterface.register("auto:cuda", mine)`.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.utils import logging
from transformers.utils.generic import GeneralInterface, maybe_autocast

from .configuration_peer import Generation, PeerConfig


logger = logging.get_logger(__name__)

# Elements of gathered rows that are held at a time: 4 MB in float32, which a cache holds.
PIECE_SIZE = 2**20


def expert_index(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """
    The index of the expert in each cell of the key grid. Cells are counted in square shells, m = max(row, column):
    m² + m + row - column. A cell keeps its index in a larger grid, so a pool grows by appending rows to its tables.
    """
    shell = torch.maximum(row, column)
    return shell * shell + shell + row - column


def expert_cell(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cell (row, column) of the key grid of each expert index: the inverse of [`expert_index`]."""
    shell = index.double().sqrt().long()
    before_diagonal = index - shell * shell - shell  # row - column
    return shell + before_diagonal.clamp(max=0), shell - before_diagonal.clamp(min=0)


def winning_pairs(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ranks (i, j) of the pairs that can be among the k best sums: the (i + 1) (j + 1) - 1 pairs that precede (i, j) in
    both lists are at least as good. For k = 16 these are 50 of 256 pairs.
    """
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    row_rank, column_rank = torch.tensor(pairs, device=device).unbind(1)
    return row_rank, column_rank


def product_key_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Retrieve the k best experts of every query exactly: the k best of each half, then of their pairs (section 2.1).

    Args:
        scores (`torch.Tensor` of shape `(..., 2, √N)`):
            Scores of the two halves of a query with the two sets of sub-keys. An expert's score is the sum of two.
        k (`int`): Number of experts to retrieve, at most √N.

    Returns:
        `tuple(torch.Tensor)`: expert indices (int64) and scores, both of shape `(..., k)`, best first.
    """
    half_scores, half_ranks = scores.topk(k, dim=-1)
    row_rank, column_rank = winning_pairs(k, scores.device)
    pair_scores = half_scores[..., 0, :][..., row_rank] + half_scores[..., 1, :][..., column_rank]
    top_scores, pairs = pair_scores.topk(k, dim=-1)
    rows = half_ranks[..., 0, :].gather(-1, row_rank[pairs])
    columns = half_ranks[..., 1, :].gather(-1, column_rank[pairs])
    return expert_index(rows, columns), top_scores


def retrieve(queries: torch.Tensor, sub_keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Retrieve the k best experts of every query exactly, with [`product_key_topk`]. Each half of a query is scored with
    one of the two sets of sub-keys, which each head has for itself or all heads share.
    """
    if sub_keys.shape[0] == 1:
        return product_key_topk(torch.einsum("thpc,pnc->thpn", queries, sub_keys[0]), k)
    return product_key_topk(torch.einsum("thpc,hpnc->thpn", queries, sub_keys), k)


def run_experts_eager(
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    up: nn.Module | None,
    gate: nn.Module | None,
    down: nn.Module,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    Compute `Σ_a weights[t, a] σ(u · x) v` as in Algorithm 1, lines 9 to 14. This reference implementation gathers the
    vectors u, v of all active experts, `[T, A, d]`. It is differentiable repeatedly, in reverse and forward mode.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
        rows (`torch.Tensor` of shape `(num_tokens, num_active)`): Rows of the tables, int64.
        weights (`torch.Tensor` of shape `(num_tokens, num_active)`): Router weights.
        up (`nn.Module`, *optional*): Gives up-projection vectors u. Without it, the sum is over `weights · v`.
        gate (`nn.Module`, *optional*): Gives gate vectors w of `σ(w · x) (u · x) v`.
        down (`nn.Module`): Gives down-projection vectors v.
        act_fn (`Callable`): The activation σ.

    Returns:
        `torch.Tensor` of shape `(num_tokens, hidden_size)`.
    """
    if up is not None:
        neurons = torch.einsum("td,tad->ta", hidden_states, up(rows).to(hidden_states.dtype))
        if gate is None:
            neurons = act_fn(neurons)
        else:
            neurons = act_fn(torch.einsum("td,tad->ta", hidden_states, gate(rows).to(hidden_states.dtype))) * neurons
        weights = neurons * weights
    return torch.einsum("ta,tad->td", weights, down(rows).to(weights.dtype))


class Products(torch.autograd.Function):
    """
    `factors[t] · table[rows[t, a]]`, `[T, A]`, or `Σ_a factors[t, a] table[rows[t, a]]`, `[T, d]`, if `is_sum`.
    Both are in the wider dtype of factors and table, without holding the rows. Each is the gradient of the other.
    """

    @staticmethod
    def forward(ctx, factors, rows, table, is_sum):
        factors = factors.to(torch.promote_types(factors.dtype, table.dtype))
        ctx.save_for_backward(factors, rows, table)
        ctx.is_sum = is_sum
        if is_sum and factors.dtype == table.dtype:
            return F.embedding_bag(rows, table, per_sample_weights=factors, mode="sum")
        products = factors.new_empty(len(rows), table.shape[1] if is_sum else rows.shape[1])
        step = max(PIECE_SIZE // max(rows.shape[1] * table.shape[1], 1), 1)
        for places, given, found in zip(*(each.split(step) for each in (rows, factors, products)), strict=True):
            vectors = F.embedding(places, table).to(factors.dtype)
            torch.bmm(vectors.mT if is_sum else vectors, given[..., None], out=found[..., None])
            del vectors  # the next piece takes its memory, which is in a cache
        return products

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        factors, rows, table = ctx.saved_tensors
        weights, tokens = (factors, gradient) if ctx.is_sum else (gradient, factors)
        sums = of_table = None
        if ctx.needs_input_grad[2]:
            with torch.enable_grad():
                table_of_sums = table.detach().to(weights.dtype).requires_grad_()
                sums = F.embedding_bag(rows, table_of_sums, per_sample_weights=weights, mode="sum")
            of_table = torch.autograd.grad(sums, table_of_sums, tokens)[0].to(table.dtype)
        if sums is None or ctx.is_sum:
            return Products.apply(gradient, rows, table, not ctx.is_sum), None, of_table, None
        return sums.detach(), None, of_table, None


def run_experts(
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    up: nn.Module | None,
    gate: nn.Module | None,
    down: nn.Module,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    [`run_experts_eager`] without holding the gathered rows, `[T, A, d]`, if tables are plain and nothing is compiled.
    Differentiable once, in reverse mode.
    """
    tables = [plain_weight(table) for table in (up, gate, down) if table is not None]
    # In evaluation a compiler fuses the reference; in training it keeps the rows, [T, A, d].
    if torch.compiler.is_compiling() or any(table is None for table in tables):
        return run_experts_eager(hidden_states, rows, weights, up, gate, down, act_fn)
    *inputs, values = tables
    factors = weights
    if inputs:
        products = [Products.apply(hidden_states, rows, table, False) for table in inputs]
        factors = factors * (act_fn(products[0]) if gate is None else act_fn(products[1]) * products[0])
    return Products.apply(factors, rows, values, True).to(weights.dtype)


class RetrievalInterface(GeneralInterface):
    """Mapping from names in `PeerConfig.expert_kernels` to functions that retrieve. See the module's docstring."""

    _global_mapping = {"eager": retrieve, "torch": retrieve}


class ExpertsInterface(GeneralInterface):
    """Mapping from names in `PeerConfig.expert_kernels` to functions that run experts. See the module's docstring."""

    _global_mapping = {"eager": run_experts_eager, "torch": run_experts}


ALL_RETRIEVAL_FUNCTIONS = RetrievalInterface()
ALL_EXPERTS_FUNCTIONS = ExpertsInterface()


def find_function(registry: GeneralInterface, name: str, device_type: str) -> Callable:
    """
    Find the function registered under a name. For an unregistered name this is `"eager"` while `torch.export` traces
    a model, as that uses only torch's own operations. Otherwise it is that of the device type, or `"torch"`.
    """
    if name in registry:
        return registry[name]
    # Checkpoints that were saved with the package may name its kernels.
    if not (name in ("auto", "cpu", "triton") or name in ALL_EXPERTS_FUNCTIONS or name in ALL_RETRIEVAL_FUNCTIONS):
        logger.warning_once(f"`expert_kernels` is {name!r}, which is not registered: it counts as 'auto'.")
    if is_exporting():
        return registry["eager"]
    name = f"auto:{device_type}"
    return registry[name if name in registry else "torch"]


# Evaluated outside of the graph: code that `torch.compile` traces in torch 2.9 is told that it is exported.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` traces the caller."""
    return torch.compiler.is_exporting()


def plain_weight(table: nn.Module) -> torch.Tensor | None:
    """The weight of a plain table. `None` if an adapter, a hook or a quantizer has changed the table's forward."""
    if type(table) is not nn.Embedding or "forward" in vars(table):
        return None
    if table._forward_hooks or table._forward_pre_hooks or table._backward_hooks or table._backward_pre_hooks:
        return None
    weight = table._parameters.get("weight")
    return weight if type(weight) in (nn.Parameter, torch.Tensor) else None


def expert_tables(model: nn.Module) -> dict[str, nn.Module]:
    """All tables of experts in a model by name: `nn.Embedding`, or what an adapter or a quantizer put in its place."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(module, name)
        for prefix, module in model.named_modules()
        for name in getattr(type(module), "expert_table_names", ())
        if getattr(module, name) is not None
    }


def make_table(num_experts: int, width: int, std: float) -> nn.Embedding:
    """A table with a row for each expert, left unfilled: the model initializes it with standard deviation `std`."""
    table: nn.Embedding = nn.Embedding(num_experts, width, _weight=torch.empty(num_experts, width))
    table.init_std = std
    return table


class ExpertPool(nn.Module):
    """
    N experts of one neuron each: `e_i(x) = σ(u_i · x) v_i`. With `config.gated_experts` there is a gate vector w_i, a
    row of `gate_proj`, and `e_i(x) = σ(w_i · x) (u_i · x) v_i`.

    Each layer has its own pool, or the base model has one for all PEER layers. Every generation that was added in
    protected mode is a pool of its own in `added`, whose v_i are zero at first: adding experts changes no output.

    Args:
        config (`PeerConfig`): Its `expert_kernels` may be changed on a model's configuration at any time.
        generations (`list[Generation]`): The generation of this pool, followed by those of `added`.
    """

    expert_table_names = ("up_proj", "gate_proj", "down_proj")

    def __init__(self, config: PeerConfig, generations: list[Generation]):
        super().__init__()
        generation, *added = generations
        self.config, self.first_expert = config, generation.first_expert
        self.act_fn = nn.Identity() if config.expert_act is None else ACT2FN[config.expert_act]
        sizes = generation.num_experts, config.hidden_size
        self.gate_proj = make_table(*sizes, config.initializer_range) if config.gated_experts else None
        self.up_proj = make_table(*sizes, config.initializer_range)
        power = router_weight_power(config) * activation_power(self.act_fn, config, config.gated_experts)
        std = config.expert_initializer_range or matched_std(config, power)
        self.down_proj = make_table(*sizes, 0.0 if self.first_expert else std)
        self.added = nn.ModuleList([ExpertPool(config, [each]) for each in added])

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
            indices (`torch.Tensor` of shape `(num_tokens, num_active)`):
                Indices of the experts of each token, all of them in this pool and not in `added`.
            weights (`torch.Tensor` of shape `(num_tokens, num_active)`): Their router weights g_i(x).

        Returns:
            `torch.Tensor` of shape `(num_tokens, hidden_size)`: `Σ g_i(x) e_i(x)`.
        """
        rows = indices - self.first_expert if self.first_expert else indices
        run = find_function(ALL_EXPERTS_FUNCTIONS, self.config.expert_kernels, hidden_states.device.type)
        # Sums over experts keep the dtype of their inputs, as those over heads do.
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            return run(hidden_states, rows, weights, self.up_proj, self.gate_proj, self.down_proj, self.act_fn)


def matched_std(config: PeerConfig, power: float) -> float:
    """
    Standard deviation of initial down-projection vectors for which the output has the variance of a dense
    feed-forward's. `power` is the expected sum of the squared factors of a token's active vectors. Inputs come from an
    RMSNorm: pre-activations have a standard deviation of `initializer_range` √d in every variant.
    """
    dense_power = config.intermediate_size * activation_power(ACT2FN[config.hidden_act], config, gated=True)
    return config.initializer_range * math.sqrt(dense_power / power)


def activation_power(act_fn: Callable, config: PeerConfig, gated: bool) -> float:
    """Mean square of a neuron's activation at initialization, times the mean square of `u · x` if it is `gated`."""
    std = config.initializer_range * config.hidden_size**0.5
    inputs = torch.linspace(-8, 8, 2001, device="cpu", dtype=torch.float64)
    density = torch.exp(-(inputs**2) / 2)
    power = (act_fn(inputs * std) ** 2 * density).sum() / density.sum()
    return float(power) * (std**2 if gated else 1.0)


def router_weight_power(config: PeerConfig) -> float:
    """Expected sum of the squared router weights of a token at initialization, over all heads and experts."""
    h, k = config.num_retrieval_heads, config.num_experts_per_head
    if config.scoring_func == "softmax":
        return h / k
    # The two sub-keys of a retrieved expert rank near the middle of the best √k of √N, with scores of unit variance.
    score = math.sqrt(2) * NormalDist().inv_cdf(1 - (k**0.5 + 1) / 2 / (config.num_experts**0.5 + 1))
    # At least the root mean square of a rectified score without selection, for pools of a few experts.
    score_std = 1.0 if config.query_norm is not None else config.initializer_range * config.hidden_size**0.5
    score = max(score, math.sqrt(0.5)) * score_std
    weight = score if config.scoring_func == "relu" else 1 / (1 + math.exp(-score))
    return h * k * weight**2
