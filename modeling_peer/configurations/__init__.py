# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The configurations that come with the package, by name: what `peer-toy` and `dense-paper` stand for."""

from pathlib import Path


def _root() -> Path:
    """Inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configuration"
    return installed if installed.is_dir() else package.parent / "configuration"


def list_configurations() -> list[str]:
    """
    Names of the configurations, sorted: a feed-forward variant and a size, `"peer-toy"`.

    Of the sizes nano, toy, laptop and gpu, PEER is in every block, as in the recipe of examples/studies/recipe, and
    the dense twin has the same width and takes more FLOPs per token; `pkm-toy` takes those of `peer-toy`. Of the sizes
    tiny and paper, models of all variants take the same, to 2 %.
    """
    return sorted(file.parent.name for file in _root().glob("*/config.json"))


def configuration_path(name: str) -> str:
    """
    Folder of a configuration, as `AutoConfig.from_pretrained` takes it.

    Args:
        name (`str`): One of [`list_configurations`].

    Raises:
        `ValueError`: if there is no configuration of this name.
    """
    if name not in list_configurations():
        raise ValueError(f"There is no configuration {name!r}; known are {list_configurations()}.")
    return str(_root() / name)
