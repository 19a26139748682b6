# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables in 16 bits are rounded stochastically: without a bias, and the same way by C, by torch and after a resume."""

import copy

import pytest
import torch
from row_tables import random_gradients, random_table, rows_of, take_steps
from torch import nn

from modeling_peer.optim.stochastic_rounding import ROUNDED, random_bits, round_stochastically


each_dtype = pytest.mark.parametrize("dtype", ROUNDED, ids=str)


def every(dtype):
    """All numbers of 16 bits: subnormal and infinite ones, both zeros and those that are none."""
    return torch.arange(2**16).to(torch.uint16).view(dtype)


def pattern(tensor):
    return tensor.detach().contiguous().view(torch.int16)


def a_step_down(start, lr, seed):
    """A table after a step of exactly `lr` down for every element: `x - lr` in float32, and rounded."""
    options = {"lr": lr, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0, "rounding_seed": seed}
    table = nn.Parameter(start.clone())
    take_steps(rows_of(table, **options), table, [torch.ones_like(table)])
    return table.detach()


@each_dtype
class TestRounding:
    def test_keeps_what_needs_none(self, dtype):
        numbers = every(dtype)
        for bits in (0, 2**32 - 1, 0x9E3779B9):
            found = round_stochastically(numbers.float(), dtype, torch.full((2**16,), bits))
            is_number = ~numbers.isnan()
            assert torch.equal(pattern(found)[is_number], pattern(numbers)[is_number])
            assert found[~is_number].isnan().all()

    def test_is_up_with_the_probability_that_makes_the_mean_exact(self, dtype):
        """Over 2^16 random bits that lie evenly, for numbers of all sizes between two that need no rounding."""
        evenly = torch.arange(2**16) << 16
        levels = 2.0**-13 if dtype == torch.float16 else 2.0**-16
        finite = every(dtype)[every(dtype).isfinite()].double()
        generator = torch.Generator().manual_seed(0)
        for place in [0, 1, 2, 1023, 1024, *torch.randint(len(finite), (60,), generator=generator).tolist()]:
            down = finite[place].to(dtype)
            up = (pattern(down) + 1).view(dtype)  # away from zero
            if not up.isfinite():
                continue
            share = torch.rand((), generator=generator, dtype=torch.float64)
            value = (down.double() + share * (up.double() - down.double())).float()
            exact = ((value.double() - down.double()) / (up.double() - down.double())).item()
            found = round_stochastically(value.expand(2**16), dtype, evenly)
            assert torch.isin(pattern(found), torch.stack([pattern(down), pattern(up)])).all()
            assert abs((pattern(found) == pattern(up)).double().mean().item() - exact) <= 1.01 * levels

    def test_of_the_largest_numbers(self, dtype):
        largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
        beyond = 2.0 * largest.double() if dtype == torch.float16 else torch.tensor(torch.finfo(torch.float32).max)
        values = torch.stack([largest.double(), -largest.double(), beyond.double()]).float()
        found = round_stochastically(values, dtype, torch.full((3,), 2**32 - 1))
        assert found.tolist() == [largest.item(), -largest.item(), torch.inf]

    @pytest.mark.parametrize("lr", [0.0, 2**-25, 1e-8, 3e-6, 1e-3, 0.3, 17.0, 4e4, 1e30])
    def test_of_c_is_that_of_torch(self, path, dtype, lr):
        """To the bit, for all numbers of 16 bits as weights."""
        for numbers, seed in ((every(dtype)[:-9], 5), (every(dtype)[9:].flip(0), 2**32 - 1)):
            start = numbers.view(37, 1771)
            bits = random_bits(seed, torch.arange(37), torch.ones(37, dtype=torch.int32), 1771)
            expected = round_stochastically(start.float() - lr, dtype, bits)
            found = a_step_down(start, lr, seed)
            is_number = ~expected.isnan()
            assert torch.equal(found.isnan(), ~is_number)
            assert torch.equal(pattern(found)[is_number], pattern(expected)[is_number])

    def test_steps_far_below_a_unit_in_the_last_place_are_not_lost(self, path, dtype):
        """The mean over seeds is unbiased, where rounding to the nearest would move nothing."""
        lr = torch.finfo(dtype).eps / 64
        assert torch.ones((), dtype=dtype) - torch.tensor(lr, dtype=dtype) == 1
        moved = torch.stack([a_step_down(torch.ones(50, 64, dtype=dtype), lr, seed).double() for seed in range(40)])
        below = 1 - torch.finfo(dtype).eps / 2
        assert moved.unique().tolist() == [below, 1.0]
        deviation = (1 - below) * (1 / 32 * 31 / 32 / moved.numel()) ** 0.5
        assert abs(moved.mean() - (1 - lr)) < 4 * deviation
        # Nor by where an element is.
        for dim in (0, 1, 2):
            means = moved.mean([each for each in range(3) if each != dim])
            assert (means - (1 - lr)).abs().max() < 6 * deviation * (moved.shape[dim]) ** 0.5


class TestBits:
    def test_are_a_hash_of_seed_row_step_and_column(self):
        """By the letter, in Python's integers."""

        def mix(x):
            x &= 0xFFFFFFFF
            x ^= x >> 16
            x = x * 0x85EBCA6B & 0xFFFFFFFF
            x ^= x >> 13
            x = x * 0xC2B2AE35 & 0xFFFFFFFF
            return x ^ x >> 16

        rows, steps = torch.tensor([0, 1, 5, 2**20]), torch.tensor([1, 2, 2**31 - 1, 7], dtype=torch.int32)
        for seed in (0, 7, 2**32 - 1):
            expected = [
                [
                    mix(mix(mix(seed + row * 0x9E3779B1) + step * 0x85EBCA77) + column * 0xC2B2AE3D)
                    for column in range(5)
                ]
                for row, step in zip(rows.tolist(), steps.tolist(), strict=True)
            ]
            assert random_bits(seed, rows, steps, 5).tolist() == expected


def trained(seed, dtype=torch.bfloat16, steps=10):
    table = random_table(dtype)
    optimizer = rows_of(table, rounding_seed=seed)
    take_steps(optimizer, table, random_gradients(steps, dtype))
    return table.detach()


class TestSeed:
    def test_decides(self, path):
        assert torch.equal(trained(3), trained(3))
        assert not torch.equal(trained(3), trained(4))
        assert torch.equal(trained(3, torch.float32), trained(4, torch.float32))

    def test_states_of_before_there_was_one_load(self):
        table = random_table(torch.bfloat16)
        optimizer = rows_of(table, rounding_seed=5)
        old = copy.deepcopy(optimizer.state_dict())
        del old["param_groups"][0]["rounding_seed"]
        optimizer.load_state_dict(old)
        assert optimizer.param_groups[0]["rounding_seed"] == 5
        take_steps(optimizer, table, random_gradients(1, torch.bfloat16))
        assert not torch.equal(table, random_table(torch.bfloat16))
