# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Figures and tables that pages quote are those of saved results. A figure is some numbers that must stand in this order
in one paragraph, list or row of a table of a page, so that all words may change.
"""

import json
import math
import re
import shlex
from functools import cache
from itertools import pairwise
from statistics import mean, median

import pytest
import torch
from compare_disk import tables as disk_tables
from compare_embedding_optimizers import table as optimizers_table
from compare_vllm import table as vllm_table
from documentation import ROOT, fixed, numbers, numbers_of_blocks, percent
from memory_group_bytes import memory_group_bytes
from teach_domain import DOMAIN, KEPT, Figures

from benchmark.report import Results as BenchmarkResults
from common.command_line import command_to_share
from modeling_peer import PeerConfig, configuration_path, list_configurations, model_costs
from modeling_peer.ops.factored_gradient import MOST_FACTORS
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.parallel.gradient_exchange import _factors_are_smaller
from studies.capacity import report as capacity
from studies.capacity import variants as capacity_variants
from studies.capacity.plan import LIKE, TRIED
from studies.common.training_plan import Run, costs_of
from studies.graft_starts.__main__ import describe as describe_starts
from studies.onset import report as onset
from studies.people import report as people
from studies.recipe.plan import runs_by_size, tuning_runs
from studies.recipe.report import describe as describe_recipe
from studies.recipe.results import read_results as read_recipe
from studies.recipe.variants import register_variants
from studies.scaling import report as scaling
from studies.stream import arms as stream_arms
from studies.stream import report as stream
from studies.teaching import report as facts_study


README, QUALITY, OPTIONS = "README.md", "docs/quality.md", "docs/layer-and-options.md"
CHOOSING, CONTINUAL = "docs/choosing-sizes-and-rates.md", "docs/continual-learning.md"
PERFORMANCE, SERVING, TEACHING = (f"docs/{name}.md" for name in ("performance", "serving", "teach-a-model"))
MANY_GPUS = "docs/training-on-many-gpus.md"
STUDIES = "examples/studies/"
RECIPE = STUDIES + "recipe/README.md"


@cache
def load(name):
    return json.loads((ROOT / name).read_text())


@cache
def recipe():
    """Results that draw each interval once, which takes seconds."""
    register_variants()
    results = read_recipe(ROOT / STUDIES / "recipe/results.json")
    below = cache(results.below)
    results.below = lambda own, others: below(tuple(own), tuple(others))
    return results


@cache
def scaling_results():
    return scaling.read_results(ROOT / STUDIES / "scaling/results.json")


def costs(name):
    return model_costs(PeerConfig.from_pretrained(configuration_path(name)))


def interval(difference):
    return percent(difference.share, difference.low, difference.high)


# Each source gives pairs of a page, or of several pages, and a figure.


def quickstart():
    peer, dense = (load("docs/images/quickstart.json")[name] for name in ("peer-toy", "dense-toy"))
    for result in (peer, dense):
        yield "docs/training.md", [f"{result[each]:.1f}" for each in ("perplexity_before", "perplexity_after")]
    step, perplexity = peer["steps_at_equal_seconds"], peer["perplexity_at_equal_seconds"]
    yield "docs/training.md", [str(step), *fixed(1, perplexity)]


def configurations():
    for name in list_configurations():
        own = costs(name)
        sizes = fixed(1, own.parameters / 1e6, own.active_parameters / 1e6)
        yield OPTIONS, [*fixed(2, own.flops / 1e6), *sizes, *fixed(2, own.training_bytes / 1e9)]


def checkpoints():
    toy = [load("docs/images/quickstart.json")[name] for name in ("peer-toy", "dense-toy")]
    nano = {name: load(f"examples/checkpoints/{name}/results.json") for name in ("peer-nano", "dense-nano")}
    found = fixed(1, *(result["perplexity"]["16 bits"] for result in nano.values()))
    tokens = nano["peer-nano"]["tokens"] / 1e6, 1024 * max(map(int, toy[1]["eval_losses"])) / 1e6
    perplexities = fixed(1, *(result["perplexity_after"] for result in toy))
    yield OPTIONS, [*found, *fixed(1, tokens[0]), *perplexities, *fixed(1, tokens[1])]
    yield "docs/checkpoints.md", fixed(1, tokens[0])
    for name, result in nano.items():
        sizes = fixed(1, *(size / 1e6 for size in (costs(name).parameters, costs(name).active_parameters)))
        yield "docs/checkpoints.md", [*sizes, *fixed(2, result["perplexity"]["16 bits"])]
    whole, eight, four = (nano["peer-nano"]["perplexity"][f"{bits} bits"] for bits in (16, 8, 4))
    (first,), (second,) = (percent(each / whole - 1, digits=3) for each in (eight, four))
    yield "docs/checkpoints.md", [*fixed(2, whole, eight), first, "8", *fixed(2, four), second, "4"]


def laptop():
    results = load("docs/images/laptop-steps.json")
    dense, peer = (mean(run["train_runtime"] for run in runs) / 40 for runs in results["train_results"].values())
    yield OPTIONS, fixed(1, peer, dense)
    yield OPTIONS, fixed(0, *(36_000 / seconds * 8192 / 1e6 for seconds in (peer, dense)))
    yield CHOOSING, fixed(2, peer / dense)


def benchmark():
    results, layer = BenchmarkResults(load("examples/benchmark/results.json")), {}
    layer |= {"num_experts": 1024**2, "hidden_size": 512}
    contenders = ("peer", "peer_pytorch", "peer_eager", "pkm_embedding_bag", "dense", "dense_gated")
    for section, operation in (("forward", "forward"), ("training", "forward_backward"), ("training", "step")):
        fields = {"operation": operation, **layer}
        times = [results.value(section, "seconds", contender=name, **fields) for name in contenders]
        (ours,) = results.records(section, contender="peer", **fields)
        times.append(results.floor(section, ours))
        yield PERFORMANCE, fixed(0, *(1e3 * time for time in times if time is not None))
    of_backward = {"operation": "forward_backward", **layer}
    bytes_of = [results.value("training", "peak_bytes", contender=each, **of_backward) for each in contenders[:2]]
    yield PERFORMANCE, fixed(2, *(size / 1e9 for size in bytes_of))
    states = [
        results.value("training", "state_bytes", contender="peer", operation=each, **layer)
        for each in ("step", "step_row_moment")
    ]
    yield PERFORMANCE, fixed(1, *(size / 1e9 for size in states))
    alone = {"contender": "expert_part", "operation": "forward", "dtype": "float32"}
    for indices in ("trained", "uniform"):
        rows, seconds = (
            results.value("experts", each, indices=indices, **alone) for each in ("unique_rows", "seconds")
        )
        yield PERFORMANCE, fixed(0, rows)
        yield PERFORMANCE, fixed(1, 1e3 * seconds)
    for name, fields in (("expert_part", {"operation": "forward", "num_tokens": 1024}), ("peer-mid", {})):
        whole, eight, four = (
            results.value("quantized", "seconds", contender=f"{name}{bits}", **fields)
            for bits in ("", "_int8", "_int4")
        )
        ratios = [*fixed(2, four / whole), "4", *fixed(2, eight / whole), "8"]
        yield PERFORMANCE, ratios if fields else [*ratios[2:], *ratios[:2]]
    for size, digits in (("tiny", 2), ("mid", 1)):
        seconds = [results.value("decode", "seconds", contender=f"{name}-{size}") for name in ("peer", "dense")]
        yield SERVING, fixed(digits, *(1e3 * each for each in seconds))


def teaching():
    runs = load("docs/images/teach-a-domain.json")
    names = ("before", "openness", "after", "masked")
    printed = Figures(**{name: runs["default"][name] for name in names})
    assert all(run["masked"] == run["before"] for run in runs.values())
    for line in filter(numbers, str(printed).splitlines()):
        yield TEACHING, numbers(line)
    for name, run in runs.items():
        if name != "written":  # evaluated on other text
            yield TEACHING, [*fixed(1, run["after"][DOMAIN]), *fixed(2, run["after"][KEPT])]
    yield TEACHING, fixed(2, runs["default"]["before"][KEPT], runs["written"]["standard_library"])
    yield TEACHING, fixed(1, runs["written"]["after"][DOMAIN])
    for rate, weight in ((0.01, 16), (0.01, 4), (0.003, 16)):
        settings = {"learning_rate": rate, "reference_weight": weight}
        (run,) = (
            each
            for each in load(STUDIES + "stream/results.json")["runs"]
            if (each["arm"], each["seed"], each["settings"]) == ("protected", 0, settings)
        )
        found = stream.measures(run)
        yield TEACHING, [*fixed(3, found["forgetting"]), *fixed(2, found["learning"])]


def many_gpus():
    """A model on eight GPUs and on 64: what one holds and receives, by the rules of the package and the page's formulas."""
    config = PeerConfig.from_pretrained(configuration_path("peer-gpu"), num_experts=1024**2)
    N, d, A, e, T = config.num_experts, config.hidden_size, 64, 4, 8192
    pools = config.num_hidden_layers
    elements = 2 * pools * N * d
    yield MANY_GPUS, fixed(1, model_costs(config).parameters / 1e9, elements / 1e9)

    def held(G):
        return (elements * (e + 8) / G + 2 * pools * 4 * N) / 1e9

    yield MANY_GPUS, [*fixed(0, held(1)), *fixed(1, held(8))]
    yield MANY_GPUS, [*fixed(0, 3 * e * elements / 1e9), *fixed(1, 10 * e * elements / 1e12)]
    factors = Factors(
        *(torch.empty(8 * T, width, device="meta") for width in (A, d // 8)),
        Assignments(torch.empty(8 * T, A, dtype=torch.int64, device="meta"), N, "torch"),
    )
    most = int(MOST_FACTORS * 4 * N * d / 8 / factors.nbytes)  # micro-batches before factors are summed
    few, many = (pools * (M * (2 * T * (e * d + 4 * 8 * A) + 20 * 8 * T * A) + 8 * N) / 1e9 for M in (1, most))
    yield MANY_GPUS, [*fixed(1, few), "8,192", *fixed(1, many), str(most), str(most + 1)]
    fsdp2 = 5 * e * elements * 7 / 8 / 1e9
    in_group = {G: 2 * pools * T * sum(memory_group_bytes(d, A, G, e).values()) / 1e9 for G in (8, 16, 32, 64)}
    yield MANY_GPUS, ["8", "8,192", *fixed(1, in_group[8]), *fixed(0, fsdp2)]
    for G, received in in_group.items():
        n, table = 64 // G, torch.empty(N, d // G, device="meta")
        dense = 2 * e * elements / G * (1 - 1 / n) / 1e9
        gradient = (e * elements / G + 2 * pools * 32 * N) / 1e9 * (n > 1)
        # Only one micro-batch has factors that are smaller.
        by_factors = _factors_are_smaller([table] * 2, [d // G] * 2, [2 * G * T * A] * n, [2 * G * T] * n)
        assert n == 1 or not by_factors
        yield MANY_GPUS, [str(G), *fixed(1, held(G) + gradient, received, dense)]


def scaling_study():
    results = scaling_results()
    rows = [numbers(row) for row in scaling.table_of_experts(results).splitlines()[2:]]
    for row in rows:
        if row[0] in ("16,384", "65,536"):
            yield CHOOSING, [row[0], *row[5:8]]


def below_dense():
    """How far the recipe is below dense, at equal compute and at equal seconds."""
    results = recipe()
    budgets = results.plan.budgets
    for budget, name in zip(budgets, ("2e13", "1e14"), strict=True):
        runs = results.compared(budget)
        for variant, own in runs.items():
            sizes = costs_of(own[0], results.plan)
            cells = [str(len(own)), str(own[0].hidden_size)]
            cells += fixed(1, sizes.parameters / 1e6, sizes.active_parameters / 1e6)
            cells += fixed(2, results.corpus_perplexity(own), results.perplexity(own))
            cells += [] if variant == "dense" else numbers(str(results.below(own, runs["dense"])))
            cells += [] if variant == "recipe" else numbers(str(results.below(runs["recipe"], own)))
            yield QUALITY, cells
        found = results.below(runs["recipe"], runs["dense"])
        yield RECIPE, interval(found)
        if name == "2e13":
            yield README, percent(found.share, digits=0)
    small, large = map(results.compared, budgets)
    stored = [
        costs_of(runs["recipe"][0], results.plan).parameters / costs_of(runs["dense"][0], results.plan).parameters
        for runs in (large, small)
    ]
    yield QUALITY, fixed(0, *stored)
    yield README, fixed(0, stored[1])
    for name in ("moe-token-choice", "peer", "pkm", "pkm-gated"):
        found = results.below(small["recipe"], small[name])
        yield RECIPE, percent(found.low, found.high)
        yield RECIPE, fixed(1, -math.log(1 - found.share) / found.error)
    at_seconds = results.compared_at_equal_seconds()
    alike, alike_at_seconds = (
        results.below(*([run for run in runs[variant] if run.seed != 4] for variant in ("recipe", "dense")))
        for runs in (large, at_seconds)
    )
    found = results.below(at_seconds["recipe"], at_seconds["dense"])
    pairs = list(zip(at_seconds["recipe"], at_seconds["dense"], strict=True))
    least = min(results.below([own], [other]).share for own, other in pairs)
    yield (QUALITY, RECIPE), interval(alike)
    yield (QUALITY, RECIPE), interval(alike_at_seconds)
    (later,) = (Run(**each) for each in results.plan.later_runs)
    (first,) = (run for run in large["dense"] if run.seed == later.seed)
    yield (QUALITY, RECIPE), fixed(2, results.perplexity([first]), results.perplexity([later]))
    for runs in (large, at_seconds):
        replaced = [later if run.seed == later.seed else run for run in runs["dense"]]
        yield (QUALITY, RECIPE), interval(results.below(runs["recipe"], replaced))
    yield (QUALITY, RECIPE), percent(least)
    yield RECIPE, interval(found)
    for runs in (at_seconds["dense"], at_seconds["recipe"]):
        step = results.step_seconds(runs[0])
        cells = [str(len(runs)), str(runs[0].hidden_size), *fixed(0, runs[0].steps), *fixed(1, 1e3 * step)]
        cells += [
            *fixed(0, step * runs[0].steps),
            *fixed(2, results.corpus_perplexity(runs), results.perplexity(runs)),
        ]
        yield QUALITY, cells
    for runs in (large, at_seconds):
        dense, own = (
            results.part_losses([run for run in runs[name] if run.seed != 4]) for name in ("dense", "recipe")
        )
        yield QUALITY, percent(*(1 - math.exp(ours - theirs) for ours, theirs in zip(own, dense, strict=True)))
    falls = {run: parts[0] - parts[-1] for run in large["dense"] for parts in (results.part_losses([run]),)}
    other = min(falls, key=falls.get)
    yield RECIPE, [str(other.seed), *fixed(2, falls.pop(other), results.perplexity([other]))]
    yield RECIPE, fixed(2, min(falls.values()), max(falls.values()))


def ngrams():
    """What n-grams of as many tokens predict, beside dense and the recipe."""
    results = recipe()
    for budget, found in zip(results.plan.budgets, load(STUDIES + "recipe/ngrams.json").values(), strict=True):
        of_models = [results.perplexity(results.compared(budget)[name]) for name in ("dense", "recipe")]
        texts = results.plan.evaluation_texts
        of_ngrams = [math.exp(mean(found[kind][text] for text in texts)) for kind in ("ngrams", "cache")]
        yield QUALITY, [*fixed(1, found["tokens"] / 1e6), *fixed(2, *of_models, *of_ngrams)]


def widths():
    results = recipe()
    compared, dense = results.compared_at_widths(), results.dense_of_seconds()
    narrow, wide = (
        results.step_seconds(own) / results.step_seconds(other)
        for other, own in zip(compared["dense"], compared["recipe"], strict=True)
    )
    yield (QUALITY, CHOOSING, RECIPE), fixed(2, narrow)
    yield (QUALITY, CHOOSING, RECIPE), fixed(2, wide)
    few, many = results.runs_of_timed_trials()
    yield (QUALITY, RECIPE), percent(results.below([few], [dense]).share)
    yield RECIPE, percent(results.below_on_the_corpus(few, dense))
    yield CHOOSING, fixed(2, *(results.corpus_perplexity([run]) for run in (few, many)))
    yield CHOOSING, fixed(2, *(results.corpus_perplexity([run]) for run in compared["recipe"]))
    sizes = runs_by_size(results.plan, results.best, results.plan.budgets[-1])["recipe"]
    perplexities = [results.corpus_perplexity([run]) for run in sizes]
    yield CHOOSING, [*percent(max(perplexities) / min(perplexities) - 1), *fixed(2, *perplexities)]
    for runs in results.compared_rates().values():
        by_rate = sorted(runs, key=lambda run: run.learning_rate)
        yield CHOOSING, [*fixed(0, runs[0].steps), *fixed(2, *(results.corpus_perplexity([run]) for run in by_rate))]
    of_size, again = results.seconds, load(STUDIES + "recipe/step_times_again.json")["seconds"]
    narrow, wide = ([median(times) for times in of_size[size]["seconds"].values()] for size in ("64", "80"))
    yield RECIPE, ["64", *fixed(0, *(1e3 * each for each in narrow))]
    for times in (narrow, wide):
        yield RECIPE, fixed(2, *(each / times[0] for each in times[1:]))
    dense, few, _ = (median(times) / first for times, first in zip(again.values(), wide, strict=True))
    yield RECIPE, percent(dense - 1)
    yield RECIPE, percent(few - 1)
    yield RECIPE, percent(1 - 1 / dense)
    yield RECIPE, percent(few / dense - 1)


def more_experts_and_larger_dense_models():
    results = recipe()
    runs = results.by_num_experts()
    perplexities = [results.perplexity(own) for own in runs.values()]
    yield (QUALITY, RECIPE), fixed(2, *perplexities)
    yield CHOOSING, fixed(0, *runs)
    yield CHOOSING, fixed(2, *perplexities)
    for fewer, more in pairwise(runs.values()):
        yield RECIPE, percent(results.below(more, fewer).share)
    of_seeds = [results.perplexity([run]) for run in results.compared(results.plan.budgets[0])["recipe"]]
    own = results.perplexity(results.compared(results.plan.budgets[0])["recipe"])
    yield (CHOOSING, QUALITY, RECIPE), [*percent(max(of_seeds) / min(of_seeds) - 1), *fixed(2, own)]
    flops = [results.runs[own[0].name]["training_flops"] for own in runs.values()]
    yield (CHOOSING, RECIPE), percent(flops[-1] / flops[0] - 1, digits=0)
    own, dense = results.dense_sizes()
    size, flops = (
        results.runs[dense[-1].name][field] / results.runs[own.name][field]
        for field in ("active_parameters", "training_flops")
    )
    share = percent(results.below([own], dense[-1:]).share)
    yield QUALITY, [*share, *fixed(1, size)]
    yield QUALITY, fixed(1, size, flops)
    yield RECIPE, [*share, *percent(results.below_on_the_corpus(own, dense[-1])), *fixed(1, flops)]
    yield RECIPE, fixed(2, size)
    active = max(run["active_parameters"] for run in results.runs.values()) / 1e6
    yield (QUALITY, RECIPE), fixed(1, active)


def parts_of_the_recipe():
    """By its two designs, and by the trials of its tuning."""
    results = recipe()
    first, second = (results.effects(design) for design in results.plan.designs)
    for name in results.plan.designs[1]["factors"]:
        yield CHOOSING, numbers(str(second[name]))
    for name in ("dense branch", "narrow rows", "two heads", "twice the experts", "gated experts", "third block"):
        yield CHOOSING, percent(first[name].share)
    for effect in (second["last two blocks"], second["first block"], second["own sub-keys"], first["two heads"]):
        yield RECIPE, interval(effect)
    _, whole, _, half, twice = (results.corpus_perplexity([run]) for run in tuning_runs(results.plan)["recipe"])
    yield CHOOSING, fixed(2, twice, half)
    yield CHOOSING, fixed(2, half, whole)
    yield RECIPE, [*percent(1 - half / whole), *fixed(2, whole, half)]
    yield RECIPE, [*percent(1 - twice / half), *fixed(2, half, twice)]


def forgetting():
    found = load(f"{STUDIES}stream/recipe/results.json")["arms"]
    for arm in ("protected", "protected-generated"):
        shares = [found[arm]["mean"]["forgetting"] / found[each]["mean"]["forgetting"] for each in ("full", "lora")]
        yield RECIPE, percent(*shares, digits=0)
    ungated = found["protected-ungated"]["mean"]["forgetting"] / found["full"]["mean"]["forgetting"]
    yield CONTINUAL, percent(ungated, digits=0)
    toy = PeerConfig.from_pretrained(configuration_path("peer-toy"))
    before = model_costs(toy, sequence_length=256).total
    for texts in (1, 4):
        added = {
            "mode": "protected",
            "layers": [*range(toy.num_hidden_layers)],
            "num_experts": stream_arms.ADDED_SIDE**2,
        }
        added |= {name: getattr(toy, name) for name in ("num_retrieval_heads", "num_experts_per_head")}
        toy.expert_additions = [added] * texts
        after = model_costs(toy, sequence_length=256).total
        more = after.parameters / before.parameters - 1, after.flops / before.flops - 1
        yield CONTINUAL, [str(texts), *fixed(1, after.parameters / 1e6), *percent(*more, digits=0)]


def stored_facts():
    """What is learned at equal FLOPs, beside dense and beside a memory of as many parameters."""
    results, times = (load(f"{STUDIES}capacity/results.json")[part] for part in ("runs", "times"))
    found, page = capacity.available(TRIED, capacity.learning, results), STUDIES + "capacity/README.md"
    kilobits = {name: capacity.kilobits(runs, results) for name, runs in found.items()}
    pages, memory = [page, README], capacity.PAIRS[LIKE]
    yield pages, fixed(1, times["seconds_per_fact"][LIKE] / times["seconds_per_fact"]["dense"])
    low, middle, high = capacity.interval_of_ratio(kilobits[LIKE], kilobits["dense"])
    yield pages, fixed(1, middle, low, high)
    yield README, fixed(1, capacity.interval_of_ratio(kilobits[memory], kilobits["dense"])[1])
    low, middle, high = capacity.interval_of_ratio(kilobits[LIKE], kilobits[memory])
    yield page, fixed(2, middle, low, high)
    parameters = {name: capacity_variants.costs(name).total.parameters for name in kilobits}
    yield pages, [f"{parameters[LIKE] / parameters['dense']:.0f}"]
    for name in (LIKE, memory):
        yield pages, percent(mean(results[run.name]["stored"]["recalled"] for run in found[name]), digits=0)


def second_facts():
    """What added experts gain of facts that stand apart, what they cost the first, and what other ways do."""
    results = load(f"{STUDIES}capacity/results.json")["runs"]
    found, page = capacity.available(capacity.ARM_TRIALS, capacity.forgetting, results), STUDIES + "capacity/README.md"
    gained = {arm: mean(capacity.kilobits(runs, results, "gained")) for arm, runs in found.items()}
    lost = {arm: mean(capacity.lost(runs, results)) for arm, runs in found.items()}
    offered = results[found["full"][0].name]["offered"]["new"] / capacity.KBIT
    yield page, fixed(0, gained["protected"], offered)
    yield page, percent(mean(results[run.name]["gained"]["recalled"] for run in found["protected"]), digits=0)
    yield (page, CONTINUAL), fixed(2, lost["protected"])
    assert lost["full"] > 100 and gained["full"] > 0.99 * offered
    others = [run for run in results.values() if run["kind"] == "apart" and run["subject"] != "protected"]
    keeping = [run["gained"]["bits"] for run in others if run["left"]["bits"] > run["before"]["bits"] / 2]
    yield page, fixed(0, max(keeping) / capacity.KBIT)
    for arm in ("protected", "full", "replay"):  # those that are alike
        alike = [run for run in results.values() if (run["kind"], run["subject"]) == ("forgetting", arm)]
        gaining = [run for run in alike if run["gained"]["bits"] > 0]
        run = max(gaining, key=lambda own: own["left"]["bits"] + own["gained"]["bits"])
        yield page, fixed(0, run["gained"]["bits"] / capacity.KBIT)
        yield page, percent(1 - run["left"]["bits"] / run["before"]["bits"])


def taught_facts():
    """What ways to teach facts recall and lose, and where the gate of a graft of facts opens."""
    results, page, study = load(f"{STUDIES}teaching/results.json")["runs"], STUDIES + "teaching/README.md", facts_study
    runs = {arm: study.runs_of(arm, 240, results) for arm in study.LABELS}

    def right(arms, kind="recall"):
        return [mean(map(study.right_share(kind), runs[arm])) for arm in arms]

    lost = "".join(run["right"][kind] for run in runs["facts"] for kind in study.KNOWN).translate({48: 49, 49: 48})
    minutes = fixed(1, *(results["seconds-240-0-0"]["seconds"][arm] / 60 for arm in ("facts", "full")))
    yield TEACHING, ["240", minutes[0]]
    found = percent(*right(["gate-full", "lookup", "gate-facts"]))
    found += fixed(0, *(mean(run["bytes"] for run in runs[arm]) / 240e3 for arm in ("facts", "full")))
    found += percent(*right(["gate-lora"]), *right(["full", "lora", "facts"], study.USES[1]))
    found += percent(*right(["full", "facts"], study.USES[0]), digits=0) + minutes
    more = [study.runs_of("facts", number, results)[0] for number in (1000, 5000)]
    for opening in map(study.opening, (study.KNOWN[0], *study.NEGATIVES)):
        yield page, percent(mean(map(opening, runs["facts"])), opening(more[1]))
    found += percent(mean(map(opening, runs["facts"]))) + fixed(0, lost.count("1"), len(lost))  # other relations
    yield page, found + [each for run in more for each in percent(opening(run), study.lost_of(run))]
    yield TEACHING, percent(mean(map(opening, runs["facts"])), *map(opening, more))
    yield page, percent(study.share(lost), study.upper_bound(lost))
    losses = percent(study.share(lost)) + percent(mean(map(study.lost_of, runs["full"])), digits=0)
    recall, names = (percent(*right(["facts", "full"], kind), digits=0) for kind in ("recall", study.OTHER_NAMES))
    yield page, [recall[0], names[0], losses[0]]
    yield page, [*percent(*right(["full"], study.USES[1]), digits=0), names[1], losses[1]]
    yield CONTINUAL, [recall[0], losses[0], recall[1], losses[1]]
    yield page, percent(*right(["bm25"]), mean(map(study.lost_of, runs["bm25"])), digits=0)
    yield page, percent(mean(study.share(run["found"]["recall"]) for run in runs["bm25"]))
    yield page, percent(*right(["bm25", "facts"], "not true"))
    yield TEACHING, percent(mean(run["open_behind"] for run in runs["facts"]), digits=0)


def people_in_text():
    """What models recall in a wording used for others, by place, and how much worse PEER reads than dense."""
    runs = people.trainings(load(STUDIES + "people/results.json")["runs"])  # dense, two seeds of PEER, the memory
    asked = [people.TOLD_OF_OTHERS + place for place in people.PLACES]
    begins, _, after = ([people.above_others(run, wording)[0] for run in runs] for wording in asked)
    losses = [people.perplexity(run, "second half") for run in runs]
    pages = [README, STUDIES + "people/README.md"]
    yield pages[1], percent(*begins[:2], digits=0)
    yield pages, percent(min(after), digits=0)
    yield pages, percent(losses[1] / losses[0] - 1, digits=0)


SOURCES = [quickstart, configurations, checkpoints, laptop, benchmark, teaching, many_gpus, scaling_study]
SOURCES += [below_dense, ngrams, widths, more_experts_and_larger_dense_models, parts_of_the_recipe, forgetting]
SOURCES += [stored_facts, second_facts, taught_facts, people_in_text]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_pages_quote_what_was_found(source):
    wrong = []
    for pages, figure in source():
        for page in [pages] if isinstance(pages, str) else pages:
            blocks = map(iter, numbers_of_blocks(ROOT / page))
            if not any(all(number in block for number in figure) for block in blocks):
                wrong.append((page, figure))
    assert not wrong


def rebuilt_stream(folder):
    results = load(f"{STUDIES}stream/{folder}results.json")
    swept = [run for run in results["runs"] if run["seed"] == 0]
    level, chosen = stream.choose_hyperparameters(swept)
    rebuilt = stream.summarize(results["runs"], results["texts"], level, chosen, results["arguments"])
    assert rebuilt["equal_learning"] == results["equal_learning"] and rebuilt["arms"] == results["arms"]
    return results


def tables_of_facts():
    return capacity.describe(*(load(f"{STUDIES}capacity/results.json")[part] for part in ("runs", "times")))


def tables_of_onset():
    return onset.describe(*(load(f"{STUDIES}onset/results.json")[part] for part in ("runs", "times")))


def tables_of_people(name, of_groups=True):
    results = load(f"{STUDIES}people/{name}.json")
    tables = people.describe(results["runs"], results["ngrams"]).split("\n\n")
    return "\n".join(tables if of_groups else [*tables[:2], tables[-1]])


TABLES = [
    (STUDIES + "people/README.md", lambda: tables_of_people("results")),
    (STUDIES + "people/README.md", lambda: tables_of_people("earlier/5625_people", of_groups=False)),
    (STUDIES + "capacity/README.md", tables_of_facts),
    (STUDIES + "onset/README.md", tables_of_onset),
    (
        "docs/large-embeddings.md",
        lambda: optimizers_table(load("examples/compare_embedding_optimizers.json")["results"]),
    ),
    (SERVING, lambda: vllm_table(load("examples/compare_vllm.json"))),
    (SERVING, lambda: vllm_table(load("examples/compare_vllm_nano.json"))),
    ("docs/larger-than-memory.md", lambda: disk_tables(load("examples/compare_disk.json"))),
    (RECIPE, lambda: describe_recipe(recipe())),
    (STUDIES + "scaling/README.md", lambda: scaling.describe(scaling_results())),
    (STUDIES + "teaching/README.md", lambda: facts_study.describe(load(STUDIES + "teaching/results.json")["runs"])),
    (STUDIES + "graft_starts/README.md", lambda: describe_starts(load(STUDIES + "graft_starts/results.json"))),
    (STUDIES + "stream/README.md", lambda: stream.describe(rebuilt_stream(""))),
    (STUDIES + "stream/README.md", lambda: stream.describe(rebuilt_stream("recipe/"))),
    (CONTINUAL, lambda: stream.describe_shares(rebuilt_stream("recipe/"))),
]


@pytest.mark.parametrize(("page", "make"), TABLES, ids=[f"{place} {page}" for place, (page, _) in enumerate(TABLES)])
def test_pages_have_the_tables_of_the_results(page, make):
    """Row by row."""
    rows = [line for line in make().splitlines() if line.startswith("|") and numbers(line)]
    text = (ROOT / page).read_text().splitlines()
    assert rows and not [row for row in rows if row not in text]


def test_the_command_of_a_page_is_that_of_its_runs():
    page, runs = " ".join((ROOT / TEACHING).read_text().split()), load("docs/images/teach-a-domain.json")
    command = re.search(r"(examples/teach_domain\.py .*?) --kept_standard_library", page.replace("\\ ", ""))[1]
    expected = command_to_share(shlex.split(command))
    assert all(command_to_share(shlex.split(run["command"])).startswith(expected) for run in runs.values())


@pytest.mark.parametrize("G, d, A, e", [(8, 1024, 64, 4), (3, 9, 5, 2), (1, 4, 2, 2)])
def test_bytes_and_formulas_of_the_table_of_a_memory_group_are_what_is_computed(G, d, A, e):
    counted, page = memory_group_bytes(d, A, G, e), (ROOT / MANY_GPUS).read_text()
    # What is exchanged, how, in which pass, and the formula of its bytes.
    row = r"^\| ([a-z ]+): [a-z-]+ \| (?:forward|backward) \| ([^|]+) \| ([\d,]+) \|$"
    rows = re.findall(row, page, flags=re.M)
    if d == 1024:
        assert {name: int(size.replace(",", "")) for name, _, size in rows} == counted
        assert f"| all | | | {sum(counted.values()):,} |" in page
    for name, formula, _ in rows:
        product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.replace("\N{MINUS SIGN}", "-"))
        assert eval(product, {"G": G, "d": d, "A": A, "e": e}) == counted[name], name
