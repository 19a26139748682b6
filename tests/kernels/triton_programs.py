# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the programs of a launch read, write and add to, as Triton's interpreter runs them one after another: addresses say
whether programs that run at the same time would get in each other's way.
"""

import contextlib
import random
from unittest import mock

import numpy as np
import torch

from modeling_peer.ops import triton_launch


class Race(AssertionError):
    pass


class Launch:
    """A log of the addresses of elements. Of each kind of access pairs of an address and a program."""

    def __init__(self, arguments):
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        self.ranges = [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors]
        self.program = 0
        self.accesses = {"read": [], "written": [], "added to": []}

    def record(self, kind, pointers, mask):
        addresses = np.asarray(pointers.data)[np.asarray(mask.data)].ravel().astype(np.uint64)
        inside = np.zeros(addresses.shape, bool)
        for start, end in self.ranges:
            inside |= (start <= addresses) & (addresses < end)
        assert inside.all(), f"{kind} outside of all tensors of the launch"
        self.accesses[kind].append(np.stack([addresses, np.full_like(addresses, self.program)]))

    def pairs(self, *kinds):
        found = [each for kind in kinds for each in self.accesses[kind]]
        addresses, programs = np.concatenate([np.empty((2, 0), np.uint64), *found], axis=1)
        # As one number each, which NumPy sorts much faster than pairs. Addresses have 48 bits.
        numbers = np.unique(addresses << np.uint64(16) | programs)
        return np.stack([numbers >> np.uint64(16), numbers & np.uint64(0xFFFF)])

    def races(self):
        """
        Addresses that several programs use, of which one changes what is there. That all of them add to it is no race.
        """
        addresses, programs = np.unique(self.pairs("read", "written", "added to")[0], return_counts=True)
        added_and_read = np.intersect1d(self.pairs("added to")[0], self.pairs("read")[0])
        changed = np.union1d(self.pairs("written")[0], added_and_read)
        return np.intersect1d(addresses[programs > 1], changed)


@contextlib.contextmanager
def watched_launches(seed=None):
    """
    Let every launch run its programs in the order of their numbers, or shuffled if there is a seed, with new memory
    full of NaN, and raise `Race` if two of them get in each other's way. Yields the launches so far.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    start, launches, patch_language = triton_launch.start, [], interpreter._patch_lang

    def start_watched(kernel, grid, arguments, options):
        launch = Launch(arguments)
        order = list(np.ndindex(*grid))
        assert len(order) <= 2**16, "more programs than `Launch.pairs` tells apart"
        if seed is not None:
            random.Random(seed).shuffle(order)

        def logged(name, kind):
            method = getattr(InterpreterBuilder, name)

            def call(builder, *args):
                pointers, mask = (args[1], args[3]) if kind == "added to" else (args[0], args[2 - (kind == "read")])
                launch.record(kind, pointers, mask)
                return method(builder, *args)

            return mock.patch.object(InterpreterBuilder, name, call)

        patched = set()

        def patch_once(function):
            """It is patched again at each call of a function in a kernel, which changes nothing and takes half the time."""
            if function not in patched:
                patched.add(function)
                return patch_language(function)

        set_grid_idx = InterpreterBuilder.set_grid_idx

        def set_shuffled(builder, *place):
            launch.program = np.ravel_multi_index(place[: len(grid)], grid)
            set_grid_idx(builder, *(*order[launch.program], *place[len(grid) :]))

        with (
            logged("create_masked_load", "read"),
            logged("create_masked_store", "written"),
            logged("create_atomic_rmw", "added to"),
            mock.patch.object(InterpreterBuilder, "set_grid_idx", set_shuffled),
            mock.patch.object(interpreter, "_patch_lang", patch_once),
        ):
            start(kernel, grid, arguments, options)
        launches.append(launch)
        races = launch.races()
        if len(races):
            raise Race(f"{kernel.__name__}: {len(races)} addresses")

    torch.use_deterministic_algorithms(True)  # fills new memory
    try:
        with mock.patch.object(triton_launch, "start", start_watched):
            yield launches
    finally:
        torch.use_deterministic_algorithms(False)
