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
"""The hooks by which optimizers hold frozen rows come with the first freeze of a process, and go with the last."""

import gc
import subprocess
import sys
import weakref
from collections import OrderedDict

import pytest
from rows_by_hand import FROZEN, NUM_ROWS, OPTIMIZERS, WIDTH, backward, random_module, random_parameter
from torch import nn
from torch.optim import optimizer as torch_optimizer

from modeling_peer.optim import frozen_rows
from modeling_peer.optim.frozen_rows import freeze_rows


HOOKS = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)

# What the hooks of all optimizers are, in a process of its own, in which nothing else is frozen.
IN_A_PROCESS_OF_ITS_OWN = """if True:
    import gc
    import torch
    from torch import nn
    from torch.optim import optimizer

    def hooks():
        return len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks)

    import modeling_peer
    import modeling_peer.optim, modeling_peer.continual, modeling_peer.analysis
    from modeling_peer import PeerConfig, PeerForCausalLM, add_experts, freeze_experts

    def model():
        sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1, query_size=4)
        types = ["peer", "peer"]
        return PeerForCausalLM(PeerConfig(**sizes, num_hidden_layers=2, feed_forward_types=types, num_experts=4,
                                          num_retrieval_heads=1, num_experts_per_head=2))

    assert hooks() == (0, 0), "after the import"
    first, second = model(), model()
    frozen = [freeze_experts(first, [1]), freeze_experts(first, [2]), freeze_experts(second, [1])]
    assert hooks() == (1, 1), "while experts are frozen"
    frozen[0].remove()
    frozen[1].remove()
    assert hooks() == (1, 1), "while the second model is frozen"
    frozen[2].remove()
    assert hooks() == (0, 0), "after the last remove"
    frozen = freeze_experts(first, [1])
    add_experts(second, 5, mode="open")
    assert hooks() == (1, 1), "in a second freeze"
    optimizer_of_both = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    for each in (first, second):
        tokens = torch.ones(1, 4, dtype=torch.int64)
        each(tokens, labels=tokens).loss.backward()
    optimizer_of_both.step()
    del first, second, each, optimizer_of_both
    gc.collect()
    assert hooks() == (0, 0), "after both models, though a handle is left"
    frozen.remove()
    freeze_experts(model(), [1])
    gc.collect()
    assert hooks() == (0, 0), "after a model whose handle was dropped"
"""


class TestStepHooks:
    def test_are_there_while_something_is_frozen_and_no_longer(self):
        run = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, text=True, timeout=120
        )
        assert not run.returncode, run.stderr

    def test_go_with_the_parameter_and_do_not_hold_it(self):
        """Without the garbage collector: a table may take most of the memory."""
        gc.collect()
        before = [len(hooks) for hooks in HOOKS]
        module = random_module()
        freeze = freeze_rows(module, "weight", FROZEN)
        optimizer = OPTIMIZERS["AdamW"](module.weight)
        backward(module.weight, 0)
        optimizer.step()
        assert [len(hooks) for hooks in HOOKS] == [max(1, number) for number in before]
        references = [weakref.ref(module), weakref.ref(module.weight)]
        gc.disable()
        try:
            del module, optimizer
            assert [reference() for reference in references] == [None, None]
            assert [len(hooks) for hooks in HOOKS] == before
        finally:
            gc.enable()
        freeze.remove()
        with pytest.raises(RuntimeError, match="no longer frozen"):
            freeze.frozen_by_others()

    def test_do_not_go_while_torch_iterates_over_them(self, monkeypatch):
        """The garbage collector may take the last frozen parameter in the midst of a hook."""
        hooks, seen = frozen_rows._StepHooks(), []
        monkeypatch.setattr(frozen_rows, "_STEP_HOOKS", hooks)
        for dictionary in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
            monkeypatch.setattr(torch_optimizer, dictionary, OrderedDict())
        modules = [random_module()]
        freeze_rows(modules[0], "weight", FROZEN)
        for register in (
            torch_optimizer.register_optimizer_step_pre_hook,
            torch_optimizer.register_optimizer_step_post_hook,
        ):
            register(lambda *args: seen.append(1))
        states = hooks.states_by_parameter
        monkeypatch.setattr(hooks, "states_by_parameter", lambda: modules.clear() or states())
        other = random_module()
        OPTIMIZERS["AdamW"](other.weight).step()
        assert seen == [1, 1] and not modules and not states()
        freeze_rows(other, "weight", FROZEN).remove()
        assert len(torch_optimizer._global_optimizer_pre_hooks) == 1  # that of the test
        assert len(torch_optimizer._global_optimizer_post_hooks) == 1

    def test_leave_nothing_on_an_optimizer_whose_step_is_refused(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze = freeze_rows(module, "weight", FROZEN)
        module.weight = random_parameter()
        optimizer = OPTIMIZERS["AdamW"](module.weight)
        with pytest.raises(RuntimeError, match="another parameter has taken its place"):
            optimizer.step()
        freeze.remove()
        assert not vars(optimizer).get(frozen_rows.SAVED_ROWS)
        assert frozen_rows.SAVED_ROWS not in optimizer.__getstate__()

    def test_forget_a_freeze_that_ended_though_a_traceback_holds_it(self):
        """As a notebook holds the last one."""
        module = random_module()
        optimizer, own = OPTIMIZERS["AdamW"](module.weight), OPTIMIZERS["SGD"](module.weight)
        freeze = freeze_rows(module, "weight", FROZEN, optimizer=own)
        with pytest.raises(RuntimeError, match="another optimizer") as refusal:
            optimizer.step()
        freeze.remove()
        before = module.weight.detach().clone()
        backward(module.weight, 0)
        optimizer.step()
        assert module.weight.ne(before).all() and refusal.tb is not None
