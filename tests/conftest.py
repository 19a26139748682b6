# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the test run, made before torch is imported."""

import gc
import logging
import os
from pathlib import Path

import pytest


# Tests start processes of their own; several OpenMP pools on the same cores slow small tests a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


ROOT_LOGGER = logging.getLogger()
ROOT_LEVEL = ROOT_LOGGER.level

# Files that take longest. They begin first, or one of them would be the last of all, beside an idle worker. Those whose
# processes wait for each other alternate with others: two at a time would come near to the time limit of a launch.
FIRST = [
    "distributed/test_memory_group.py",
    "kernels/test_triton_interpreter.py",
    "distributed/test_distributed.py",
    "model/test_compiled_training.py",
    "distributed/test_saves.py",
    "model/test_library_suite.py",
    "distributed/test_launch_files.py",
    "studies/scaling/test_scaling_study.py",
    "examples/test_examples.py",
    "studies/stream/test_stream.py",
]


def pytest_configure(config):
    if missing := [file for file in FIRST if not (Path(__file__).parent / file).is_file()]:
        raise pytest.UsageError(f"FIRST in {__file__} names files that there are not: {missing}.")
    if config.pluginmanager.has_plugin("xdist"):
        config.option.loadscopereorder = False  # by the number of tests in a file, which says little


def pytest_collection_modifyitems(items):
    places = {f"tests/{file}": place for place, file in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(FIRST)))


def pytest_collection_finish():
    """`Trainer` collects garbage each time, which takes long where all that was imported is looked through."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def _show_all_logs():
    """Undoes what a script, or a library that configures logs, has quieted in the process of the tests."""
    logging.disable(logging.NOTSET)
    ROOT_LOGGER.setLevel(ROOT_LEVEL)
    for name, logger in ROOT_LOGGER.manager.loggerDict.items():
        if name.startswith("modeling_peer") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def library_logging():
    """Transformers' logging as the test found it: example scripts run in the process of the tests, and quiet it."""
    from transformers.utils import logging as library_logs

    verbosity, progress_bar = library_logs.get_verbosity(), library_logs.is_progress_bar_enabled()
    _show_all_logs()
    yield
    library_logs.set_verbosity(verbosity)
    (library_logs.enable_progress_bar if progress_bar else library_logs.disable_progress_bar)()


@pytest.fixture(scope="module", autouse=True)
def registered_variants():
    """What a file of tests registers, by itself or through a study that it calls, the next does not find."""
    from modeling_peer import ExpertsInterface, FeedForwardInterface, RetrievalInterface

    mappings = [each._global_mapping for each in (ExpertsInterface, FeedForwardInterface, RetrievalInterface)]
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, entries in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(entries)
