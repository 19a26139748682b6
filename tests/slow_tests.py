# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests that take long: `RUN_SLOW=1` runs them, as in Transformers, and so does CI on every change."""

import pytest
from transformers.testing_utils import parse_flag_from_env


RUN_SLOW = parse_flag_from_env("RUN_SLOW")
REASON = "It takes long: CI runs it on every change, and RUN_SLOW=1 here."

slow = pytest.mark.skipif(not RUN_SLOW, reason=REASON)
