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
"""Model cards of the models of the scaling study, made from its results alone."""

from pathlib import Path
from statistics import mean

from huggingface_hub import ModelCard

from common.cards import make_card
from studies.common.corpora import CORPORA
from studies.common.study_folder import write_text
from studies.common.training_plan import CORPUS, PEER, Run, budget_name, configuration_of, training_flops
from studies.scaling.plan import ablation_runs
from studies.scaling.report import Results, in_words, label, mean_perplexities, own_training, perplexities, spread


PROMPT, NEW_TOKENS = "The function returns", 30


def make_cards(results: Results) -> dict[str, ModelCard]:
    """
    Makes the card of each configuration that the study trained, by a name for its repository. Sizes and learning rates
    that were not chosen get no card.
    """
    runs = {}
    for budget in results.plan.budgets:
        for variant, run in results.optimal(budget).items():
            runs[f"{variant}-{budget_name(budget)}-flops"] = run
        runs[f"{PEER}-{budget_name(budget)}-flops-seconds-of-dense"] = results.equal_seconds(budget)[1]
    runs[f"{PEER}-before-ablations"] = results.reference()
    for run in ablation_runs(results.plan, results.rates):
        runs["-".join([run.variant, *run.ablation]).replace(", ", "-").replace(" ", "-")] = run
    return {name: _card(results, run, name) for name, run in runs.items()}


def _card(results: Results, run: Run, name: str) -> ModelCard:
    """Makes the card of a run. Its figures are means over seeds."""
    losses = results.with_seeds(run)
    return make_card(
        f"USER/{name}",
        configuration_of(run, results.plan),
        {f"perplexity/{text}": mean(perplexities(losses, text)) for text in losses[0]},
        description=_describe(results, run),
        prompt=PROMPT,
        max_new_tokens=NEW_TOKENS,
        sequence_length=results.plan.block_size,
    )


def _describe(results: Results, run: Run) -> str:
    plan, losses = results.plan, results.with_seeds(run)
    ablation = "" if run.ablation is None else f", {' '.join(run.ablation)}"
    training = {"learning_rate": run.learning_rate, **plan.training, **own_training(run, plan)}
    seeds = f"{len(losses)} seed" + ("" if len(losses) == 1 else "s")
    deviation = "" if len(losses) == 1 else " (mean ± standard deviation over seeds)"
    return (
        f"{label(run.variant)}{ablation}: trained from scratch by `./run study scaling` for {run.steps:,} steps of "
        f"{plan.tokens_of_step:,} tokens, {training_flops(run, plan):.2g} FLOPs, with {in_words(training)}. "
        f"Training text: {'; '.join(map(_source, plan.training_texts))}. `{CORPUS}` is a held-out part of it; the "
        "other evaluation texts come from other sources. A research model, too small to state facts.\n\n"
        f"Perplexities are means over {seeds}. Their geometric mean over the evaluation texts is "
        f"{spread(mean_perplexities(losses, plan))}{deviation}."
    )


def _source(name: str) -> str:
    if name not in CORPORA:
        return name
    corpus = CORPORA[name]
    return f"{name} ({corpus.registry} {corpus.package}, {corpus.license})"


def write_cards(results: Results, folder: Path) -> None:
    """Writes the cards as files into a folder."""
    for name, card in make_cards(results).items():
        write_text(folder / f"{name}.md", str(card))
