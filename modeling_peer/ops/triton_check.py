# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Comparison of Triton kernels with torch operations on the GPU at hand, before they are chosen by default there."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import constants
from torch.utils._python_dispatch import _disable_current_modes
from transformers.utils import logging

from ..experts import retrieve
from .kernels_torch import TorchKernels
from .kernels_triton import TritonKernels
from .quantized_rows import SCALE_DTYPE, quantize
from .triton_launch import triton


logger = logging.get_logger(__name__)

_FAULTS: dict[tuple[Callable, torch.device, torch.dtype], str | None] = {}


def results_of_experts(kernels: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Results by name of the kernels `"torch"` or `"triton"`, from inputs that are the same for all."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    tokens, weights, table = (random(*shape).to(dtype) for shape in ((8, 96), (8, 40), (16, 96)))
    queries, sub_keys, gradient = random(4, 2, 2, 96), random(2, 2, 20, 96), random(4, 2, 4)
    rows = (torch.arange(320, device=device) % 16).view(8, 40)
    rows[1:] = 0  # more assignments than a chunk has
    run = TritonKernels if kernels == "triton" else TorchKernels
    named, starts, order = run.group(rows.flatten(), 16)
    factors = weights.flatten()[order.long()].float(), order // 40, starts, tokens
    of_table = torch.zeros_like(table)
    run.row_gradient(*factors, of_table, named)
    found = {"row_gradient": of_table, "squared_norm": run.squared_norm(*factors)}
    for bits in (None, 8, 4) if dtype == SCALE_DTYPE else (None,):
        each = quantize(table, bits, 32) if bits else table
        found |= {f"up{bits or ''}": run.up(tokens, rows, each), f"down{bits or ''}": run.down(weights, rows, each)}
    if run is TritonKernels:
        indices, scores = run.retrieve(queries, sub_keys, 4)
        of_queries, of_sub_keys = run.retrieval_gradients(gradient, indices, queries, sub_keys)
    else:
        with torch.enable_grad():
            indices, scores = retrieve(queries.requires_grad_(), sub_keys.requires_grad_(), 4)
            of_queries, of_sub_keys = torch.autograd.grad(scores, (queries, sub_keys), gradient)
    return found | {"indices": indices, "scores": scores, "of_queries": of_queries, "of_sub_keys": of_sub_keys}


def is_triton_right(tensor: torch.Tensor, results: Callable = results_of_experts) -> bool:
    """
    Whether Triton kernels have the results of torch operations, on the device of a tensor and in its dtype. They are
    compared once for each kind of GPU and release. `$HF_HOME/modeling_peer` keeps the verdict, and a warning says if
    they differ. Kernels that cannot be compared now are not right: while a CUDA graph is captured, or without a GPU.
    """
    key = results, tensor.device, tensor.dtype
    if key not in _FAULTS:
        if not torch.cuda.device_count() or torch.cuda.is_current_stream_capturing():
            return False
        _FAULTS[key] = _find_fault(*key)
    return _FAULTS[key] is None


def _find_fault(results, device, dtype):
    gpu = torch.cuda.get_device_name(device)
    sources = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parents[1].rglob("*triton*.py"))]
    key = "\0".join([results.__name__, gpu, str(dtype), torch.__version__, triton.__version__, *sources])
    file = Path(constants.HF_HOME, "modeling_peer", f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json")
    try:
        fault = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fault = _compare(results, device, dtype)
        with contextlib.suppress(OSError):  # without a folder that can be written, every process compares
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(fault), encoding="utf-8")
            part.replace(file)
    if fault is not None:
        logger.warning(
            f"PEER runs on PyTorch operations on {gpu} in {dtype}, slower than with Triton kernels, because these are "
            f"wrong there: {fault}. `./run gpu` shows more. Delete {file} to compare them again."
        )
    return fault


def _compare(results, device, dtype):
    """Return what is wrong, or `None`. It may be called while a model is traced, or in inference mode."""
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            expected, found = results("torch", torch.device("cpu"), dtype), results("triton", device, dtype)
            for name, right in expected.items():
                right, distance = right.double(), (found[name].cpu().double() - right.double()).abs()
                if not (distance <= 1e-3 + max(1e-4, torch.finfo(dtype).eps) * right.abs()).all():
                    return f"`{name}` differs by up to {distance.max():.2g}"
    except Exception as error:  # compilers and drivers raise what they like
        return repr(error)
    return None
