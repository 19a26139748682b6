# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the suite is to catch, as a list that can be run: faults that are planted one by one in a copy of this checkout,
each with tests that have to fail then.

    ./run python tests/planted_faults.py [--only NAME ...]

Tests run in processes that are forked from one which has imported the libraries, and none of this package.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["torch._dynamo", "transformers.generation.utils", "transformers.trainer", "peft", "pytest"]
SECONDS = 300  # for the tests of a fault
# Not what a fault is caught by: it is not the code that it was meant to be.
NO_CODE = ("NameError", "SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError")
CONTEXT = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Fault:
    """
    Args:
        name (`str`)
        file (`str`): Where it is planted.
        before (`str`): What occurs once in this file.
        after (`str`): What takes its place.
        tests (`tuple[str]`): Of which at least one has to fail.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


# fmt: off
FAULTS = [
    Fault("head-lost", "modeling_peer/feed_forward.py",
          "indices, weights = router(hidden_states, padding_mask, forward_pass)",
          "indices, weights = (each[..., 1:, :] for each in router(hidden_states, padding_mask, forward_pass))",
          ("tests/model/test_feed_forward_peer.py::"
           "test_outputs_and_gradients_equal_algorithm_1[rms-softmax-own_keys]",)),
    Fault("weight-before-activation", "modeling_peer/ops/experts.py",
          "return weights * _activations(act_fn, *products) if products else weights",
          "return _activations(act_fn, *(weights * each for each in products)) if products else weights",
          ("tests/model/test_feed_forward_peer.py::"
           "test_outputs_and_gradients_equal_algorithm_1[rms-softmax-own_keys]",)),
    Fault("sub-keys-of-first-head-for-all", "modeling_peer/experts.py",
          '"thpc,hpnc->thpn", queries, sub_keys)', '"thpc,hpnc->thpn", queries, sub_keys[:1].expand_as(sub_keys))',
          ("tests/model/test_feed_forward_peer.py::"
           "test_outputs_and_gradients_equal_algorithm_1[rms-softmax-own_keys]",)),
    Fault("sub-keys-of-first-head-for-all-in-c", "modeling_peer/ops/csrc/retrieval.c",
          "packed + ((set * 2 + half) * panels + panel) * PANEL * size",
          "packed + (half * panels + panel) * PANEL * size",
          ("tests/kernels/test_product_key_retrieval_cpu.py::TestRetrieval::"
           "test_equals_the_reference[one_thread-(33, 8, 8, 100, 20, 16)]",)),
    Fault("key-grid-transposed", "modeling_peer/experts.py",
          "    return shell * shell + shell + row - column", "    return shell * shell + shell + column - row",
          ("tests/kernels/test_product_key_retrieval_cpu.py::TestRetrieval::"
           "test_equals_the_reference[one_thread-(33, 8, 8, 100, 20, 16)]",)),
    Fault("winning-pairs-one-less", "modeling_peer/experts.py",
          "for j in range(k // (i + 1))]", "for j in range((k - 1) // (i + 1))]",
          ("tests/kernels/test_product_key_retrieval.py::test_retrieval_equals_brute_force[5-3]",)),
    Fault("winning-pairs-one-less-in-c", "modeling_peer/ops/csrc/retrieval.c",
          "const int64_t single = k / 2;", "const int64_t single = (k - 1) / 2;",
          ("tests/kernels/test_product_key_retrieval_cpu.py::TestRetrieval::"
           "test_equals_the_reference[one_thread-(33, 8, 8, 100, 20, 16)]",)),
    Fault("threshold-that-one-score-less-reaches", "modeling_peer/ops/csrc/selection.h",
          "const uint32_t take_it = -(uint32_t)(reached >= k);",
          "const uint32_t take_it = -(uint32_t)(reached >= k - 1);",
          ("tests/kernels/test_product_key_retrieval_cpu.py::TestRetrieval::"
           "test_equals_the_reference[one_thread-(1, 8, 1, 256, 128, 16)]",)),
    Fault("masked-experts-retrieved", "modeling_peer/analysis/expert_mask.py",
          "all_scores.masked_fill(is_masked, -torch.inf).topk", "all_scores.topk",
          ("tests/analysis/test_expert_mask.py::TestMask::test_equals_a_search_of_all_experts",)),
    Fault("padding-in-query-norm", "modeling_peer/router.py",
          "present = padding_mask.reshape(-1, 1).bool()",
          "present = torch.ones_like(features[:, :1], dtype=torch.bool)",
          ("tests/model/test_query_norm.py::test_training_equals_torchs_batch_norm_on_the_tokens[padding]",)),
    Fault("positions-without-cache", "modeling_peer/modeling_peer.py",
          "            forward_pass=forward_pass,\n            **kwargs,",
          "            forward_pass=forward_pass,\n            **{**kwargs, \"position_ids\": None if input_ids is None else (\n"
          "                torch.arange(input_ids.shape[1])[None])},",
          ("tests/model/test_token_independence.py::"
           "test_decoding_with_a_cache_equals_the_full_forward[dynamic-peer]",)),
    Fault("capacity-of-one-expert-a-token", "modeling_peer/feed_forward.py",
          "num_tokens * self.gate.num_experts_per_tok // num_experts", "num_tokens // num_experts",
          ("tests/model/test_feed_forward_registry.py::TestMoe::"
           "test_expert_choice_trains_by_expert_and_evaluates_by_token",)),
    Fault("scores-in-bfloat16", "modeling_peer/router.py",
          "dtype = torch.promote_types(queries.dtype, torch.float32)", "dtype = queries.dtype",
          ("tests/model/test_feed_forward_peer.py::test_scores_are_computed_in_float32_whatever_the_dtype",)),
    Fault("sums-in-bfloat16", "modeling_peer/ops/kernels_torch.py",
          "sums = _accumulated(coefficients[:0]).new_zeros(", "sums = tokens.new_zeros(",
          ("tests/kernels/test_expert_kernels.py::TestImplementations::"
           "test_row_gradient[torch-1-torch.bfloat16-(33, 16, 150, 50)]",)),
    Fault("core-rounds-to-the-dtype-of-tables", "modeling_peer/experts.py",
          "factors.to(torch.promote_types(factors.dtype, table.dtype))", "factors.to(table.dtype)",
          ("tests/kernels/test_expert_operators.py::"
           "test_the_core_is_exact_for_tables_of_any_dtype[torch.bfloat16-torch.bfloat16]",)),
    Fault("later-pieces-with-rows-of-the-first", "modeling_peer/experts.py",
          "F.embedding(places, table).to(", "F.embedding(rows[: len(places)], table).to(",
          ("tests/kernels/test_expert_operators.py::"
           "test_the_core_is_exact_for_tables_of_any_dtype[torch.float32-torch.float32]",)),
    Fault("triton-never-compared", "modeling_peer/ops/kernels.py",
          'return fastest if can_run and (fastest != "triton" or is_triton_right(tensor)) else "torch"',
          'return fastest if can_run else "torch"',
          ("tests/kernels/test_triton_check.py::TestVerdict::test_of_none_while_a_graph_is_captured",)),
    Fault("one-verdict-for-all-dtypes", "modeling_peer/ops/triton_check.py",
          "gpu, str(dtype), torch.__version__", "gpu, torch.__version__",
          ("tests/kernels/test_triton_check.py::TestVerdict::test_is_kept_for_gpu_dtype_releases_and_sources",)),
    Fault("grouping-shifted", "modeling_peer/ops/kernels_torch.py",
          "F.pad(counts.cumsum(0), (1, 0)).int(), order.int()",
          "F.pad(counts.cumsum(0), (1, 0)).int(), order.roll(1).int()",
          ("tests/kernels/test_expert_operators.py::TestPools::"
           "test_gradients_are_those_of_the_literal_algorithm[torch-factored-plain]",)),
    Fault("grouping-loses-last-entry-in-c", "modeling_peer/ops/csrc/gradient.c",
          "starts[found] = count;", "starts[found] = count - 1;",
          ("tests/kernels/test_expert_operators.py::TestPools::"
           "test_gradients_are_those_of_the_literal_algorithm[cpu-factored-plain]",)),
    Fault("grouping-stale", "modeling_peer/ops/gradient_factors.py",
          "if last._joined is None or last._joined[0] != tuple(others):", "if last._joined is None:",
          ("tests/kernels/test_factored_gradient.py::TestArithmetic::test_sums",)),
    Fault("factor-scaled-twice", "modeling_peer/ops/gradient_factors.py",
          "Factors(self.coefficients * factor, self", "Factors(self.coefficients * factor * factor, self",
          ("tests/kernels/test_factored_gradient.py::TestClipping::test_by_norm[0.1-2.0-False]",)),
    Fault("factors-without-norm", "modeling_peer/ops/factored_gradient.py",
          "factors.assignments.run.squared_norm(*factors.in_groups()).sqrt()",
          "factors.assignments.run.squared_norm(*factors.in_groups()).mul(0)",
          ("tests/kernels/test_factored_gradient.py::TestClipping::test_by_norm[0.1-2.0-False]",)),
    Fault("norm-without-single-entries-in-c", "modeling_peer/ops/csrc/gradient.c",
          "if (coefficients[first] == 0) continue;", "continue;",
          ("tests/kernels/test_factored_gradient.py::test_rows_and_norms[cpu-1-torch.float32]",)),
    Fault("first-backward-alone", "modeling_peer/ops/gradient_factors.py",
          "torch.cat([each.coefficients.reshape(-1, 1) for each in several])",
          "torch.cat([each.coefficients.reshape(-1, 1) * (each is several[0]) for each in several])",
          ("tests/kernels/test_factored_gradient.py::test_accumulates_over_backwards[None-cpu]",)),
    Fault("frozen-rows-decay", "modeling_peer/optim/frozen_rows.py",
          '("momentum", "weight_decay", "maximize")', '("momentum", "maximize")',
          ("tests/optim/test_frozen_rows.py::TestRows::test_stay_and_others_move_as_by_hand[dense-SGD with decay]",)),
    Fault("bias-correction-of-all-rows", "modeling_peer/optim/row_adamw.py",
          'rate = group["lr"] / _bias_correction(beta1, steps, dtype)',
          'rate = group["lr"] / _bias_correction(beta1, steps.amax().expand_as(steps), dtype)',
          ("tests/optim/test_row_adamw.py::TestRows::test_follow_adamw_row_by_row[torch-torch.float32-dense-full-full]",)),
    Fault("bias-correction-of-first-row-in-c", "modeling_peer/ops/csrc/row_adamw.c",
          "const SUM rate = t->lr / -expm1(step * t->log_beta1)",
          "const SUM rate = t->lr / -expm1((t->row_steps[0] + 1) * t->log_beta1)",
          ("tests/optim/test_row_adamw.py::TestRows::test_follow_adamw_row_by_row[cpu-torch.float32-dense-full-full]",)),
    Fault("padding-counts-in-the-mean-of-a-bag", "modeling_peer/optim/embedding_rows.py",
          "index_add_(0, bags, coefficients)", "index_add_(0, bags, torch.ones_like(coefficients))",
          ("tests/optim/test_embedding_rows.py::test_gradients_of_bags_in_factors[matrix-2-mean]",)),
    Fault("lookups-of-the-next-bag", "modeling_peer/optim/embedding_rows.py",
          "torch.searchsorted(starts, places, right=True, out_int32=True)",
          "torch.searchsorted(starts, places + 1, right=True, out_int32=True)",
          ("tests/optim/test_embedding_rows.py::test_gradients_of_bags_in_factors[offsets-None-sum]",)),
    Fault("optimizer-state-not-resumed", "modeling_peer/optim/row_adamw.py",
          'name: value.to(parameter.device, torch.int32 if name == "row_steps" else dtype)',
          'name: torch.zeros_like(value, dtype=torch.int32 if name == "row_steps" else dtype)',
          ("tests/optim/test_row_adamw.py::TestState::test_goes_on_to_the_bit[file-torch.float32-full]",)),
    Fault("rounding-without-seed", "modeling_peer/ops/csrc/row_adamw.c",
          "mix(seed + (uint32_t)row * 0x9e3779b1u)", "mix((uint32_t)row * 0x9e3779b1u)",
          ("tests/optim/test_stochastic_rounding.py::TestSeed::test_decides[cpu]",)),
    Fault("rounding-alike-in-all-rows", "modeling_peer/optim/stochastic_rounding.py",
          "_mix(seed + rows.long() * 0x9E3779B1)", "_mix(seed + rows.long() * 0)",
          ("tests/optim/test_stochastic_rounding.py::TestBits::test_are_a_hash_of_seed_row_step_and_column",)),
    Fault("scale-of-next-row", "modeling_peer/ops/quantized_rows.py",
          "scales=self.scales[indices])", "scales=self.scales[(indices + 1) % len(self.scales)])",
          ("tests/kernels/test_quantized_kernels.py::test_implementations[torch-1-8-None-(33, 16, 150, 50)]",)),
    Fault("nibbles-swapped", "modeling_peer/ops/quantized_rows.py",
          "integers.copy_((lower & 15) | (upper << 4))", "integers.copy_((upper & 15) | (lower << 4))",
          ("tests/kernels/test_quantized_rows.py::test_how_close_normal_rows_are[4-64-0.1-torch.float32]",)),
    Fault("integers-by-the-unrounded-scale", "modeling_peer/ops/quantized_rows.py",
          "by = scales.float()[..., None]", "by = (farthest / lowest)[..., None]",
          ("tests/kernels/test_quantized_rows.py::test_an_element_has_the_nearest_integer[8--128]",)),
    Fault("dequantized-in-float32", "modeling_peer/quantization/table.py",
          "dequantize(module._all_rows(), dtype)", "dequantize(module._all_rows())",
          ("tests/model/test_quantization.py::TestLoading::test_dequantized_in_the_dtype_of_the_model",)),
    Fault("part-of-a-row-counts-as-cached", "modeling_peer/ops/csrc/disk_rows.c",
          "RWF_NOWAIT) != row_bytes", "RWF_NOWAIT) <= 0",
          ("tests/model/test_disk_tables.py::test_a_row_of_which_a_part_was_read_is_missing",)),
    Fault("last-part-of-a-piece-from-a-disk-lost", "modeling_peer/ops/disk_tables.py",
          "range(0, max(len(rows), 1), step)", "range(0, max(len(rows) - step + 1, 1), step)",
          ("tests/model/test_disk_tables.py::test_pieces_have_all_tokens",)),
    Fault("tokens-permuted-on-uneven-ranks", "modeling_peer/parallel/token_exchange.py",
          "return sums[: self.num_tokens]", "return sums[self.most_tokens - self.num_tokens :]",
          ("tests/distributed/test_token_exchange.py::test_two_processes_with_different_numbers_of_tokens",)),
    Fault("gate-ignored", "modeling_peer/router.py",
          "weights * self.gate(hidden_states)[..., None]", "weights",
          ("tests/continual/test_gate_fitting.py::test_experts_behind_a_shut_gate_are_not_used",)),
    Fault("held-out-tokens-fitted", "modeling_peer/continual/gate_fitting.py",
          "[torch.cat([each for i, each in enumerate(text[index]) if i % 10]) for", "[torch.cat(text[index]) for",
          ("tests/continual/test_gate_fitting.py::test_what_is_held_out_has_no_part_in_the_fit",)),
    Fault("reference-counts-by-its-end", "modeling_peer/continual/gate_fitting.py",
          "[each.max() for each in reference[label]]", "[each[-1] for each in reference[label]]",
          ("tests/continual/test_gate_fitting.py::"
           "test_a_threshold_of_questions_counts_every_token_of_the_reference",)),
    Fault("added-experts-off-by-one", "modeling_peer/experts.py",
          "rows = indices - self.first_expert if self.first_expert else indices",
          "rows = (indices - self.first_expert - 1).clamp(min=0) if self.first_expert else indices",
          ("tests/continual/test_growth.py::TestProtected::test_adds_what_the_new_experts_say",)),
    Fault("opens-behind-answers", "modeling_peer/facts/states.py",
          "work += self._go_on(batch_size, progress_bar)", "work += []",
          ("tests/facts/test_teaching.py::test_behind_an_answer_nothing_must_open",)),
    Fault("opens-within-answers", "modeling_peer/facts/states.py",
          "questions[start + 1 :]", "questions[len(tokens) :]",
          ("tests/facts/test_teaching.py::test_within_answers_to_other_questions_nothing_must_open",)),
    Fault("leaves-wordings-unread", "modeling_peer/facts/index.py",
          "max(PROMPTS_PER_RELATION, 2 * len(fact.wordings))", "PROMPTS_PER_RELATION",
          ("tests/facts/test_teaching.py::test_facts_of_a_relation_are_read_in_all_wordings",)),
    Fault("first-mention-answers", "modeling_peer/fact_graft.py",
          "torch.where(similarities == best, mentions, -2).argmax(-1)", "(similarities == best).int().argmax(-1)",
          ("tests/facts/test_fact_graft.py::TestGate::test_is_the_literal_one",)),
    Fault("other-relation-answers", "modeling_peer/fact_graft.py",
          "best.masked_fill(best < nearest, -2.0)", "best",
          ("tests/facts/test_fact_graft.py::TestGate::test_is_the_literal_one",)),
    Fault("subjects-of-the-sequence-before", "modeling_peer/fact_graft.py",
          "torch.where(mentions >= starts[..., None], mentions, -1)", "mentions",
          ("tests/facts/test_fact_graft.py::TestGate::test_of_sequences_in_one_row",)),
    Fault("names-across-sequences", "modeling_peer/fact_graft.py",
          " & (places[: 1 - length or None] >= starts[:, length - 1 :])", "",
          ("tests/facts/test_fact_graft.py::TestGate::test_of_sequences_in_one_row",)),
    Fault("subjects-not-in-the-cache", "modeling_peer/graft_layer.py",
          "for keep in self.to_keep if cache is not None else []:", "for keep in []:",
          ("tests/facts/test_fact_graft.py::TestCache::test_token_by_token_as_in_one_pass[True-llama]",)),
    Fault("removed-subject-stays", "modeling_peer/fact_graft.py",
          "self.names[torch.isin(self.subjects, subjects)] = -1", "pass",
          ("tests/facts/test_fact_graft.py::TestRemoval::test_of_one_fact_leaves_the_others_to_the_bit",)),
    Fault("neurons-without-gain", "modeling_peer/graft/initialization.py",
          "outgoing * math.sqrt(num_active / router_weight_power(graft.config))", "outgoing",
          ("tests/graft/test_graft_start.py::TestNeurons::test_are_experts[llama-as_they_are]",)),
    Fault("gate-of-a-graft-is-trained", "modeling_peer/graft/model.py",
          ' and ".gate." not in path', "",
          ("tests/graft/test_graft_gates.py::test_decides_which_tokens_the_graft_changes",)),
    Fault("gate-of-a-graft-is-not-merged", "modeling_peer/graft_merged.py",
          "isinstance(graft.router, AddedRouter)}", "False}",
          ("tests/graft/test_graft_gates.py::test_is_saved_and_merged_with_the_graft",)),
    Fault("attention-flops-of-scores-alone", "modeling_peer/analysis/costs.py",
          "PartCosts(flops=4 * sequence_length * query_size)", "PartCosts(flops=2 * sequence_length * query_size)",
          ("tests/analysis/test_costs.py::TestFlops::test_equal_those_that_torch_counts[peer]",)),
    Fault("logged-usage-of-the-largest-layer", "modeling_peer/analysis/expert_usage.py",
          "fmean(each[name] for each in measures.values())", "max(each[name] for each in measures.values())",
          ("tests/analysis/test_expert_usage.py::TestCallback::test_logs_equal_a_meter_fed_by_hand",)),
    Fault("explained-weight-of-one-head", "modeling_peer/analysis/token_explanation.py",
          "torch.zeros(len(experts)).index_add_(0, places.flatten(), each[token].flatten())",
          "torch.zeros(len(experts)).index_copy_(0, places.flatten(), each[token].flatten())",
          ("tests/analysis/test_token_explanation.py::test_experts_of_several_heads_are_named_once",)),
    Fault("explained-coefficient-without-weight", "modeling_peer/analysis/token_explanation.py",
          "coefficients = weights * pool.act_fn(neurons)", "coefficients = pool.act_fn(neurons)",
          ("tests/analysis/test_token_explanation.py::"
           "test_coefficients_times_down_projections_are_what_layers_return[peer]",)),
    Fault("pkm-toy-of-fewer-flops", "configuration/pkm-toy/config.json",
          '"num_experts_per_head": 64',
          '"num_experts_per_head": 32',
          ("tests/model/test_configuration.py::test_pkm_toy_costs_what_peer_toy_does",)),
    Fault("contexts-counted-once-too-often", "examples/explorer/contexts.py",
          "is_own = torch.arange(number) < counts[:, None]", "is_own = torch.arange(number) <= counts[:, None]",
          ("tests/explorer/test_findings.py::test_contexts_are_those_of_largest_weight",)),
    Fault("neighbors-of-added-experts-without-offset", "examples/explorer/findings.py",
          "_rounded(int(index) + router.generation.first_expert, cosine.item())",
          "_rounded(int(index), cosine.item())",
          ("tests/explorer/test_findings.py::test_neighbors_have_the_most_similar_keys",)),
]
# fmt: on


class Recorder:
    """Plugin of pytest that notes how tests fail. What fails before or after a test itself does not count."""

    def __init__(self):
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.when == "call":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures.append(" ".join((crash.message if crash else str(report.longrepr)).split())[:200])


def run_tests(folder: Path, tests: list[str], log: Path) -> tuple[str, str, float]:
    """What came of tests: `"passed"`, `"failed"` or what went wrong; of a failure the message; and seconds."""
    start = time.monotonic()
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(folder, tests, log, sender))
    process.start()
    sender.close()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"killed after {SECONDS} s", "", time.monotonic() - start
    try:
        code, failures = receiver.recv()
    except EOFError:
        return f"process ended with {process.exitcode}", "", time.monotonic() - start
    if any(each.startswith(NO_CODE) for each in failures) or "could not be compiled" in log.read_text(
        errors="replace"
    ):
        outcome = "not the code it was meant to be"
    elif code == 1:
        outcome = "failed" if failures else "error around the test"
    else:
        outcome = "passed" if code == 0 else f"exit code {code} of pytest"
    return outcome, failures[0] if failures else "", time.monotonic() - start


def _work(folder, tests, log, sender):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{path}" if path else str(folder)
    here = (ROOT, ROOT / "tests")
    sys.path[:] = [str(folder), *(each for each in sys.path if Path(each or ".").resolve() not in here)]
    assert "modeling_peer" not in sys.modules
    import pytest

    recorder = Recorder()
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "--tb=short"]
    code = int(pytest.main([*options, *tests], plugins=[recorder]))
    package = sys.modules.get("modeling_peer")
    assert package is None or Path(package.__file__).is_relative_to(folder), package
    sender.send((code, recorder.failures))


def copy_checkout(folder: Path) -> None:
    """Copies the files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def plant(fault: Fault, folder: Path, log: Path) -> tuple[str, str, float]:
    """[`run_tests`] with a fault in a copy of the checkout, which afterward is as it was."""
    file = folder / fault.file
    log.write_text("")
    if not file.is_file():
        return "no such file", "", 0.0
    text = file.read_text()
    if text.count(fault.before) != 1:
        return f"the text occurs {text.count(fault.before)} times", "", 0.0
    file.write_text(text.replace(fault.before, fault.after))
    try:
        return run_tests(folder, [*fault.tests], log)
    finally:
        file.write_text(text)


def end_of(log: Path) -> str:
    return "".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-25:])


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants faults in a copy of this checkout, which tests are to catch.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    only = parser.parse_args().only
    faults = [fault for fault in FAULTS if not only or fault.name in only]
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as temporary:
        folder, log = Path(temporary).resolve() / "checkout", Path(temporary) / "log"
        # C with faults is compiled into a cache that goes.
        os.environ |= {"HF_HOME": f"{temporary}/cache", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        # The bytecode of a file tells apart neither changes within a second nor those that keep its size.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        copy_checkout(folder)
        for library in LIBRARIES:
            __import__(library)
        tests = [*dict.fromkeys(test for fault in faults for test in fault.tests)]
        outcome, _, seconds = run_tests(folder, tests, log)
        print(f"Without a fault, {len(tests)} tests: {outcome}, {seconds:.1f} s", flush=True)
        if outcome != "passed":
            print(end_of(log))
            return 1
        rows = []
        for number, fault in enumerate(faults, start=1):
            outcome, message, seconds = plant(fault, folder, log)
            said = {"failed": "caught", "passed": "MISSED"}.get(outcome, f"BROKEN ({outcome})")
            print(f"[{number}/{len(faults)}] {said}  {fault.name}  {seconds:.1f} s", flush=True)
            if said != "caught":
                print(end_of(log), flush=True)
            rows.append((fault.name, said, f"{seconds:.1f} s", message))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, said, seconds, message in rows:
        print(f"{name:{widths[0]}}  {said:{widths[1]}}  {seconds:>{widths[2]}}  {message[:60]}")
    caught = sum(said == "caught" for _, said, *_ in rows)
    print(f"{caught} of {len(rows)} faults are caught.")
    return caught < len(rows)


if __name__ == "__main__":
    sys.exit(main())
