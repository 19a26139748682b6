# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of the optimizer, of whole layers and of whole models, of waiting and of graphs."""

import functools
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import StaticCache

from gpu.device import WARM_UP, Device
from gpu.inputs import DTYPES
from gpu.rows import Row, SkippedError
from gpu.settings import Settings
from modeling_peer import PeerConfig, PeerForCausalLM, RowAdamW, expert_parameter_groups, host_table_device_map
from modeling_peer.experts import expert_tables
from modeling_peer.feed_forward import PeerFeedForward
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.optim import row_adamw


# Steps of optimizers and models that are compared.
STEPS = 4

# Largest relative difference of norms: of layers in float32, and of those in 16 bits with the same routing.
CLOSE, CLOSE_IN_16_BITS = 1e-4, 3e-2

# Relative difference of the losses of a model from those in float64: in float32, and under autocast.
CLOSE_LOSS, CLOSE_LOSS_IN_16_BITS = 1e-3, 5e-2

# What of the elements of a table in 16 bits may be rounded to the other neighbor, because of other sums in float32.
ROUNDED_OTHERWISE = 0.01

VOCABULARY, SEQUENCE = 256, 16

# What a forward calls the KV cache.
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"


def layer_rows(settings: Settings, device: Device) -> dict[str, Row]:
    """The checks by name."""
    checks: dict[str, Row] = {}
    for name, dtype in DTYPES.items():
        for moment in ("full", "row"):
            checks[f"RowAdamW, {name}, {moment}"] = functools.partial(check_optimizer, settings, dtype, moment)
        checks[f"layer, {name}"] = functools.partial(check_layer, settings, dtype)
    checks["model, float32"] = functools.partial(check_model, settings, None)
    checks["model, autocast bfloat16"] = functools.partial(check_model, settings, torch.bfloat16)
    checks["GradScaler, autocast float16"] = functools.partial(check_scaler, settings)
    for name in ("float32", "bfloat16"):
        checks[f"layer does not wait, {name}"] = functools.partial(check_waiting, settings, device, DTYPES[name])
    checks["model does not wait"] = functools.partial(check_model_waiting, settings, device)
    checks["graph of forward and backward"] = functools.partial(check_graph, settings, device, False)
    checks["graph of a training step"] = functools.partial(check_graph, settings, device, True)
    checks["graph of decoding"] = functools.partial(check_decode_graph, settings, device)
    checks["tables in host memory"] = functools.partial(check_host_tables, settings)
    return checks


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of a difference over that of what is expected; infinite where a result is not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).nan_to_num(float("inf")).item()


def layer_config(settings: Settings, **fields: Any) -> PeerConfig:
    """The configuration of a small layer or model."""
    sizes = {"num_attention_heads": 2, "intermediate_size": 2 * settings.small_layer["hidden_size"]}
    sizes |= {"num_hidden_layers": 1, "query_norm": None, "expert_kernels": settings.kernels}
    return PeerConfig(**{**sizes, **settings.small_layer, **fields})


def optimizer_of(module: nn.Module, lr: float = 1e-3) -> RowAdamW:
    """The optimizer of a layer or model."""
    return RowAdamW(expert_parameter_groups(module, lr, weight_decay=0.01), rounding_seed=1)


def check_optimizer(settings: Settings, dtype: torch.dtype, second_moment: str) -> dict[str, Any]:
    """
    Steps on a table from factors against those in torch operations on a CPU, stochastic rounding included. Each step of a
    table in 16 bits begins with the same rows: they may be rounded to the other neighbor once, at the size that they have.
    """
    num_rows, width = settings.small_layer["num_experts"], settings.small_layer["hidden_size"] + 1
    start = torch.randn(num_rows, width).to(dtype)
    tables = [nn.Parameter(start.clone().to(place)) for place in (settings.device, "cpu")]
    options = {"lr": 1e-2, "second_moment": second_moment, "rounding_seed": 1}
    optimizers = [RowAdamW([{"params": [table], "rows": True}], **options) for table in tables]
    steps = []
    for _ in range(STEPS):
        before = tables[1].detach().double()
        if dtype != torch.float32:
            tables[0].data.copy_(before)
        coefficients = torch.randn(settings.small_tokens, 8)
        tokens = torch.randn(settings.small_tokens, width).to(dtype)
        indices = torch.randint(num_rows, coefficients.shape).masked_fill_(torch.rand(coefficients.shape) < 0.2, 3)
        for table, kernels in zip(tables, (settings.kernels, "torch"), strict=True):
            assignments = Assignments(indices.to(table.device), num_rows, kernels)
            factors = Factors(coefficients.to(table.device), tokens.to(table.device), assignments)
            table.grad = FactoredGradient(table, [factors])
        optimizers[0].step()
        with mock.patch.object(row_adamw.cpu, "can_update", return_value=False):
            optimizers[1].step()
        actual, expected = (table.detach().cpu().double() for table in tables)
        steps.append(_rounded_otherwise(actual, expected, before, torch.finfo(dtype)))
    moments = [optimizer.state[table] for optimizer, table in zip(optimizers, tables, strict=True)]
    found = {name: relative_error(moments[0][name], moments[1][name]) for name in ("exp_avg", "exp_avg_sq")}
    found["moved"] = relative_error(actual - start, expected - start)
    passed = max(found["exp_avg"], found["exp_avg_sq"]) < CLOSE
    if dtype == torch.float32:
        return {**found, "passed": passed and found["moved"] < CLOSE}
    found |= dict(zip(("differing", "largest"), map(max, zip(*steps, strict=True)), strict=True))
    return {**found, "passed": passed and found["differing"] < ROUNDED_OTHERWISE and found["largest"] <= 1}


def _rounded_otherwise(actual, expected, before, precision):
    """
    The share of elements that differ, and the largest difference in distances between neighbors. Near zero these are less
    than what a step may differ by in float32, which is added.
    """
    neighbors = precision.eps * torch.maximum(actual.abs(), expected.abs()).clamp_min(precision.tiny)
    difference = (actual - expected).abs()
    share = (difference > 0).double().mean().item()
    return share, (difference / (neighbors + CLOSE * (expected - before).abs())).max().item()


def _layers(settings, dtype):
    """A layer, and the literal Algorithm 1 with its weights: in float64 on a CPU, or where it rounds as the layer."""
    layer = PeerFeedForward(layer_config(settings), 0).to(settings.device, dtype)
    for parameter in layer.parameters():
        parameter.data.copy_(0.3 * torch.randn_like(parameter))
    place = ("cpu", torch.float64) if dtype == torch.float32 else (settings.device, dtype)
    literal = PeerFeedForward(layer_config(settings, expert_kernels="eager"), 0).to(*place)
    literal.load_state_dict(layer.state_dict())
    return layer, literal


def _whole(gradient):
    return gradient.to_rows() if isinstance(gradient, FactoredGradient) else gradient


def check_layer(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Output, gradients and a step of a layer against the literal Algorithm 1."""
    layer, literal = _layers(settings, dtype)
    optimizers = [optimizer_of(each) for each in (layer, literal)]
    hidden, gradient = (
        torch.randn(2, settings.small_tokens // 2, settings.small_layer["hidden_size"]).to(dtype) for _ in range(2)
    )
    results = []
    for module in (layer, literal):
        weight = module.router.query_proj.weight
        tokens = hidden.to(weight.device, weight.dtype).clone().requires_grad_()
        output = module(tokens)
        output.backward(gradient.to(weight.device, weight.dtype))
        gradients = {name: _whole(parameter.grad) for name, parameter in module.named_parameters()}
        results.append({"output": output, "gradient of tokens": tokens.grad} | gradients)
    errors = {name: relative_error(results[0][name], results[1][name]) for name in results[0]}
    where = max(errors, key=errors.get)
    for optimizer in optimizers:
        optimizer.step()
    moved = all(bool(parameter.isfinite().all()) for parameter in layer.parameters())
    limit = CLOSE if dtype == torch.float32 else CLOSE_IN_16_BITS
    return {"passed": moved and errors[where] < limit, "worst": errors[where] / limit, "where": where}


def _model(settings, **fields):
    options = {"num_hidden_layers": 2, "feed_forward_types": ["dense", "peer"], "query_norm": "batch"}
    return PeerForCausalLM(layer_config(settings, vocab_size=VOCABULARY, **options, **fields))


def _batch(device):
    return torch.randint(VOCABULARY, (4, SEQUENCE), device=device)


def train(
    model: nn.Module, tokens: torch.Tensor, autocast: torch.dtype | None = None, steps: int = STEPS
) -> list[float]:
    """Trains on a batch, and returns the losses."""
    optimizer, losses = optimizer_of(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(tokens.device.type, autocast, enabled=autocast is not None):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_model(settings: Settings, autocast: torch.dtype | None) -> dict[str, Any]:
    """Losses of some training steps against those of the literal Algorithm 1 in float64 on a CPU."""
    model, literal = _model(settings), _model(settings, expert_kernels="eager").double()
    literal.load_state_dict(model.state_dict())
    tokens = _batch("cpu")
    actual = train(model.to(settings.device), tokens.to(settings.device), autocast)
    expected = train(literal, tokens)
    error = max(abs(a - b) / b for a, b in zip(actual, expected, strict=True))
    limit = CLOSE_LOSS if autocast is None else CLOSE_LOSS_IN_16_BITS
    return {"passed": error < limit, "worst": error / limit, "losses": actual}


def check_scaler(settings: Settings) -> dict[str, Any]:
    """Training under a gradient scaler, which must pass over a step whose gradients are infinite, and no other."""
    model, tokens = _model(settings).to(settings.device), _batch(settings.device)
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler(tokens.device.type, init_scale=2.0**10)
    (table,) = (value for name, value in model.named_parameters() if name.endswith("1.mlp.expert_pool.up_proj.weight"))
    losses, moved, scales = [], [], []
    for factor in (1.0, 1.0, float("inf"), 1.0):
        before = table.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(tokens.device.type, torch.float16):
            loss = model(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        moved.append(not before.equal(table))
        scales.append(scaler.get_scale())
    expected = ([True, True, False, True], [2.0**10, 2.0**10, 2.0**9, 2.0**9])
    passed = (moved, scales) == expected and losses[-1] < losses[0]
    return {"passed": passed, "losses": losses, "moved": moved, "scales": scales}


def _training_step(
    module: nn.Module, call: Callable[[], torch.Tensor], optimizer: RowAdamW | None
) -> Callable[[], None]:
    def step():
        module.zero_grad()
        call().backward()
        if optimizer is not None:
            optimizer.step()

    return step


def _layer_step(settings, dtype):
    layer, _ = _layers(settings, dtype)
    hidden = torch.randn(1, settings.small_tokens, settings.small_layer["hidden_size"]).to(settings.device, dtype)
    tokens = hidden.requires_grad_()
    return _training_step(layer, lambda: layer(tokens).float().square().mean(), optimizer_of(layer))


def _check_without_waiting(device, step):
    for _ in range(WARM_UP):
        step()
    with device.no_waiting():
        step()
    return {"passed": True, "measured": device.is_gpu}


def check_waiting(settings: Settings, device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """Forward, backward and step of a layer, in which the host must not wait."""
    return _check_without_waiting(device, _layer_step(settings, dtype))


def check_model_waiting(settings: Settings, device: Device) -> dict[str, Any]:
    """Forward, backward and step of a model, in which the host must not wait."""
    model, tokens = _model(settings).to(settings.device), _batch(settings.device)
    call = functools.partial(_loss, model, tokens)
    return _check_without_waiting(device, _training_step(model, call, optimizer_of(model)))


def _loss(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def check_graph(settings: Settings, device: Device, with_step: bool) -> dict[str, Any]:
    """A captured part of training against the same part of a twin without a graph, all parameters or gradients."""
    model, twin = (_model(settings).to(settings.device) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    tokens, optimizers = _batch(settings.device), [optimizer_of(each) for each in (model, twin)]
    steps = [
        _training_step(module, functools.partial(_loss, module, tokens), optimizer if with_step else None)
        for module, optimizer in zip((model, twin), optimizers, strict=True)
    ]
    replay = device.captured(steps[0])
    for _ in range(2):
        replay()
    for _ in range(WARM_UP + 2):
        steps[1]()
    device.synchronize()
    values = [
        {name: each if with_step else _whole(each.grad) for name, each in module.named_parameters()}
        for module in (model, twin)
    ]
    errors = {name: relative_error(value, values[1][name]) for name, value in values[0].items()}
    where = max(errors, key=errors.get)
    return {"passed": errors[where] < CLOSE, "worst": errors[where] / CLOSE, "where": where}


def decoding(
    model: nn.Module, config: PeerConfig, device: str, length: int
) -> tuple[torch.Tensor, Callable[[], None]]:
    """
    Greedy decoding of a model after a prompt, with a static cache.

    Returns:
        `tuple`: the next token, `(1, 1)`, which the function, one step of decoding, replaces.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    generator = torch.Generator(device).manual_seed(1)
    token = torch.randint(config.vocab_size, (1, 1), generator=generator, device=device)

    @torch.no_grad()
    def step():
        token.copy_(model(token, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1))

    return token, step


def check_decode_graph(settings: Settings, device: Device) -> dict[str, Any]:
    """Tokens of captured decoding against those without a graph."""
    model = _model(settings).to(settings.device).eval()
    found = []
    for capture in (False, True):
        token, step = decoding(model, model.config, settings.device, 16 + WARM_UP)
        if capture:
            step = device.captured(step)
        else:
            for _ in range(WARM_UP):
                step()
        tokens = []
        for _ in range(8):
            step()
            tokens.append(token.item())
        found.append(tokens)
    return {"passed": found[0] == found[1], "tokens": found}


def check_host_tables(settings: Settings) -> dict[str, Any]:
    """Logits of a model whose tables a device map leaves in host memory against those of the model on the CPU."""
    if find_spec("accelerate") is None:
        raise SkippedError("accelerate is not installed.")
    config = layer_config(settings, vocab_size=VOCABULARY, expert_kernels="auto")
    model = PeerForCausalLM(config).eval()
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        device_map = host_table_device_map(PeerForCausalLM, config, settings.device)
        split = PeerForCausalLM.from_pretrained(folder, device_map=device_map)
        places = {each.weight.device.type for each in expert_tables(split).values()}
        error = relative_error(split(tokens.to(settings.device)).logits, model(tokens).logits)
    return {"passed": error <= CLOSE and places == {"cpu"}, "worst": error, "places": sorted(places)}
