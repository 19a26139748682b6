# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`Trainer` of Transformers trains every head and variant; none of its options changes what is computed."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from trainer_worker import PERIOD, counting_sequences, logged, query_batch_norms, small_model, train, trainer_of

from modeling_peer import (
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
)


def classified_by_their_last_token(number, seed=1):
    return [example | {"labels": int(example["labels"][-1]) % 2} for example in counting_sequences(number, seed)]


def classified_token_by_token(number, seed=1):
    return [example | {"labels": example["labels"] % 3} for example in counting_sequences(number, seed)]


def with_marked_answers(number, seed=1):
    """Sequences in which one token marks the start of the answer and another, at the end, its end."""
    examples = []
    for example in counting_sequences(number, seed):
        input_ids, start = example["input_ids"].clone(), int(example["input_ids"][0]) % (len(example["input_ids"]) - 1)
        input_ids[start], input_ids[-1] = PERIOD + 1, PERIOD + 2
        examples.append({"input_ids": input_ids, "start_positions": start, "end_positions": len(input_ids) - 1})
    return examples


# Of each case: the model, its examples, the number of steps, and what is left of the loss.
SHARED = {"share_experts_across_layers": True, "gated_experts": True, "query_norm": "rms", "scoring_func": "sigmoid"}
TRAININGS = {
    "peer": (lambda: small_model("dense", "peer"), counting_sequences, 40, 0.3),
    "peer-shared-gated-rms-sigmoid": (lambda: small_model("peer", "peer", **SHARED), counting_sequences, 40, 0.3),
    "pkm-moe": (lambda: small_model("pkm", "moe", output_router_logits=True), counting_sequences, 40, 0.3),
    "sequences": (
        lambda: small_model(model_class=PeerForSequenceClassification, num_labels=2),
        classified_by_their_last_token,
        60,
        0.5,
    ),
    "tokens": (
        lambda: small_model(model_class=PeerForTokenClassification, num_labels=3),
        classified_token_by_token,
        60,
        0.5,
    ),
    "answers": (lambda: small_model(model_class=PeerForQuestionAnswering), with_marked_answers, 60, 0.5),
}


@pytest.mark.parametrize(("model", "examples", "max_steps", "share"), TRAININGS.values(), ids=TRAININGS)
def test_trains_and_evaluates(tmp_path, model, examples, max_steps, share):
    trainer = trainer_of(model(), tmp_path, examples(160), examples(16, seed=2), max_steps=max_steps)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = logged(trainer)
    assert np.mean(losses[-5:]) < share * losses[0]
    assert trainer.evaluate()["eval_loss"] < share * before


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_bfloat16_follows_float32(tmp_path, half):
    model = small_model()
    if half == "weights":
        model.save_pretrained(tmp_path)
        model = PeerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    losses = logged(train(model, tmp_path, bf16=True))
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.3 * losses[0]
    reference = small_model()
    in_float32 = logged(train(reference, tmp_path))
    assert losses != in_float32
    assert losses[:10] == pytest.approx(in_float32[:10], rel=0.05)
    assert losses == pytest.approx(in_float32, rel=0.2, abs=0.2)
    (norm,), (reference_norm,) = query_batch_norms(model), query_batch_norms(reference)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert_close(norm.running_var.mean(), reference_norm.running_var.mean(), rtol=0.1, atol=0)


def test_label_smoothing_is_of_the_next_token(tmp_path):
    model, tokens = small_model().eval(), torch.randint(PERIOD, (2, 9))
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.1)
    loss, logits = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens}), model(tokens).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1)
    assert_close(loss, expected)


def test_evaluation_changes_nothing_of_a_training(tmp_path):
    alone = train(small_model(), tmp_path, max_steps=4)
    evaluated = train(small_model(), tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1)
    evaluated.predict(counting_sequences(8))
    assert len(logged(evaluated, "eval_loss")) == 4
    assert logged(evaluated) == logged(alone)
    assert_close(evaluated.model.state_dict(), alone.model.state_dict(), rtol=0, atol=0)


class TestGradientAccumulation:
    def test_statistics_are_those_of_each_micro_batch(self, tmp_path):
        """Folded one after the other, of tokens and not of padding."""
        model = small_model()
        router = model.model.layers[1].mlp.router
        micro_batches = []

        def record(module, args, output):
            queries = router.query_proj(args[0]).detach()
            micro_batches.append(queries[args[1].bool()])

        router.register_forward_hook(record)
        train(model, tmp_path, max_steps=1, gradient_accumulation_steps=4)
        assert len({len(queries) for queries in micro_batches}) > 1

        def folded(batches):
            mean, variance = torch.zeros(()), torch.ones(())
            for queries in batches:
                mean = 0.9 * mean + 0.1 * queries.mean(0)
                variance = 0.9 * variance + 0.1 * queries.var(0)
            return mean, variance

        norm = router.query_norm
        mean, variance = folded(micro_batches)
        assert norm.num_batches_tracked == len(micro_batches) == 4
        assert_close(norm.running_mean, mean)
        assert_close(norm.running_var, variance)
        of_the_joint_batch, _ = folded([torch.cat(micro_batches)])
        assert not torch.allclose(norm.running_mean, of_the_joint_batch, rtol=0.1)
