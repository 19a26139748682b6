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
"""Model cards of what the scaling study trained, made of its results alone."""

from pathlib import Path
from statistics import mean

from cards import make_card
from corpora import CORPORA
from huggingface_hub import ModelCard
from scaling_plan import Run, ablation_runs, budget_name, configuration_of, training_flops
from scaling_report import LABELS, Results, spread


PROMPT, NEW_TOKENS = "The function returns", 30


def make_cards(results: Results) -> dict[str, ModelCard]:
    """The card of each configuration in the study's tables, by a name for its repository."""
    runs = {
        f"{variant}-{budget_name(budget)}-flops": run
        for budget in results.plan.budgets
        for variant, run in results.optimal(budget).items()
    }
    for run in ablation_runs(results.plan, results.rates):
        runs["-".join([run.variant, *run.ablation]).replace(", ", "-").replace(" ", "-")] = run
    return {name: _card(results, run, name) for name, run in runs.items()}


def _card(results: Results, run: Run, name: str) -> ModelCard:
    """Its figures are means over seeds."""
    perplexities = {text: results.perplexities(run, text) for text in results.runs[run.name]["losses"]}
    return make_card(
        f"USER/{name}",
        configuration_of(run, results.plan),
        {f"perplexity/{text}": mean(values) for text, values in perplexities.items()},
        description=_describe(results, run),
        prompt=PROMPT,
        max_new_tokens=NEW_TOKENS,
    )


def _describe(results: Results, run: Run) -> str:
    plan = results.plan
    seeds = len(results.seeds_of(run))
    texts = "; ".join(
        f"{name} ({CORPORA[name].registry} {CORPORA[name].package}, {CORPORA[name].licence})"
        if name in CORPORA
        else name
        for name in plan.training_texts
    )
    return (
        f"{LABELS[run.variant]}{'' if run.ablation is None else ', ' + ' '.join(run.ablation)}: trained from scratch by "
        f"`examples/scaling.py` for {run.steps:,} steps of {plan.tokens_of_step:,} tokens, "
        f"{training_flops(run, plan):.2g} FLOPs, with a learning rate of {run.learning_rate:g}. Text: {texts}. `corpus` is a "
        f"held-out part of it, the other evaluation texts are of other sources. A research model: it writes like the "
        f"documentation it read, and states what is not so.\n\n"
        f"Perplexities are means over {seeds} {'seed' if seeds == 1 else 'seeds'}; their mean over the evaluation texts is "
        f"{spread(results.mean_perplexities(run))}."
    )


def write_cards(results: Results, folder: Path) -> None:
    """Writes the cards as files in a folder, in place of those that are there."""
    cards = make_cards(results)
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.md"):
        if file.stem not in cards:
            file.unlink()
    for name, card in cards.items():
        (folder / f"{name}.md").write_text(str(card))
