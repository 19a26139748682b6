# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which experts the C selects, in which order, against stable sorts: bit for bit, whatever the scores.

Queries are powers of two and sub-keys have one element, so that scores are the sub-keys themselves, and any scores can
be given.
"""

import pytest
import torch
from kernel_cases import retrieve_as_compiled_with

from modeling_peer.experts import expert_index
from modeling_peer.ops.kernels_cpu import CpuKernels


PROCESSORS = {
    "this_one": "",
    "without_avx512": "-mno-avx512f",
    "without_avx": "-mno-avx512f -mno-avx2 -mno-avx",
    "of_another_kind": "-mno-avx512f -mno-avx2 -mno-avx -U__SSE2__",
}


@pytest.fixture(scope="module", params=PROCESSORS.values(), ids=PROCESSORS, autouse=True)
def processor(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            retrieve_as_compiled_with(request.param, patch, tmp_path_factory.mktemp("home"))
        yield


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def best(scores, k):
    """The k best along the last dimension, of equal ones the first; NaN counts as infinity."""
    seen = torch.where(scores.isnan(), torch.inf, scores)
    found = seen.sort(dim=-1, descending=True, stable=True)
    return found.values[..., :k], found.indices[..., :k]


def literal_retrieval(queries, sub_keys, k):
    """Indices and scores: a stable sort of each half, and one of the pairs that can be among the k best."""
    scores = queries * sub_keys.squeeze(-1) + 0.0  # the sum of one product starts at zero
    values, places = best(scores, k)
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    rows, columns = torch.tensor(pairs).T
    top_scores, pair = best(values[..., 0, :][..., rows] + values[..., 1, :][..., columns], k)
    row, column = (places[..., half, :].gather(-1, ranks[pair]) for half, ranks in enumerate((rows, columns)))
    return expert_index(row, column), top_scores


def some_infinite(shape):
    scores = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.2, torch.inf * scores.sign(), scores)


SCORES = {
    "normal": torch.randn,
    "with_ties": lambda shape: torch.randint(-3, 4, shape).float(),
    "equal": lambda shape: torch.full(shape, 0.5),
    "with_outliers": lambda shape: torch.randn(shape).pow(15) * 1e20,
    "largest_and_smallest": lambda shape: (
        torch.randn(shape).sign() * torch.tensor([3.4e38, 2.8e-45])[torch.randint(0, 2, shape)]
    ),
    "ascending": lambda shape: torch.randn(shape).sort(-2).values,
    "descending": lambda shape: torch.randn(shape).sort(-2, descending=True).values,
    "alternating": lambda shape: torch.randn(shape) + 9.0 * (torch.arange(shape[-2])[:, None] % 16 == 3),
    "mostly_minus_infinity": lambda shape: torch.where(torch.rand(shape) < 0.9, -torch.inf, torch.randn(shape)),
    "infinite": some_infinite,
    "not_a_number": lambda shape: torch.where(torch.rand(shape) < 0.1, torch.nan, some_infinite(shape)),
}

# √N and k: around multiples of the width of registers and of what is compared at a time, and all sub-keys.
SIZES = [(1, 1), (3, 3), (7, 4), (16, 16), (17, 5), (33, 16), (33, 33), (65, 17), (96, 32)]
SIZES += [(128, 16), (256, 16), (256, 33), (257, 128), (300, 300), (1024, 16)]


@pytest.mark.parametrize("size, k", SIZES, ids=str)
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_equals_stable_sorts(scores, size, k):
    torch.manual_seed(size * k)
    for num_sets, num_tokens in ((1, 7), (3, 5)):
        sub_keys = scores((num_sets, 2, size, 1))
        queries = 2.0 ** torch.randint(-1, 2, (num_tokens, 3, 2, 1))
        indices, top_scores = CpuKernels.retrieve(queries, sub_keys, k)
        expected_indices, expected_scores = literal_retrieval(queries, sub_keys, k)
        assert torch.equal(bits(top_scores), bits(expected_scores))
        assert torch.equal(indices, expected_indices)
