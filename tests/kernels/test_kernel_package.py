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
A package of kernels, built by `examples/build_kernels.py` and loaded by Hugging Face's `kernels` from its folder:
models train on it where there is no compiler, and no processor gets instructions that it does not have.
"""

import ast
import importlib
import platform
import re
import shutil
import sys

import build_kernels
import pytest
import torch
from kernel_cache import SOURCE
from kernels import get_local_kernel
from kernels_used import TRAINING
from literal_algorithm import literal_peer
from tiny_models import tiny_config

from modeling_peer import kernel_package
from modeling_peer.expert_kernels import resolve_kernels
from modeling_peer.expert_kernels_torch import EagerKernels
from modeling_peer.feed_forward_peer import PeerFeedForward
from modeling_peer.kernel_package import PACKAGE_VARIABLE
from modeling_peer.native_calls import PREAMBLE
from modeling_peer.native_library import COMPILE_VARIABLE, load_library


pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Packages are built on Linux on x86-64."
)

VECTOR_BYTES = PREAMBLE + "int vector_bytes(void) { return VECTOR_BYTES; }"


def build(folder, sources, capabilities=None):
    """As `examples/build_kernels.py` does, of these C sources and with these flags of the compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_kernels, "SOURCES", sources)
        if capabilities:
            patch.setitem(build_kernels.CAPABILITIES, "x86_64", capabilities)
        patch.setattr(sys, "argv", ["build_kernels.py", "--output_dir", str(folder)])
        build_kernels.main()
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The kernels of experts and their gradients, for any processor, compiled in less time than for use."""
    modules = ("expert_kernels_cpu", "factored_gradient_cpu", "product_key_retrieval_cpu")
    sources = [importlib.import_module(f"modeling_peer.{name}").SOURCE for name in modules]
    return build(tmp_path_factory.mktemp("package"), sources, {"DEFAULT": ["-march=x86-64", "-O1"]})


@pytest.fixture(scope="module")
def small_package(tmp_path_factory):
    """One function, compiled for each set of instructions."""
    return build(tmp_path_factory.mktemp("small"), [VECTOR_BYTES])


@pytest.fixture
def without_a_compiler(cache, monkeypatch):
    """Nothing compiled or loaded before, and no compiler; returns what names a package in the environment."""
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    kernel_package._load_package.cache_clear()
    yield lambda folder: monkeypatch.setenv(PACKAGE_VARIABLE, str(folder))
    kernel_package._load_package.cache_clear()


def test_a_layer_trains_as_algorithm_1_says(package, without_a_compiler, compilations, used_kernels, cache):
    without_a_compiler(package)
    config = tiny_config(num_experts=6**2, expert_kernels="cpu", query_norm="rms")
    torch.manual_seed(0)
    layer = PeerFeedForward(config, 0)
    literal = PeerFeedForward(config, 0).double()
    for parameter, same in zip(layer.parameters(), literal.parameters(), strict=True):
        torch.nn.init.normal_(parameter)
        same.data.copy_(parameter.data)
    hidden_states = torch.randn(2, 4, config.hidden_size)
    output, expected = layer(hidden_states), literal_peer(config, literal, hidden_states.double())
    assert torch.allclose(output.double(), expected, rtol=1e-4, atol=1e-3)
    direction = torch.randn(output.shape)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for (name, parameter), same in zip(layer.named_parameters(), literal.parameters(), strict=True):
        scale = same.grad.abs().max()
        assert (parameter.grad.to_dense() - same.grad).abs().max() < 1e-5 * scale, name
    assert used_kernels >= TRAINING
    assert not compilations and not cache.exists()


def test_the_package_has_what_any_module_compiles():
    files = [file for file in build_kernels.PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    names = [".".join(file.relative_to(build_kernels.PACKAGE.parent).with_suffix("").parts) for file in files]
    sources = {getattr(importlib.import_module(name), "SOURCE", None) for name in names} - {None}
    assert set(build_kernels.SOURCES) == sources


def test_its_card_says_how_to_call_it(package):
    (code,) = re.findall(r"```python\n(.*?)```", (package / "README.md").read_text(), re.DOTALL)
    assert "/path/to/this/folder" in code
    found = {}
    exec(code.replace("/path/to/this/folder", str(package)), found)
    assert found["experts"].__module__.startswith("_peer_cpu_")
    hidden, table = found["hidden_states"].double(), found["table"].double()
    products = EagerKernels.up(hidden, found["indices"], table)
    assert torch.allclose(found["dot_products"].double(), products, atol=1e-4)
    assert torch.allclose(
        found["sums"].double(), EagerKernels.down(products.relu(), found["indices"], table), atol=1e-3
    )


def test_its_python_imports_torch_alone(package):
    """As `kernels` asks for: it may be loaded where this package is not."""
    imported = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "triton"}


def test_its_libraries_need_no_new_system(package):
    """As `kernels` asks for, glibc 2.28 of 2018 is enough; OpenMP is torch's own."""
    libraries = [file.read_bytes() for file in package.rglob("*.so")]
    assert len(libraries) == 3
    versions = {tuple(map(int, found)) for each in libraries for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", each)}
    assert versions and max(versions) <= (2, 28)
    assert not any(b"omp.so" in each for each in libraries)


@pytest.mark.parametrize(
    ("capability", "vector_bytes"),
    [("AVX512", 64), ("AVX2", 32), ("DEFAULT", 16), ("NO AVX", 16), ("SVE256", 16), ("of the future", 16)],
)
def test_each_processor_gets_what_it_can_run(capability, vector_bytes, small_package, without_a_compiler, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    without_a_compiler(small_package)
    monkeypatch.setenv(COMPILE_VARIABLE, "0")  # nothing is compiled
    get_local_kernel(small_package, backend="cpu").load_library.cache_clear()
    assert load_library(VECTOR_BYTES).vector_bytes() == vector_bytes


def test_without_a_compiler_there_is_nothing_to_build(tmp_path, without_a_compiler, capsys):
    with pytest.raises(SystemExit, match="2"):
        build(tmp_path, [SOURCE])
    assert "`there-is-no-such-compiler` cannot compile the kernels: [Errno 2]" in capsys.readouterr().err


class TestRefused:
    """Where the user asks for a package, nothing else runs in its place."""

    def test_without_kernels(self, package, without_a_compiler, monkeypatch):
        monkeypatch.setitem(sys.modules, "kernels", None)
        assert load_library("nothing is asked for") is None
        without_a_compiler(package)
        with pytest.raises(ImportError, match=r"pip install 'modeling-peer\[kernels\]'"):
            load_library(SOURCE)

    def test_no_folder(self, tmp_path, without_a_compiler):
        without_a_compiler(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=f"{PACKAGE_VARIABLE} must name a folder of kernels, got '.*nowhere'"):
            resolve_kernels("auto", torch.empty(1, 1))

    def test_of_another_system(self, small_package, tmp_path, without_a_compiler):
        (variant,) = small_package.glob("build/*-cpu-*")
        (tmp_path / "build" / variant.name.replace("x86_64", "aarch64")).mkdir(parents=True)
        without_a_compiler(tmp_path)
        with pytest.raises(ValueError, match=r"no kernels for the CPU of this system(.|\n)*aarch64"):
            load_library(VECTOR_BYTES)

    def test_of_another_release(self, small_package, without_a_compiler):
        without_a_compiler(small_package)
        with pytest.raises(RuntimeError, match="from the C source of another release of modeling_peer"):
            resolve_kernels("auto", torch.empty(1, 1))

    def test_damaged(self, small_package, tmp_path, without_a_compiler):
        """What git clones without LFS."""
        folder = shutil.copytree(small_package, tmp_path / "package")
        for library in folder.rglob("*.so"):
            library.write_text("version https://git-lfs.github.com/spec/v1")
        (metadata,) = folder.glob("build/*-cpu-*/metadata.json")
        metadata.write_text(
            metadata.read_text().replace("_peer_cpu_", "_peer_cpu_damaged_")
        )  # or it is loaded already
        without_a_compiler(folder)
        with pytest.raises(RuntimeError, match=rf"cannot be loaded: {folder}\S*\.so: "):
            load_library(VECTOR_BYTES)
