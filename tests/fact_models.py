# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Small base models with grafts of facts, whose keys are random and open for about half of all tokens."""

import torch
from graft_models import base_model_of
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_peer.fact_graft import FIELDS_OF_FACTS, FactGraft
from modeling_peer.facts.index import BEGINNINGS, OTHER_RELATIONS, OTHER_WORDINGS
from modeling_peer.facts.table import FRAMES, RELATION_WORDINGS
from modeling_peer.graft.model import PeerGraftConfig


NUM_EXPERTS, EXPERTS_OF_A_FACT = 9, 3
# Names by the subjects: some tokens of the vocabulary, some pairs of them.
NAME_TOKENS = [*range(1, 40, 3)]
NAMES = {(token,): place % 2 for place, token in enumerate(NAME_TOKENS[:-2])} | {(1, 4): 0, tuple(NAME_TOKENS[-2:]): 0}


# Of the tokens before the last ones of answers; before the second ones any may stand.
LAST_ROWS = (3, 4)


def fact_config(**fields) -> PeerGraftConfig:
    """Of two facts of two relations, whose answers have three tokens each."""
    return PeerGraftConfig(
        task_type="CAUSAL_LM",
        layers_to_transform=[2],
        num_experts=NUM_EXPERTS,
        **FIELDS_OF_FACTS,
        fact_sizes={
            "num_subjects": 2,
            "num_names": len(NAMES),
            "longest_name": 2,
            "num_tokens": len(NAME_TOKENS),
            "num_relations": 2,
            "num_continuations": 4,
            "key_size": 4,
        },
        facts=[
            {"subject": name, "question": f"What of {name}?", "answer": name.lower(), "num_experts": EXPERTS_OF_A_FACT}
            for name in ("A", "B")
        ],
        **fields,
    )


@torch.no_grad()
def with_keys(graft: FactGraft, base: PreTrainedModel, seed: int) -> None:
    """
    Names, random keys and experts. The first tokens of both answers are found by one question, another one has no fact.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in graft.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter))
    graft.router.questions.keys.copy_(F.normalize(graft.router.questions.keys, dim=-1))
    graft.expert_pool.down_proj.weight[6:] = 0
    graft.router.questions.threshold.fill_(0.1)
    finder = graft.router.subjects
    finder.tokens.copy_(F.normalize(base.get_input_embeddings().weight[NAME_TOKENS], dim=-1))
    for place, name in enumerate(NAMES):
        finder.names[place, -len(name) :] = torch.tensor([NAME_TOKENS.index(token) for token in name])
    finder.subjects.copy_(torch.tensor(list(NAMES.values())))
    graft.router.expert_subjects.copy_(torch.tensor([0, 0, 0, 1, 1, 1, -1, -1, -1]))
    graft.router.expert_questions.copy_(torch.tensor([0, 2, 3, 0, 4, 5, -1, -1, -1]))
    graft.router.expert_tokens.copy_(torch.tensor([-1, -1, LAST_ROWS[0], -1, -1, LAST_ROWS[1], -1, -1, -1]))


def graft_of(model, adapter_name: str = "default") -> FactGraft:
    """The graft of an adapter."""
    (found,) = (
        module
        for name, module in model.named_modules()
        if isinstance(module, FactGraft) and name.endswith(adapter_name)
    )
    return found


def fact_model(family: str = "llama", seed: int = 0, **fields) -> PeftModel:
    """A model with a graft of facts, in evaluation."""
    model = get_peft_model(base_model_of(family, **fields), fact_config()).eval()
    with_keys(graft_of(model), model, seed)
    return model


CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<model> {% endif %}"


def words_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of a chat model, whose tokens are the words of these texts and of all that is asked beside facts."""
    texts = [*texts, *FRAMES, *BEGINNINGS, *OTHER_WORDINGS, *RELATION_WORDINGS, OTHER_RELATIONS]
    text = " ".join(texts).replace("?", " ? ").replace(".", " . ").replace(",", " , ")
    words = ["<pad>", "<eos>", "<user>", "<model>", "<unk>", *text.split()]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    signs = [pre_tokenizers.Split(sign, "isolated") for sign in "?.,"]
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *signs])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT
    return fast


def base_of(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random model for such a tokenizer."""
    size = len(tokenizer)
    return base_model_of(vocab_size=size, hidden_size=64, intermediate_size=96, bos_token_id=1, eos_token_id=1)
