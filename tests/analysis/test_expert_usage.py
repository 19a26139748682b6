# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Expert usage is that of the paper's table 3, of every token of a training or an evaluation, each counted once."""

import json
from statistics import fmean

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from release_names import CHECKPOINTING
from slow_tests import slow
from torch import nn
from torch.testing import assert_close
from trainer_worker import copy_of_state, counting_sequences, pad_right, small_model
from trainer_worker import trainer_of as stock_trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from two_processes import run_on_two_processes, save_parts

from modeling_peer.analysis.expert_usage import ExpertUsageCallback, ExpertUsageMeter, measure_usage
from modeling_peer.router import ProductKeyRouter


NAMES = ("usage", "unevenness", "top1_usage")


def model_of_three(**fields):
    return small_model("dense", "peer", "pkm", num_experts=12**2, num_experts_per_head=3, **fields)


def measured_by_hand(num_experts, records):
    """The measures of records of (indices, weights, padding mask), token by token."""
    scores, best = np.zeros(num_experts), set()
    for indices, weights, padding_mask in records:
        for position in np.ndindex(*indices.shape[:2]):
            if not padding_mask[position]:
                continue
            for head_indices, head_weights in zip(indices[position], weights[position], strict=True):
                best.add(int(head_indices[0]))
                for index, weight in zip(head_indices, head_weights, strict=True):
                    scores[index] += weight
    used = scores[scores > 0] / scores.sum()
    return {
        "usage": len(used) / num_experts,
        "unevenness": float((used * np.log(used * num_experts)).sum()),
        "top1_usage": len(best) / num_experts,
    }


def record_router(model, layer_idx, router_name="router"):
    """A list that each forward of a layer's router, in training or evaluation, adds itself to."""
    records, suffix = [], f"layers.{layer_idx}.mlp.{router_name}"
    router = next(module for name, module in model.named_modules() if name.endswith(suffix))

    def record(module, args, output):
        indices, weights = (tensor.detach().numpy() for tensor in output)
        records.append((module.training, (indices, weights, args[1].numpy())))

    router.register_forward_hook(record)
    return records


def trainer_of(model, folder, callbacks=None, **options):
    """Two sequences to a batch, of different lengths; the callback alone if there are no others."""
    callbacks = [ExpertUsageCallback()] if callbacks is None else callbacks
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, **options}
    return stock_trainer(model, folder, counting_sequences(12), counting_sequences(6, seed=2), callbacks, **options)


def measures_of(entry, layer, prefix=""):
    return {name: entry[f"{prefix}expert_{name}/{layer}"] for name in NAMES}


def test_a_text_is_measured_in_evaluation_and_without_padding():
    model = model_of_three().train()
    before, records = copy_of_state(model), record_router(model, 1)
    meters = measure_usage(model, **pad_right(counting_sequences(4)))
    ((in_training, record),) = records
    assert not in_training and model.training and not record[2].all()
    found = meters["model.layers.1.mlp.expert_pool"].compute()
    assert found == pytest.approx(measured_by_hand(144, [record]), rel=1e-5)
    assert_close(copy_of_state(model), before, rtol=0, atol=0)


class TestMeter:
    def test_weights_of_zero_are_not_counted(self):
        """An expert of weight zero was retrieved, not used, and is not the best of its head either."""
        meter = ExpertUsageMeter(16)
        indices, weights = [[[[3, 1]], [[3, 2]], [[5, 4]]]], [[[[0.5, 0.5]], [[1.0, 0.0]], [[0.0, 0.0]]]]
        meter.update(torch.tensor(indices), torch.tensor(weights))
        assert meter.scores.nonzero().flatten().tolist() == [1, 3]
        assert meter.compute()["usage"] == 2 / 16
        assert meter.top1_counts.tolist() == [0, 0, 0, 2] + [0] * 12

    def test_small_weights_are_not_lost_in_a_large_sum(self):
        meter = ExpertUsageMeter(4)
        meter.scores += 2.0**24
        meter.update(torch.zeros(1, 100, 1, 1, dtype=torch.int64), torch.full((1, 100, 1, 1), 0.5))
        assert meter.scores[0] == 2**24 + 50

    def test_update_copies_nothing_to_the_host(self):
        """Meta tensors have no values: whatever needs one, `.item()` or a boolean selection, raises."""
        meter = ExpertUsageMeter(16, device="meta")
        indices = torch.empty(2, 5, 3, 2, dtype=torch.int64, device="meta")
        meter.update(indices, torch.empty(2, 5, 3, 2, device="meta", dtype=torch.bfloat16))


class TestCallback:
    def test_logs_equal_a_meter_fed_by_hand(self, tmp_path):
        """Two micro-batches to a step, an evaluation between two logs that must keep its forwards to itself."""
        model = model_of_three()
        records = {layer_idx: record_router(model, layer_idx) for layer_idx in (1, 2)}
        trainer = trainer_of(
            model,
            tmp_path,
            max_steps=6,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=2,
        )
        trainer.train()
        train_logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        eval_logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(train_logs) == 3 and len(eval_logs) == 2
        for layer_idx in (1, 2):
            layer = f"layer_{layer_idx}"
            training = [record for is_training, record in records[layer_idx] if is_training]
            evaluation = [record for is_training, record in records[layer_idx] if not is_training]
            for step, entry in enumerate(train_logs):
                by_hand = measured_by_hand(144, training[4 * step : 4 * step + 4])
                assert measures_of(entry, layer) == pytest.approx(by_hand, rel=1e-5)
                means = [fmean(measures_of(entry, f"layer_{each}")[name] for each in (1, 2)) for name in NAMES[:2]]
                assert [entry[f"expert_{name}"] for name in NAMES[:2]] == pytest.approx(means)
            for number, entry in enumerate(eval_logs):
                by_hand = measured_by_hand(144, evaluation[3 * number : 3 * number + 3])
                assert measures_of(entry, layer, "eval_") == pytest.approx(by_hand, rel=1e-5)
        assert not any("layer_0" in name for entry in trainer.state.log_history for name in entry)
        json.dumps(trainer.state.log_history, allow_nan=False)
        # Its hooks are gone, and ours are not.
        routers = [module for module in model.modules() if isinstance(module, ProductKeyRouter)]
        assert [len(router._forward_hooks) for router in routers] == [1, 1]
        assert not any("expert_" in name for name in trainer.evaluate())

    def test_added_experts_are_measured_by_themselves(self, tmp_path):
        addition = {"layers": [1], "mode": "protected", "num_experts": 7**2}
        model = model_of_three(expert_additions=[{**addition, "num_retrieval_heads": 1, "num_experts_per_head": 3}])
        records = [record_router(model, 1, name) for name in ("router", "added_routers.0")]
        trainer = trainer_of(model, tmp_path, max_steps=1)
        trainer.train()
        (first,), (added,) = [[record for _, record in each] for each in records]
        entry = trainer.state.log_history[0]
        assert measures_of(entry, "layer_1") == pytest.approx(measured_by_hand(144, [first]), rel=1e-5)
        indices, *others = added
        by_hand = measured_by_hand(49, [(indices - 144, *others)])
        assert measures_of(entry, "layer_1_added_0") == pytest.approx(by_hand, rel=1e-5)

    @pytest.mark.parametrize("added", ["argument", "later"])
    def test_logs_metrics_and_trackers_get_the_values(self, tmp_path, added):
        """
        However the callback was added; every callback is told once that the training begins. The log of a training
        loss, of which there are many, has the means over layers alone.
        """

        class Tracker(TrainerCallback):  # as those of `report_to`, which come before all that a user adds
            def __init__(self):
                self.begun, self.seen = 0, []

            def on_train_begin(self, args, state, control, **kwargs):
                self.begun += 1

            def on_log(self, args, state, control, logs=None, **kwargs):
                self.seen.append(dict(logs))

            def on_evaluate(self, args, state, control, metrics, **kwargs):
                self.metrics = dict(metrics)

            def on_epoch_end(self, args, state, control, model=None, **kwargs):
                # A forward of the user's own, of neither.
                model.eval()(torch.ones(1, 4, dtype=torch.int64))

        class Last(Tracker):
            pass

        tracker, last = Tracker(), Last()
        trainer = trainer_of(
            model_of_three(),
            tmp_path,
            [tracker, *[ExpertUsageCallback()] * (added == "argument"), last],
            max_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            include_num_input_tokens_seen="all",
        )
        if added == "later":
            trainer.add_callback(ExpertUsageCallback())
        trainer.train()
        assert tracker.begun == last.begun == 1
        assert tracker.seen == last.seen
        first, *others = trainer.state.log_history
        assert [logs | {"step": 1} for logs in last.seen[1:]] == others
        assert last.seen[0].items() <= first.items()
        found = [{name for name in logs if "expert_" in name} for logs in (first, *last.seen, last.metrics)]
        means = {f"expert_{name}" for name in NAMES[:2]}
        names = means | {f"expert_{name}/layer_{layer_idx}" for name in NAMES for layer_idx in (1, 2)}
        in_evaluation = {f"eval_{name}" for name in names}
        assert found == [names, means, in_evaluation, set(), in_evaluation]
        assert 0 < last.seen[0]["expert_usage"] <= 1

    def test_other_logs_and_predictions_do_not_disturb(self, tmp_path):
        """A user's own log between two steps takes nothing away, nor does a prediction add to the next evaluation."""

        class Disturb(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                self.trainer.log({"mine": 1.0})

            def on_step_end(self, args, state, control, **kwargs):
                self.metrics = self.trainer.predict(counting_sequences(4, seed=9)).metrics

        logs = []
        for disturb in ([], [Disturb()]):
            trainer = trainer_of(
                model_of_three(),
                tmp_path,
                [ExpertUsageCallback(), *disturb],
                max_steps=2,
                gradient_accumulation_steps=2,
                eval_strategy="steps",
                eval_steps=1,
            )
            for callback in disturb:
                callback.trainer = trainer
            trainer.train()
            logs.append([e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e])
        for calm, disturbed in zip(*logs, strict=True):
            for name in calm:
                if "expert_" in name:
                    assert disturbed[name] == pytest.approx(calm[name], rel=1e-5)
        assert 0 < disturb[0].metrics["test_expert_usage/layer_1"] <= 1

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_counts_no_token_twice(self, tmp_path, monkeypatch, use_reentrant):
        """Measures alone would not tell: they are the same if every token counts twice."""
        updates, update = [], ExpertUsageMeter.update
        monkeypatch.setattr(ExpertUsageMeter, "update", lambda *args: updates.append(1) or update(*args))
        logs, forwards = [], []
        for checkpointing in (False, True):
            model = model_of_three()
            forwards.append(record_router(model, 1))
            updates.clear()
            trainer = trainer_of(
                model,
                tmp_path,
                max_steps=3,
                **{CHECKPOINTING: checkpointing},
                **{f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}},
            )
            trainer.train()
            assert len(updates) == 3 * 2
            logs.append([measures_of(entry, "layer_1") for entry in trainer.state.log_history if "loss" in entry])
        assert len(forwards[0]) == 3 and len(forwards[1]) == 6
        assert logs[0] == [pytest.approx(measures, rel=1e-4) for measures in logs[1]]

    def test_under_peft(self, tmp_path):
        """Of the routers that PEFT keeps for a layer, the original and a copy for each adapter, only one runs."""
        options = {"target_modules": ["q_proj"], "modules_to_save": ["router"]}
        model = get_peft_model(model_of_three(), LoraConfig(r=2, **options))
        model.add_adapter("idle", LoraConfig(r=2, **options))
        trainer = trainer_of(model, tmp_path, max_steps=1)
        trainer.train()
        measures = measures_of(trainer.state.log_history[0], "layer_1")
        assert 0 < measures["usage"] <= 1

    @slow
    def test_compiled(self, tmp_path):
        logs = []
        for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
            trainer = trainer_of(model_of_three(), tmp_path, max_steps=1, **options)
            trainer.train()
            logs.append(measures_of(trainer.state.log_history[0], "layer_1"))
        assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def training_of_rank(rank):
    """The log of one training forward of the rank's own sequences in a wrapped model, and what its router found."""
    model = nn.parallel.DistributedDataParallel(model_of_three())
    records = record_router(model, 1)
    callback, state, control = ExpertUsageCallback(), TrainerState(), TrainerControl()
    arguments = TrainingArguments("unused", use_cpu=True)
    callback.on_train_begin(arguments, state, control, model=model)
    model.train()(**pad_right(counting_sequences(2, seed=10 + rank)))
    state.log_history.append({})
    callback.on_log(arguments, state, control, logs={"loss": 1.0})
    return state.log_history[0], [record for _, record in records]


def test_ranks_are_summed(tmp_path):
    run_on_two_processes(save_parts, str(tmp_path), (training_of_rank,))
    (logs, records), (other_logs, other_records) = (
        torch.load(tmp_path / f"training_of_rank-{rank}", weights_only=False) for rank in range(2)
    )
    assert logs == other_logs
    assert measures_of(logs, "layer_1") == pytest.approx(measured_by_hand(144, records + other_records), rel=1e-5)
    assert measured_by_hand(144, records) != measured_by_hand(144, records + other_records)
