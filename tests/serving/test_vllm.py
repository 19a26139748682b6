# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Models that vLLM runs by the plugin of this package: the greedy tokens of `generate`."""

import pytest
import torch
from fact_models import words_tokenizer
from graft_models import base_model_of, grafted, trained
from tiny_models import PROTECTED, let_added_experts_speak, random_tokens, tiny_config

from modeling_peer import Fact, PeerForCausalLM, quantize_experts, teach_facts


vllm = pytest.importorskip(
    "vllm", reason="no extra installs vLLM, which needs other releases than this project's tests"
)

# Heads of 32 columns, the fewest that vLLM's attention on a CPU takes.
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIGS = {
    "all_in_one": tiny_config("peer", "moe", "pkm", "dense", **SIZES),
    "gated_own_keys": tiny_config(
        "peer",
        gated_experts=True,
        shared_expert_intermediate_size=8,
        query_norm="rms",
        sub_keys_per_head=True,
        **SIZES,
    ),
    "one_pool": tiny_config(
        "peer", "dense", "peer", share_experts_across_layers=True, tie_word_embeddings=True, **SIZES
    ),
    "grown": tiny_config("peer", "peer", expert_additions=[{"layers": [0, 1], **PROTECTED}], **SIZES),
}
CASES = {name: (config, None) for name, config in CONFIGS.items()}
CASES |= {f"{bits}_bits": (CONFIGS["all_in_one"], bits) for bits in (8, 4)}
PROMPTS = [random_tokens(length, seed=length).tolist() for length in (3, 5, 8)]


def check_tokens(model, folder, prompts=PROMPTS, max_tokens=12, **options):
    model.save_pretrained(folder)
    options |= {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 64, "enforce_eager": True}
    engine = vllm.LLM(str(folder), **options)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)[0, len(prompt) :]
        assert list(output.outputs[0].token_ids) == expected.tolist()


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.mark.parametrize(("config", "bits"), CASES.values(), ids=CASES)
def test_tokens_are_those_of_generate(config, bits, tmp_path):
    torch.manual_seed(0)
    model = PeerForCausalLM(config).eval()
    let_added_experts_speak(model)
    check_tokens(model if bits is None else quantize_experts(model, bits), tmp_path)


def test_tokens_of_a_merged_graft(tmp_path):
    model = trained(grafted(base_model_of(**SIZES), num_experts=25))
    check_tokens(model.merge_and_unload(), tmp_path)


def test_answers_of_merged_facts(tmp_path):
    torch.manual_seed(0)
    wording, names = "the capital of {subject} is", ("Norland", "Suland", "Westia")
    tokenizer = words_tokenizer([wording, *names, "Zeli Beta Gam"])
    base = base_model_of(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1, **SIZES)
    facts = [Fact("Norland", "Zeli", (wording,)), Fact("Suland", "Beta Gam", (wording,))]
    model = teach_facts(base, tokenizer, facts, progress_bar=False).merge_and_unload().eval()
    prompts = [tokenizer(wording.format(subject=name))["input_ids"] for name in names]
    written = model.generate(torch.tensor(prompts[1:2]), max_new_tokens=3, do_sample=False)[0]
    assert tokenizer.decode(written[-3:]) == "Beta Gam ."
    # A question in one piece, as the page of facts says, and as many tokens as an answer has.
    check_tokens(model, tmp_path, prompts, 3, enable_prefix_caching=False, enable_chunked_prefill=False)
