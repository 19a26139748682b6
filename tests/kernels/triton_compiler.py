# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Machine code of kernels in Triton, for GPUs that need not be there."""

import functools
import inspect
import re
import subprocess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from modeling_peer.ops import triton_launch


class MachineCode(NamedTuple):
    ptx: str
    registers: int
    spilled_bytes: int

    @property
    def wide_loads(self):
        """The number of instructions that load 16 bytes, or two for one that loads 32."""
        found = re.findall(r"ld\.global\S*\.(v4\.b32|v2\.b64|v8\.b32|v4\.b64)", self.ptx)
        return sum(2 if kind in ("v8.b32", "v4.b64") else 1 for kind in found)


def recorded_launches(function):
    """What a function launches, not launched: `(kernel, arguments, options)`."""
    launches = []

    def record(kernel, grid, arguments, options):
        launches.append((kernel, arguments, options))

    with mock.patch.object(triton_launch, "start", record):
        function()
    return launches


def assembler(capability):
    """The assembler that Triton brings along for GPUs of a compute capability, such as 90."""
    from triton.backends.nvidia.compiler import get_ptxas

    # Triton 3.5 has one for all.
    return Path(get_ptxas(*[capability][: len(inspect.signature(get_ptxas).parameters)]).path)


@functools.cache
def missing_target(capability):
    """Why there is no machine code for a compute capability, or `None` if there is."""
    program = assembler(capability)
    known = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    return None if f"sm_{capability}" in known else f"The {program.name} of this Triton does not know sm_{capability}."


def compile_launch(launch, capability, folder):
    """A kernel as a launch of these arguments would have it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import mangle_type

    kernel, arguments, options = launch
    options = dict(options)
    backend_options = {name: options.pop(name) for name in ("num_warps",) if name in options}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialized = not parameter.do_not_specialize
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_integer and value == 1 and specialized):
            signature[name], constants[position,] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (is_integer and value % 16 == 0 and specialized):
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=backend_options)
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    ptx = compiled.asm["ptx"]
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    command = [assembler(capability), "-v", f"--gpu-name={target}", file, "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return MachineCode(ptx, registers, sum(map(int, re.findall(r"(\d+) bytes spill", report))))
