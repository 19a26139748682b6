# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A page to explore which experts a text uses, and what they do."""

from .app import make_app  # noqa: F401
from .contexts import ExpertContexts  # noqa: F401
from .page import save_explorer_page  # noqa: F401
