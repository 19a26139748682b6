# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Transformers' own model tests, from the source release of the installed Transformers.

They are not in its wheel. The release's sdist carries `tests/test_*.py` but neither the helpers of generation and
export nor the testers of single models, so those two mixins stand empty here and what they would test is tested in
`test_generation.py`.
"""

import importlib
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import transformers
from filelock import FileLock


CACHE = Path(__file__).parent.parent / ".cache"


def _fetch_tests() -> Path:
    """Folder of the release's tests, downloaded once with pip (10 MB) into the checkout's cache."""
    name = f"transformers-{transformers.__version__}"
    folder = CACHE / name / "tests"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):  # of the workers of a test run, one
        if not (folder / "__init__.py").exists():
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"),
                    *("--no-binary", "transformers", "--dest", str(CACHE)),
                    f"transformers=={transformers.__version__}",
                ],
                check=True,
            )
            with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
                members = [m for m in archive.getmembers() if m.name.startswith(f"{name}/tests/")]
                archive.extractall(CACHE, members=members, filter="data")
            # `test_configuration_common` executes it. Made last, it says that all is there.
            (folder / "__init__.py").touch()
    return folder


def load(name: str) -> types.ModuleType:
    """Module `name` of Transformers' tests, such as `test_modeling_common`."""
    package = "transformers_tests"
    if package not in sys.modules:
        _add_module(package, __path__=[str(_fetch_tests())])
        for folder, module, mixin in (
            ("exporters", "test_export", "ExportTesterMixin"),
            ("generation", "test_utils", "GenerationTesterMixin"),
        ):
            _add_module(f"{package}.{folder}", __path__=[])
            _add_module(f"{package}.{folder}.{module}", **{mixin: type(mixin, (), {})})
        _add_module(f"{package}.utils", __path__=[])
        _add_module(f"{package}.utils.test_configuration_utils", config_common_kwargs={})
    return importlib.import_module(f"{package}.{name}")


def _add_module(name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
