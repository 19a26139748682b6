# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Kernels for experts and their retrieval, and factored gradients of tables. Importing this package registers the kernels
with the core, under their names and as the fastest ones for their types of device.
"""

from functools import partial

from ..experts import ExpertsInterface, RetrievalInterface
from .experts import run_experts_on_kernels
from .retrieval import retrieve_on_kernels


for _name, _kernels in (("cpu", "cpu"), ("triton", "triton"), ("auto:cpu", None), ("auto:cuda", None)):
    ExpertsInterface.register(_name, partial(run_experts_on_kernels, kernels=_kernels))
    RetrievalInterface.register(_name, partial(retrieve_on_kernels, kernels=_kernels))
