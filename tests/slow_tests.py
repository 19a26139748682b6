# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Tests that take long: `RUN_SLOW=1` runs them, as in Transformers, and so does CI on every change."""

import pytest
from transformers.testing_utils import parse_flag_from_env


RUN_SLOW = parse_flag_from_env("RUN_SLOW")
REASON = "It takes long: CI runs it on every change, and RUN_SLOW=1 here."

slow = pytest.mark.skipif(not RUN_SLOW, reason=REASON)
