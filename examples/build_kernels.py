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
"""
Compiles the kernels of this release into a folder in the format of Hugging Face's `kernels`, for machines without a
compiler.

    python examples/build_kernels.py --output_dir runs/peer-kernels

The folder gets a build for the operating system and processor at hand, with libraries for each set of instructions that
torch distinguishes; a build in Triton for GPUs; and a card.
"""

import ast
import contextlib
import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from kernel_package.native_library import library_name

from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from modeling_peer import (
    __version__,
    expert_kernels_cpu,
    factored_gradient_cpu,
    product_key_retrieval_cpu,
    quantized_kernels_cpu,
)
from modeling_peer.library_releases import SUPPORTED_RELEASES
from modeling_peer.native_library import PORTABLE_FLAGS, compile_library, compiler_command
from modeling_peer.optim import row_adamw_cpu


SOURCES = [
    module.SOURCE
    for module in (
        expert_kernels_cpu,
        factored_gradient_cpu,
        product_key_retrieval_cpu,
        quantized_kernels_cpu,
        row_adamw_cpu,
    )
]

# What torch.backends.cpu.get_cpu_capability() answers, and what torch compiles its own kernels of that name with.
CAPABILITIES = {
    "x86_64": {
        "DEFAULT": ["-march=x86-64"],
        "AVX2": ["-march=x86-64", "-mavx2", "-mfma", "-mf16c"],
        "AVX512": ["-march=x86-64", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    }
}

PACKAGE = Path(expert_kernels_cpu.__file__).parent
PARTS = Path(__file__).parent / "kernel_package"
NAME, VERSION = "peer", 0  # by convention of `kernels`, an interface that may still change has version 0


@dataclass
class BuildArguments:
    """Where the package goes."""

    output_dir: str = field(metadata={"help": "Folder of the package, made if there is none."})


@ends_on_usage_error()
def main() -> None:
    (arguments,) = parse_arguments((BuildArguments,), __doc__)
    folder = Path(arguments.output_dir)
    build_cpu_variant(folder)
    build_triton_variant(folder)
    write_card(folder)
    print(f"The kernels are in {folder}. To run models on them, set MODELING_PEER_KERNELS={folder.resolve()}.")


def write_card(folder: Path) -> None:
    """Write what the package is and how to use it, for people."""
    variants = ", ".join(f"`{path.name}`" for path in sorted((folder / "build").iterdir()))
    card = (PARTS / "README.md").read_text(encoding="utf-8")
    card = card.format(release=__version__, variants=variants, torch=SUPPORTED_RELEASES["torch"][0])
    (folder / "README.md").write_text(card, encoding="utf-8")


def build_cpu_variant(folder: Path) -> None:
    """Write the build in C for this machine. It is for every release of torch, of which it takes no header."""
    system, machine = platform.system().lower(), platform.machine()
    if system != "linux" or machine not in CAPABILITIES:
        raise UsageError(f"Kernels are built on Linux on {', '.join(CAPABILITIES)}, this is {system} on {machine}.")
    lowest_torch = SUPPORTED_RELEASES["torch"][0].replace(".", "")
    with _replacing(folder / "build" / f"torch-stable-abi{lowest_torch}-cpu-{machine}-{system}") as variant:
        for capability, flags in CAPABILITIES[machine].items():
            libraries = variant / "libraries" / capability
            libraries.mkdir(parents=True)
            for source in SOURCES:
                _compile(source, flags, libraries / library_name(source))
        _write_code(variant, "cpu", "expert_kernels_cpu")


def build_triton_variant(folder: Path) -> None:
    """Write the build in Triton, which compiles it where it runs."""
    with _replacing(folder / "build" / "torch-cuda") as variant:
        _write_code(variant, "cuda", "expert_kernels_triton")


def _compile(source, flags, path):
    compiler = compiler_command()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as workplace:
            compile_library(compiler, [*PORTABLE_FLAGS, *flags], source, Path(workplace)).rename(path)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise UsageError(f"`{shlex.join(compiler)}` cannot compile the kernels: {reason}") from error


@contextlib.contextmanager
def _replacing(folder):
    """A new folder, which takes the place of another one once it is filled."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as workplace:
        new = Path(workplace, folder.name)
        new.mkdir()
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def _write_code(variant, backend, module):
    """Copy a module and all that it imports from its package, and write the metadata of the build."""
    shutil.copy(PARTS / f"{backend}.py", variant / "__init__.py")
    ahead, copied = [module], set()
    while ahead:
        name = ahead.pop()
        if name not in copied:
            copied.add(name)
            file = (PARTS if name == "native_library" else PACKAGE) / f"{name}.py"
            shutil.copy(file, variant)
            ahead += _imported_siblings(file)
    content = hashlib.sha256()
    for file in sorted(variant.rglob("*")):
        if file.is_file():
            content.update(file.read_bytes())
    metadata = {
        "id": f"_{NAME}_{backend}_{content.hexdigest()[:12]}",  # a module of this name is what `kernels` imports
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _imported_siblings(file):
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


if __name__ == "__main__":
    main()
