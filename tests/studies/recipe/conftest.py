# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study registers variants of its own, which other tests do not know."""

import pytest

from studies.recipe.variants import register_variants


@pytest.fixture(scope="module", autouse=True)
def variants_of_the_study(registered_variants):
    register_variants()
