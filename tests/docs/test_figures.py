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
"""The figures of the pages are those of the package, the benchmark and the quickstart; studies hold their own tables."""

import json
import re
from statistics import mean

import pytest
from documentation import ROOT

from benchmark.report import Results
from modeling_peer import PeerConfig, configuration_path, list_configurations, model_costs
from studies.common.training_plan import budget_name, costs_of
from studies.recipe.plan import runs_by_size, tuning_runs
from studies.recipe.report import is_adopted
from studies.recipe.results import read_results as read_recipe
from studies.recipe.variants import register_variants
from studies.scaling.report import read_results, table_of_perplexities, table_of_seconds


def page(name):
    return (ROOT / name).read_text()


def benchmark_results():
    return Results(json.loads(page("examples/benchmark/results.json")))


def named_costs(name, **options):
    return model_costs(PeerConfig.from_pretrained(configuration_path(name)), **options)


LAYER = {"num_experts": 1024**2, "hidden_size": 512}


class TestQuickstart:
    def test_perplexities(self):
        results = json.loads(page("docs/images/quickstart.json"))
        for result in (results["peer-toy"], results["dense-toy"]):
            figures = rf"{result['perplexity_before']:.1f}\s+to\s+{result['perplexity_after']:.1f}"
            assert re.search(figures, page("docs/training.md")), figures

    def test_equal_seconds(self):
        results = json.loads(page("docs/images/quickstart.json"))
        peer, dense = results["peer-toy"], results["dense-toy"]
        seconds = dense["seconds_per_step"] * max(map(int, dense["eval_losses"]))
        step = peer["steps_at_equal_seconds"]
        assert seconds == pytest.approx(peer["seconds_per_step"] * step, rel=0.03)
        figures = f"at step {step} and at {peer['perplexity_at_equal_seconds']:.1f}."
        assert figures in " ".join(page("docs/training.md").split())
        perplexities = (peer["perplexity_after"], peer["perplexity_at_equal_seconds"])
        assert all(perplexity < dense["perplexity_after"] for perplexity in perplexities)  # as the README says
        below = [f"{1 - perplexity / dense['perplexity_after']:.1%}".replace("%", " %") for perplexity in perplexities]
        said = f"{below[0]} below its twin in perplexity after as many steps, and {below[1]} after as many seconds"
        assert said in " ".join(page("README.md").split())

    def test_flops(self):
        """At the full context length, which the page names."""
        results = json.loads(page("docs/images/quickstart.json"))
        assert set(results) == {"peer-toy", "dense-toy"}
        for name, result in results.items():
            costs = named_costs(name)
            assert (result["flops_per_token"], result["sequence_length"]) == (costs.flops, costs.sequence_length)
            assert costs.sequence_length == 512
        peer, dense = (f"{results[name]['flops_per_token'] / 1e6:.2f}" for name in ("peer-toy", "dense-toy"))
        figures = (
            f"{peer} MFLOPs per token for `peer-toy` and {dense} for its twin, counted in sequences of 512 tokens"
        )
        assert figures in " ".join(page("docs/training.md").split())
        assert re.findall(r"[\d.]+ MFLOPs", page("docs/training.md")) == [f"{peer} MFLOPs"]


def test_the_table_of_configurations():
    text = page("docs/layer-and-options.md")
    rows = re.findall(
        r"^\| `(\w+-\w+)` \| ([\d.,]+) \| ([\d.,]+) M \| ([\d.,]+) M \| ([\d.]+) GB \|$", text, flags=re.M
    )
    assert sorted(name for name, *_ in rows) == list_configurations()
    for name, *figures in rows:
        costs = named_costs(name)
        parameters = (f"{number / 1e6:,.1f}" for number in (costs.parameters, costs.active_parameters))
        assert figures == [f"{costs.flops / 1e6:.2f}", *parameters, f"{costs.training_bytes / 1e9:.2f}"]
        assert costs.sequence_length == {"laptop": 1024, "gpu": 2048, "paper": 2048}.get(name.split("-")[1], 512)
    lengths = "512 tokens for `toy`, `nano` and `tiny`, 1,024 for `laptop`, 2,048 for `gpu` and `paper`"
    assert lengths in " ".join(text.split())


def test_what_a_first_training_leads_to():
    quickstart = json.loads(page("docs/images/quickstart.json"))
    nano = {
        name: json.loads(page(f"examples/checkpoints/{name}/results.json")) for name in ("peer-nano", "dense-nano")
    }
    found = [f"`{name}` {result['perplexity']['16 bits']:.1f}" for name, result in nano.items()]
    found += [f"`{name}` {quickstart[name]['perplexity_after']:.1f}" for name in ("peer-toy", "dense-toy")]
    steps = max(map(int, quickstart["dense-toy"]["eval_losses"]))
    said = (
        f"{found[0]} and {found[1]} after {nano['peer-nano']['tokens'] / 1e6:.1f} million tokens, {found[2]} and "
        f"{found[3]} after the {steps * 1024 / 1e6:.1f} million of"
    )
    assert said in " ".join(page("docs/layer-and-options.md").split())


def test_what_a_step_of_the_laptop_takes():
    results = json.loads(page("docs/images/laptop-steps.json"))
    dense, peer = (mean(run["train_runtime"] for run in runs) / 40 for runs in results["train_results"].values())
    assert all(f"--config_name {name} " in command for name, command in results["commands"].items())
    assert all("--max_steps 40 " in command for command in results["commands"].values())
    runs = [run for runs in results["train_results"].values() for run in runs]
    length = {named_costs(name).sequence_length for name in results["commands"]}
    samples = {round(run["train_samples_per_second"] / run["train_steps_per_second"]) for run in runs}
    assert (length, samples, results["machine"]["cores"]) == ({1024}, {8192 // 1024}, 2)
    text = " ".join(page("docs/layer-and-options.md").split())
    assert (
        f"a step of 8,192 tokens takes {peer:.1f} s with `peer-laptop` and {dense:.1f} s with `dense-laptop`" in text
    )
    tokens = (f"{36_000 / seconds * 8192 / 1e6:.0f}" for seconds in (peer, dense))
    assert "so that a night of ten hours has {} and {} million tokens.".format(*tokens) in text
    said = f"a step of `peer-laptop` takes {peer / dense:.2f} times as long as one of `dense-laptop`"
    assert said in " ".join(page("docs/choosing-sizes-and-rates.md").split())


def test_the_small_checkpoints():
    text = " ".join(page("docs/checkpoints.md").split())
    peer, dense = (
        json.loads(page(f"examples/checkpoints/{name}/results.json")) for name in ("peer-nano", "dense-nano")
    )
    assert peer["tokens"] == dense["tokens"]
    assert f"read {peer['tokens'] / 1e6:.1f} million tokens" in text
    for name, result in (("peer-nano", peer), ("dense-nano", dense)):
        costs = named_costs(name)
        sizes = (f"{number / 1e6:.1f} M" for number in (costs.parameters, costs.active_parameters))
        assert " | ".join((f"| `{name}`", *sizes, f"{result['perplexity']['16 bits']:.2f} |")) in text
    whole, eight, four = (peer["perplexity"][f"{bits} bits"] for bits in (16, 8, 4))
    said = [f"{each:.2f} ({each / whole - 1:+.3%})".replace("%", " %") for each in (eight, four)]
    assert f"is {whole:.2f} in bf16, {said[0]} with tables in 8 bits and {said[1]} in 4 bits" in text


class TestBenchmark:
    def test_the_table_of_times(self):
        results = benchmark_results()
        contenders = ("peer", "peer_pytorch", "peer_eager", "pkm_embedding_bag", "dense", "dense_gated")
        for label, section, operation in (
            ("forward", "forward", "forward"),
            ("forward and backward", "training", "forward_backward"),
            ("training step", "training", "step"),
        ):
            fields = {"operation": operation, **LAYER}
            seconds = [results.value(section, "seconds", contender=name, **fields) for name in contenders]
            (ours,) = results.records(section, contender="peer", **fields)
            times = (*seconds, results.floor(section, ours))
            cells = ["not measured" if time is None else f"{time * 1e3:,.0f} ms" for time in times]
            assert f"| {label} | {' | '.join(cells)} |" in page("docs/performance.md")
            if operation == "forward":
                row = f"{cells[0]}; PEER-pytorch {cells[1]}, a dense layer 4 d wide {cells[4]}"
                assert row in page("README.md")

    def test_memory(self):
        results, text = benchmark_results(), " ".join(page("docs/performance.md").split())
        ours, theirs = (
            results.value("training", "peak_bytes", contender=name, operation="forward_backward", **LAYER)
            for name in ("peer", "peer_pytorch")
        )
        assert f"take {ours / 1e9:.2f} GB, those of PEER-pytorch {theirs / 1e9:.2f} GB" in text
        full, row = (
            results.value("training", "state_bytes", contender="peer", operation=operation, **LAYER)
            for operation in ("step", "step_row_moment")
        )
        assert f"{full / 1e9:.1f} GB in float32 and {row / 1e9:.1f} GB with" in text

    def test_repeated_experts(self):
        results, text = benchmark_results(), page("docs/performance.md")
        fields = {"contender": "expert_part", "operation": "forward", "dtype": "float32"}
        for indices in ("trained", "uniform"):
            rows, seconds = (
                results.value("experts", name, indices=indices, **fields) for name in ("unique_rows", "seconds")
            )
            assert f"{rows:,}" in text and f"{seconds * 1e3:.1f} ms" in text

    def test_quantized_tables(self):
        results, text = benchmark_results(), " ".join(page("docs/performance.md").split())

        def ratio(ours, theirs, **fields):
            times = (results.value("quantized", "seconds", **fields, **each) for each in (ours, theirs))
            return next(times) / next(times)

        forward = {"operation": "forward", "num_tokens": 1024}
        experts, tokens = (
            {bits: ratio({"contender": f"{name}_int{bits}"}, {"contender": name}, **fields) for bits in (8, 4)}
            for name, fields in (("expert_part", forward), ("peer-mid", {}))
        )
        reads = {"contender": "machine", "operation": "row_read_select"}
        bare = ratio({"dtype": "int8"}, {"dtype": "bfloat16"}, **reads)
        assert f"take {experts[4]:.2f} times the time of bf16 in 4 bits and {experts[8]:.2f} times in 8 bits" in text
        assert f"by torch, take {bare:.2f} times in 8 bits" in text
        assert f"takes {tokens[8]:.2f} times the time in 8 bits and {tokens[4]:.2f} times in 4 bits" in text

    def test_times_of_a_token(self):
        results, text = benchmark_results(), " ".join(page("docs/serving.md").split())
        small, large = (
            [results.value("decode", "seconds", contender=f"{name}-{size}") * 1e3 for name in ("peer", "dense")]
            for size in ("tiny", "mid")
        )
        assert f"`peer-tiny` takes {small[0]:.2f} ms per token and `dense-tiny` {small[1]:.2f} ms" in text
        assert f"take {large[0]:.1f} ms and {large[1]:.1f} ms" in text


def test_vllm():
    results, text = json.loads(page("examples/compare_vllm.json")), " ".join(page("docs/serving.md").split())
    assert results["equal_prompts"] == {"eager": "8 of 8", "compiled": "8 of 8"}
    speeds = results["tokens_per_second"]
    eager, compiled = (speeds[mode] / speeds["generate"] for mode in ("eager", "compiled"))
    assert f"at {eager:.1f} times the tokens per second of `generate` eager, at {compiled:.1f} times compiled" in text


class TestScaling:
    """The headline of the README is the study's."""

    def row(self, table, start):
        (row,) = [line for line in table.splitlines() if re.match(start, line)]
        return [cell.strip() for cell in row.strip("|").split("|")]

    def results(self):
        return read_results(ROOT / "examples/studies/scaling/results.json")

    def test_equal_compute(self):
        results = self.results()
        table = table_of_perplexities(results, results.plan.budgets[-1])
        peer, dense = self.row(table, r"\| PEER "), self.row(table, r"\| dense ")
        assert f"PEER {peer[-2]}, dense {dense[-2]}" in page("README.md")
        mean, deviation = re.findall(r"[\d.]+", peer[-1])
        below = f"{mean} ± {deviation} % below dense at equal FLOPs (2e13"
        assert below in " ".join(page("README.md").split())

    def test_equal_time(self):
        lines = [line for line in table_of_seconds(self.results()).splitlines() if line.startswith("| PEER")]
        worse = [re.search(r"-([\d.]+)% ± ", line)[1] for line in lines]
        assert f"at equal seconds on two cores it is {worse[0]} to {worse[1]} % worse than dense" in " ".join(
            page("README.md").split()
        )

    def test_query_norms(self):
        study = page("examples/studies/scaling/README.md")
        rows = re.findall(
            r"^\| `?\"?(None|batch|rms)\"?`? \| ([\d,]+) \| ([\d.]+ ± [\d.]+) \| ([\d.]+) % \|$",
            page("docs/choosing-sizes-and-rates.md"),
            flags=re.M,
        )
        assert len(rows) == 5
        for norm, number, perplexity, usage in rows:
            label = "none" if norm == "None" else norm
            assert re.search(rf"^\| {label} +\| {number} .*\| +{perplexity} \| +{usage} \|", study, flags=re.M)


@pytest.mark.parametrize("budget", [2e13, 1e14])
def test_how_far_the_recipe_is_below_dense(budget):
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    compared = results.compared(budget)
    section = page("docs/quality.md").partition("## By the recipe")[2].partition("\n## ")[0]
    table = section.partition(f"| {budget_name(budget)} FLOPs |")[2].partition("\n\n")[0]
    rows = [[each.strip() for each in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    rows = {cells[0]: cells[1:] for cells in rows}
    assert rows.keys() == compared.keys()
    for variant, runs in compared.items():
        costs = costs_of(runs[0], results.plan)
        assert rows[variant] == [
            str(len(runs)),
            str(runs[0].hidden_size),
            f"{costs.parameters / 1e6:.1f}",
            f"{costs.active_parameters / 1e6:.1f}",
            f"{results.corpus_perplexity(runs):.2f}",
            f"{results.perplexity(runs):.2f}",
            "" if variant == "dense" else str(results.below(runs, compared["dense"])),
            "" if variant == "recipe" else str(results.below(compared["recipe"], runs)),
        ]


def test_what_the_readme_says_of_the_recipe():
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    readme, quality = (" ".join(page(name).split()) for name in ("README.md", "docs/quality.md"))
    small, large = (results.compared(budget) for budget in results.plan.budgets)
    share, low, high = in_percent(results.below(small["recipe"], small["dense"]))
    assert f"perplexity is [{share} %](docs/quality.md#by-the-recipe) below dense at equal FLOPs (2e13, " in readme
    assert f"with an interval from {low} to {high} %" in readme
    share, low, high = in_percent(results.below(large["recipe"], large["dense"]))
    assert f"it is {share} % below dense ({low} to {high} %)" in readme
    alike = ([run for run in large[variant] if run.seed != 4] for variant in ("recipe", "dense"))
    share, low, high = in_percent(results.below(*alike))
    assert f"or {share} % ({low} to {high} %) without the one dense model of five" in readme
    assert (
        f"with the other four seeds, chosen in view of the results, the recipe is {share} % below dense ({low} to {high} %)"
        in quality
    )
    for budget, compared in zip(("2e13", "1e14"), (small, large), strict=True):
        own, dense = (f"{results.perplexity(compared[variant]):.2f}" for variant in ("recipe", "dense"))
        row = f"| [perplexity at {budget} FLOPs](docs/quality.md#by-the-recipe), five seeds | PEER in every block {own}, "
        assert f"{row}dense {dense}" in readme
    assert f"memory in every block {results.perplexity(small['pkm']):.2f} |" in readme


def test_what_the_readme_says_of_the_recipe_at_equal_seconds():
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    readme, quality = (" ".join(page(name).split()) for name in ("README.md", "docs/quality.md"))
    compared = results.compared_at_equal_seconds()
    own, dense = compared["recipe"], compared["dense"]
    found = across_zero(results.below(own, dense))
    alike = across_zero(results.below(*([run for run in runs if run.seed != 4] for runs in (own, dense))))
    assert f"There the recipe is {found[0]} below dense {found[1]}, or {alike[0]} {alike[1]} without that" in readme
    least = min(results.below([run], [other]).share for run, other in zip(own, dense, strict=True))
    assert least > 0 and f"ahead with each of five seeds, by {least:.1%} at least".replace("%", " %") in readme
    assert f"ahead with each seed, by {least:.1%} at least,".replace("%", " %") in quality
    assert f"it is {alike[0]} below dense {alike[1]}." in quality
    perplexities = [f"{results.perplexity(runs):.2f}" for runs in (own, dense)]
    seconds = f"{results.step_seconds(dense[0]) * dense[0].steps:.0f}"
    assert f"[perplexity after {seconds} seconds]" in readme
    assert "five seeds | PEER in every block {}, dense {}; the interval".format(*perplexities) in readme
    for runs, below in ((dense, ""), (own, str(results.below(own, dense)))):
        step = results.step_seconds(runs[0])
        cells = [runs[0].variant, len(runs), runs[0].hidden_size, f"{runs[0].steps:,}", f"{1e3 * step:.1f}"]
        cells += [f"{step * runs[0].steps:.0f}", f"{results.corpus_perplexity(runs):.2f}"]
        assert (
            f"| {' | '.join(map(str, cells))} | {results.perplexity(runs):.2f} |{below and f' {below}'} |" in quality
        )
    narrow, wide = (
        results.step_seconds(run) / results.step_seconds(other)
        for other, run in zip(*results.compared_at_widths().values(), strict=True)
    )
    above = -results.below([results.runs_of_timed_trials()[0]], [results.dense_of_seconds()]).share
    assert (
        f"its steps take {narrow:.2f} times as long as those of dense, one run is {above:.1%}".replace("%", " %")
        in quality
    )
    assert f"with d = 128 they take {wide:.2f} times as long." in quality


def test_what_more_experts_and_larger_dense_models_are_worth():
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    choosing, quality = (" ".join(page(f"docs/{name}.md").split()) for name in ("choosing-sizes-and-rates", "quality"))
    runs = {f"{number:,}": own for number, own in results.by_num_experts().items()}
    perplexities = [f"{results.perplexity(own):.2f}" for own in runs.values()]
    assert f"With {', '.join([*runs][:-1])} and {[*runs][-1]} experts in each block, the recipe comes to" in quality
    assert f"comes to {', '.join(perplexities[:-1])} and {perplexities[-1]}, in one run of each for as many" in quality
    said = [f"{perplexity} with {number}" for number, perplexity in zip(runs, perplexities, strict=True)]
    tokens = next(iter(runs.values()))[0].steps * results.plan.tokens_of_step
    text = (
        f"after {tokens / 1e6:.1f} M tokens is {said[0]} experts in each, {said[1]}, {said[2]} and {said[3]}, in one"
    )
    assert text in choosing
    of_seeds = [results.perplexity([run]) for run in results.compared(results.plan.budgets[0])["recipe"]]
    apart = (
        f"eeds are up to {100 * (max(of_seeds) / min(of_seeds) - 1):.1f} % apart, and five of 16,384 experts come to"
    )
    own = f"{results.perplexity(results.compared(results.plan.budgets[0])['recipe']):.2f}"
    assert f"S{apart} {own} in the mean." in choosing and f"s{apart} {own} in the mean." in quality
    flops = [results.runs[own[0].name]["training_flops"] for own in runs.values()]
    assert f"and for {flops[-1] / flops[0] - 1:.0%} more FLOPs".replace("%", " %") in choosing
    recipe, dense = results.dense_sizes()
    largest = dense[-1]
    size, flops = (
        results.runs[largest.name][field] / results.runs[recipe.name][field]
        for field in ("active_parameters", "training_flops")
    )
    assert min(results.below([recipe], [run]).share for run in dense) == results.below([recipe], [largest]).share
    share = f"{100 * results.below([recipe], [largest]).share:.1f} %"
    assert (
        f"the recipe is below dense models of four sizes, {share} below the largest, which has {size:.1f}" in quality
    )
    assert f"{size:.1f} times its active parameters and takes {flops:.1f} times its FLOPs;" in quality


def test_what_a_width_is_worth():
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    text = " ".join(page("docs/choosing-sizes-and-rates.md").partition("## Width")[2].partition("## ")[0].split())
    widths = results.compared_at_widths()
    narrow, wide = (
        f"{results.step_seconds(run) / results.step_seconds(dense):.2f} times"
        for dense, run in zip(widths["dense"], widths["recipe"], strict=True)
    )
    assert f"takes {narrow} as long as one of a dense model of its width at d = 80, {wide} at d = 128," in text
    few, many = (f"{results.corpus_perplexity([run]):.2f}" for run in widths["recipe"])
    dense = results.dense_of_seconds()
    seconds = f"{results.step_seconds(dense) * dense.steps:.0f} seconds"
    assert f"For {seconds} and in one run of each, d = 80 comes to {few} on" in text and f"d = 128 to {many}." in text
    sizes = runs_by_size(results.plan, results.best, results.plan.budgets[-1])["recipe"]
    perplexities = [results.corpus_perplexity([run]) for run in sizes]
    said = "d = 80, 96 and 128 are {:.1f} % apart: {:.2f}, {:.2f} and {:.2f}."
    apart = 100 * (max(perplexities) / min(perplexities) - 1)
    assert said.format(apart, *perplexities) in text


def across_zero(difference):
    return f"{100 * difference.share:.1f} %", f"({100 * difference.low:.1f} to {100 * difference.high:+.1f} %)"


def in_percent(difference):
    return [f"{100 * value:.1f}" for value in (difference.share, difference.low, difference.high)]


def test_learning_rates_of_a_wider_model():
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    table = page("docs/choosing-sizes-and-rates.md").partition("| learning rate |")[2].partition("\n\n")[0]
    rates, _, *rows = (line.strip().strip("|").split("|") for line in table.splitlines())
    for row, (variant, runs) in zip(rows, results.compared_rates().items(), strict=True):
        assert row[0].strip() == f"{variant}, {runs[0].steps:,} steps" and {run.hidden_size for run in runs} == {128}
        said = {rate.strip(): cell.strip() for rate, cell in zip(rates, row[1:], strict=True) if cell.strip()}
        assert said == {
            f"{run.learning_rate:.2g}": f"{results.corpus_perplexity([run]):.2f}"
            for run in sorted(runs, key=lambda run: run.learning_rate)
        }


def test_what_each_part_of_the_recipe_is_worth():
    """By the second design of the recipe study, whose factors the page names in its own words."""
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    design = results.plan.designs[1]
    table = page("docs/choosing-sizes-and-rates.md").partition("## Layers, heads")[2].partition("## Number")[0]
    rows = re.findall(r"^\| (.+) \| (.+%\)) \| (yes|no) \|$", table, re.M)
    named = {
        "last two blocks": "PEER in the last two blocks too",
        "first block": "PEER in the first block too",
        "own sub-keys": "sub-keys of its own for each head (`sub_keys_per_head`)",
        "half the query": "queries of d / 4 columns",
        "one rate for u": "one learning rate for u_i and all other parameters",
        "half the experts": "half of k",
    }
    effects = {name: effect for name, effect in results.effects(design).items() if name in design["factors"]}
    assert sorted(rows) == sorted(
        (named[name], str(effect), "yes" if is_adopted(effect, design["bar"]) else "no")
        for name, effect in effects.items()
    )


def test_what_changes_of_peer_are_worth():
    """Of the first design of the recipe study, whose factors the page has in this order."""
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    effects = results.effects(results.plan.designs[0])
    text = " ".join(page("docs/choosing-sizes-and-rates.md").partition("## Other options")[2].split())
    assert {f"{effect.error:.1%}" for effect in effects.values()} == {"0.7%"} and "standard errors of 0.7 %" in text
    share = {name: f"{abs(100 * effect.share):.1f} %" for name, effect in effects.items()}
    worse, within = text.partition("**Within")[::2]
    assert [name for name, effect in effects.items() if effect.high < 0] == ["dense branch", "narrow rows"]
    assert f"by {share['dense branch']}, experts of half the width with twice k by {share['narrow rows']}." in worse
    assert f"are {share['two heads']} better, twice k is {share['twice the experts']} better" in within
    assert share["gated experts"] == share["falling rate of v"] and f"are {share['gated experts']} worse" in within
    assert f"second is {share['third block']} worse" in within
    apart, moments = share["clipped apart"].removesuffix(" %"), share["dense moments"]
    assert f"worth nothing ({apart} % and {moments})" in within


def test_what_more_experts_and_a_lower_rate_are_worth():
    """By the trials of the recipe in the tuning of its study."""
    register_variants()
    results = read_recipe(ROOT / "examples/studies/recipe/results.json")
    runs = tuning_runs(results.plan)["recipe"]
    _, whole, _, half_rate, twice_k = (f"{results.corpus_perplexity([run]):.2f}" for run in runs)
    text = " ".join(page("docs/choosing-sizes-and-rates.md").split())
    assert f"with k = 64 in place of 32 comes to {twice_k} in place of {half_rate} on held-out training text" in text
    assert f"came to {half_rate} in place of {whole} after {runs[1].steps:,} steps" in text
    few, many = (f"{results.corpus_perplexity([run]):.2f}" for run in results.runs_of_timed_trials())
    size = results.dense_of_seconds().hidden_size
    assert f"for equal seconds at d = {size}, in one run of each, k = 32 comes to {few} and k = 64 to {many}." in text


class TestContinualLearning:
    def test_forgetting_of_a_stream(self):
        table = page("docs/continual-learning.md")
        protected, full = (
            re.search(rf"^\| {arm} +\| [^|]+\| +([\d.]+ ± [\d.]+) \|", table, flags=re.M)[1]
            for arm in ("grown, protected", "full finetuning")
        )
        assert f"protected mode {protected} nats per token, full finetuning {full}" in page("README.md")

    def test_forgetting_of_general_text(self):
        page_of_facts = page("docs/continual-learning.md").partition("## What was measured: new facts")[2]
        graft, lora = (
            re.search(rf"^\| {arm} +\| +(-?[\d.]+ ± [\d.]+) \|", page_of_facts, flags=re.M)[1]
            for arm in ("graft, sparse finetuning", "LoRA")
        )
        assert f"a graft {graft} nats, LoRA {lora}" in page("README.md")
