# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The common tests of Transformers for configurations, models and training, over all classes and variants of PEER."""

import unittest

import library_suite
import torch
from slow_tests import slow
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from modeling_peer import (
    PeerConfig,
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
)


ModelTesterMixin = library_suite.load("test_modeling_common").ModelTesterMixin
ConfigTester = library_suite.load("test_configuration_common").ConfigTester
TrainingTesterMixin = library_suite.load("test_training_mixin").TrainingTesterMixin

# By these tables of class names the tests of Transformers know which labels a class takes.
for task, model_class in (
    ("", PeerModel),
    ("_FOR_CAUSAL_LM", PeerForCausalLM),
    ("_FOR_SEQUENCE_CLASSIFICATION", PeerForSequenceClassification),
    ("_FOR_TOKEN_CLASSIFICATION", PeerForTokenClassification),
    ("_FOR_QUESTION_ANSWERING", PeerForQuestionAnswering),
):
    getattr(modeling_auto, f"MODEL{task}_MAPPING_NAMES")["peer"] = model_class.__name__


class PeerModelTester:
    """What the mixins of Transformers ask of a model: a tiny configuration and inputs for it."""

    base_model_class = PeerModel
    causal_lm_class = PeerForCausalLM
    is_training = True
    batch_size = 3
    seq_length = 7
    hidden_size = 32
    num_attention_heads = 4
    vocab_size = 99

    def __init__(self, feed_forward_types):
        self.feed_forward_types = feed_forward_types
        self.num_hidden_layers = len(feed_forward_types)

    def get_config(self):
        return PeerConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=64,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=128,
            feed_forward_types=self.feed_forward_types,
            num_experts=8**2,
            num_retrieval_heads=2,
            num_experts_per_head=4,
            query_size=16,
            shared_expert_intermediate_size=16,
            moe_num_experts=4,
            pad_token_id=0,
            num_labels=3,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        attention_mask = torch.tril(torch.ones_like(input_ids))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CommonTests:
    """The model tests of Transformers, and the few that need to know more of PEER."""

    all_model_classes = (
        PeerModel,
        PeerForCausalLM,
        PeerForSequenceClassification,
        PeerForTokenClassification,
        PeerForQuestionAnswering,
    )

    @unittest.skip("asks for the generation tests of Transformers, which no release carries: see test_generation.py")
    def test_generation_tester_mixin_inheritance(self):
        pass


def without_moe(test_class):
    """Skip what Transformers asks of routers with logits and of MoE experts."""
    for name in dir(test_class):
        if name.startswith(("test_eager_matches_batched_and_grouped", "test_output_router_logits_from_config")):
            setattr(test_class, name, unittest.skip("no MoE layer here: MoeModelTest runs it")(lambda self: None))
    return test_class


@without_moe
class PeerModelTest(CommonTests, ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    model_tester = PeerModelTester(["peer", "pkm"])

    def test_config(self):
        ConfigTester(self, config_class=PeerConfig, hidden_size=32, num_attention_heads=4).run_common_tests()


@slow
class MoeModelTest(CommonTests, ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    model_tester = PeerModelTester(["dense", "moe"])
    test_all_params_have_gradient = False  # a batch this small leaves experts without tokens
