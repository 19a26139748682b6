# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A GPU, or a CPU in its place: times, peak memory, graphs, and work during which the host must not wait."""

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from common.machine import machine


# Times of an operation are taken for this long at most.
MOST_SECONDS = 5.0

# How often a function runs before it is timed or captured: kernels are compiled, memory is allocated.
WARM_UP = 3

# Bytes that are written to put everything else out of the cache.
FILLER = 2**28


class Device:
    """Where tensors are and how work there is timed. On a CPU a clock replaces events, and graphs are plain calls."""

    def __init__(self, name: str):
        self.name = name
        self.is_gpu = torch.device(name).type == "cuda"

    def facts(self) -> dict[str, Any]:
        """The device and the releases of libraries, which results depend on: those of a GPU not on its host."""
        facts = machine()
        if not self.is_gpu:
            return facts
        gpu = {"gpu": torch.cuda.get_device_properties(self.name).name, "cuda": torch.version.cuda}
        return {**gpu, "torch": facts["torch"], "transformers": facts["transformers"]}

    def synchronize(self) -> None:
        """Wait for the device. Raises the error of a kernel that failed."""
        if self.is_gpu:
            torch.cuda.synchronize(self.name)

    def seconds(self, function: Callable[[], Any], repetitions: int, cold: bool = False) -> float:
        """
        The median time of some calls, after others for warm-up; fewer calls if they take long.

        Args:
            function (`Callable`)
            repetitions (`int`): Number of calls at most.
            cold (`bool`, *optional*, defaults to `False`): Whether each call starts with none of its data in the cache
                and no work ahead of it, as one that reads little would have to be measured.
        """
        for _ in range(WARM_UP):
            function()
        estimate = self._timed(function, 1, cold)[0]
        return median(self._timed(function, max(3, min(repetitions, int(MOST_SECONDS / max(estimate, 1e-6)))), cold))

    def _timed(self, function, repetitions, cold):
        timer = self._timed_by_events if self.is_gpu else self._timed_by_clock
        filler = torch.empty(FILLER if cold and self.is_gpu else 1, dtype=torch.uint8, device=self.name)

        def prepare():
            if cold:
                filler.fill_(1)
                self.synchronize()

        self.synchronize()
        return timer(prepare, function, repetitions)

    def _timed_by_clock(self, prepare, function, repetitions):
        times = []
        for _ in range(repetitions):
            prepare()
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return times

    def _timed_by_events(self, prepare, function, repetitions):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for start, end in pairs:
            prepare()
            start.record()
            function()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """The most bytes that are allocated during a call, what was there before included. `None` on a CPU."""
        if not self.is_gpu:
            function()
            return None
        torch.cuda.reset_peak_memory_stats(self.name)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.name)

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """A context in which torch raises `RuntimeError` if the host waits for the GPU."""
        if not self.is_gpu:
            yield
            return
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Calls a function [`WARM_UP`] times, captures it in a CUDA graph, and returns what replays the graph."""
        if not self.is_gpu:
            for _ in range(WARM_UP):
                function()
            return function
        stream = torch.cuda.Stream(self.name)
        stream.wait_stream(torch.cuda.current_stream(self.name))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream(self.name).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def free(self) -> None:
        """Give unused memory back."""
        if self.is_gpu:
            torch.cuda.empty_cache()
