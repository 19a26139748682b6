# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The machine and the releases of libraries that a measurement was made with."""

import ctypes
import gc
import os
import platform
import threading
from pathlib import Path
from typing import Any

import torch
import transformers


def machine() -> dict[str, Any]:
    """Processor, cores, threads and releases of libraries, for the results of a study."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class OwnMemory:
    """
    Context manager that measures the anonymous memory (not mapped from files) of this Linux process, in bytes: `start`
    at the beginning of the block, and `peak`, the highest of the samples that it takes every `seconds`.
    """

    def __init__(self, seconds: float = 0.005):
        self.seconds = seconds

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.start = self.peak = self._own()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()

    def _sample(self):
        while not self.done.wait(self.seconds):
            self.peak = max(self.peak, self._own())
        self.peak = max(self.peak, self._own())

    def _own(self):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def processor_name() -> str:
    """The name of the processor, or its architecture where the system does not give a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
