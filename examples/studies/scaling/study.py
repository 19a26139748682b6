# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of the scaling study: which of its runs are timed, and which models are changed after their training."""

from typing import Any

from studies.common.training_plan import DENSE, PEER, Run
from studies.common.training_study import TrainingStudy
from studies.scaling.plan import reference_run, with_seeds


class Study(TrainingStudy):
    """See [`TrainingStudy`]; its plan is a [`Plan`]."""

    def timed_runs(self) -> dict[str, list[Run]]:
        """Dense and PEER at all sizes."""
        rate = self.plan.learning_rates[0]
        return {
            str(hidden_size): [Run(variant, hidden_size, 1, rate) for variant in (DENSE, PEER)]
            for hidden_size in self.plan.all_sizes
        }

    def changes_after_training(self, run: Run) -> dict[str, dict[str, Any]]:
        """Those of the plan, in the models that ablations are compared with."""
        reference = reference_run(self.plan, {PEER: run.learning_rate})
        return self.plan.after_training if run in with_seeds(reference, self.plan) else {}
