# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards in the format of the Hub, generated from a configuration and from results."""

import json
import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME

from common.pictures import new_figure, save_picture, shades
from modeling_peer import PeerConfig, model_costs


TEMPLATE = Path(__file__).parents[2] / "model_cards" / "template.md"

# The line that marks cards written by a training, and the placeholder from which their example code loads the model.
MARK = "<!-- Written by a training, which replaces this file again unless this line is removed. -->"
FOLDER = "path/to/this/folder"

# Labels of results by their keys in all_results.json. The key `perplexity/brown` is the perplexity of the text
# `brown`.
RESULTS = {"perplexity": "Held-out perplexity", "eval_loss": "Held-out loss, nats per token"}

# … and of results to compare with: those before the model was taught a domain, and without the added experts.
COMPARED = {
    "perplexity_before": "Held-out perplexity before experts were added",
    "perplexity_masked": "Held-out perplexity with the added experts masked",
}

# Defaults of the example code.
PROMPT, MAX_NEW_TOKENS = "def main(", 30

USAGE_PICTURE = "expert_usage.png"

# The file in which the example scripts describe a training for its card: `data`, `base_model` and `settings`.
TRAINING_FILE = "training.json"

# … and the file of the flags of a teaching, with local paths. `Trainer` does not push files that begin with "_".
TEACHING_FLAGS_FILE = "_teaching_flags.json"

# Explains the measures of expert usage and their healthy values. The figures come from the scaling study's models with
# BatchNorm on 65,536 tokens of held-out text: `usage` in its results.json.
USAGE_GUIDE = (
    "Usage is the share of experts that some token retrieved; short texts use fewer. Unevenness is how far router weight "
    "is from equal shares, in nats: 0 if all experts get the same, log N if one gets all. Top-1 usage counts experts that "
    "were the first choice of a head. Healthy, after short trainings and on 65,536 tokens, were a usage of 1.0 and an "
    "unevenness of 0.4 with 1,024 experts, 0.95 and 0.8 with 4,096, 0.7 and 1.3 with 16,384. With 65,536 a usage of 0.4 "
    "was common. A usage that falls toward 0 while unevenness rises toward log N means that few experts do everything: "
    'fewer experts, or `query_norm` "rms", use more of them.'
)


def make_card(
    repo_id: str,
    config: PreTrainedConfig,
    results: dict[str, float],
    *,
    license: str | None = None,
    dataset_name: str | None = None,
    tags: list[str] | None = None,
    description: str = "",
    prompt: str = PROMPT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    training: dict[str, Any] | None = None,
    usage_picture: bool = False,
    name_or_path: str | None = None,
) -> ModelCard:
    """
    Makes a model card from `model_cards/template.md`.

    Args:
        repo_id (`str`): Repository of the model.
        config (`PreTrainedConfig`): Configuration of the model. A [`PeerConfig`] is described, with its costs.
        results (`dict[str, float]`):
            Results as in all_results.json. Keys that are neither in `RESULTS` nor in `COMPARED` are left out.
        license, dataset_name (`str`, *optional*):
            License of the model, and the dataset that it was trained on. Metadata name only a dataset of the Hub.
        tags (`list[str]`, *optional*): Tags in addition to `peer`, which models with PEER layers and adapters have.
        description (`str`, *optional*): Further description, in Markdown.
        prompt (`str`, *optional*), max_new_tokens (`int`, *optional*):
            Prompt of the example code, and number of tokens that it generates.
        training (`dict`, *optional*):
            Description of the training: the names of its `data` and `base_model`, and its `settings`. Metadata name
            only a base model of the Hub.
        usage_picture (`bool`, *optional*, defaults to `False`):
            Whether the repository has a picture of the usage of experts, see [`plot_usage`].
        name_or_path (`str`, *optional*):
            Where the example code loads the model from, if not from `repo_id`. The card is then marked as one that a
            training or a push replaces.
    """
    training = training or {}
    dataset_name = None if dataset_name is None else id_on_hub(dataset_name)
    model_name = repo_id.split("/")[-1]
    has_experts = not isinstance(config, PeerConfig) or "peer" in config.feed_forward_types
    found = [(*key.partition("/")[::2], value) for key, value in results.items()]
    base_model = training.get("base_model") or ""
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        datasets=dataset_name,
        base_model=base_model if "/" in base_model else None,
        tags=[*(["peer"] if has_experts else []), *(tags or [])],
        model_name=model_name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=text or dataset_name or "text",
                dataset_name=text or dataset_name or "held-out text",
                metric_type=metric,
                metric_name=RESULTS[metric],
                metric_value=value,
            )
            for metric, text, value in found
            if metric in RESULTS
        ]
        or None,
    )
    labels = RESULTS | COMPARED
    lines = [
        f"{labels[metric]}{text and f', {text}'}: {value:.4g}." for metric, text, value in found if metric in labels
    ]
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        model_name=model_name,
        has_experts=has_experts,
        is_quantized=getattr(config, "quantization_config", None) is not None,
        description="\n\n".join(filter(None, [_describe(config), description, "\n".join(lines)])),
        training=_describe_training(training),
        usage=f"![Usage of the experts against the training step]({USAGE_PICTURE})\n\n{USAGE_GUIDE}"
        if usage_picture
        else "",
        name_or_path=name_or_path or repo_id,
        mark="" if name_or_path is None else MARK,
        prompt=prompt.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"),
        max_new_tokens=max_new_tokens,
    )


def id_on_hub(name: str) -> str | None:
    """The id of a dataset or a model. `None` if the name is a local path or cannot be an id of the Hub."""
    if os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def is_written_card(file: Path) -> bool:
    """Whether a file is a card that a training wrote."""
    return file.exists() and MARK in file.read_text(encoding="utf-8")


def card_of_folder(folder: Path, repo_id: str, config: PreTrainedConfig, **options: Any) -> ModelCard:
    """
    Make the card of a trained model and a picture of its expert usage, from the results, settings and logs that its
    training left in the folder.

    Args:
        folder (`Path`): Folder of the model. The picture is written into it.
        repo_id, config, options: See [`make_card`].
    """
    history = _read_json(folder / TRAINER_STATE_NAME).get("log_history", [])
    options["usage_picture"] = plot_usage(history, folder / USAGE_PICTURE)
    results, training = (_read_json(folder / name) for name in ("all_results.json", TRAINING_FILE))
    return make_card(repo_id, config, results, training=training, **options)


def _read_json(file):
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _describe(config):
    if not isinstance(config, PeerConfig):
        return ""
    costs = model_costs(config)
    sizes = (
        f"Feed-forwards of its layers: {', '.join(config.feed_forward_types)}. {costs.parameters:,} parameters, "
        f"{costs.active_parameters:,} of which a token reads; {costs.flops / 1e6:,.1f} MFLOPs per token at "
        f"{costs.sequence_length:,} tokens."
    )
    return " ".join(filter(None, [sizes, _describe_experts(config)]))


def _describe_experts(config):
    layers = [index for index, name in enumerate(config.feed_forward_types) if name == "peer"]
    if not layers:
        return ""
    h, k = config.num_retrieval_heads, config.num_experts_per_head
    pool = " of one pool" if config.share_experts_across_layers else " each"
    sentences = [
        f"PEER in {_in_words(layers)} of {config.num_hidden_layers}, counted from 0: for every token h = {h} heads "
        f"retrieve k = {k} of N = {config.num_experts:,} experts{pool if len(layers) > 1 else ''}, single neurons of "
        f"width {config.hidden_size}."
    ]
    sentences += [
        f"{each['num_experts']:,} experts were added to {_in_words(each['layers'])} in {each['mode']} mode."
        for each in config.expert_additions or ()
    ]
    if config.expert_additions:
        sentences.append("In `with modeling_peer.masked_experts(model):` it runs without them.")
    return " ".join(sentences)


def _in_words(layers):
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"


def _describe_training(training):
    lines = [
        f"{label}: {training[name]}."
        for name, label in (("base_model", "Base model"), ("data", "Data"))
        if training.get(name)
    ]
    settings = [f"| `{name}` | {value} |" for name, value in training.get("settings", {}).items()]
    table = ["\n".join(["| setting | value |", "|---|---|", *settings])] if settings else []
    return "\n\n".join([*lines, *table])


def plot_usage(history: list[dict[str, float]], file: Path) -> bool:
    """
    Plots the measures of expert usage of all layers against the step.

    Args:
        history (`list[dict]`): The log history of a `Trainer` with an [`ExpertUsageCallback`].
        file (`Path`): File to write.

    Returns:
        `bool`: whether the history has any of them, and the file was written.
    """
    measures = {"expert_usage": "share of experts used", "expert_unevenness": "unevenness, nats"}
    logged = {
        measure: sorted(
            {key for entry in history for key in entry if key.startswith(f"{measure}/")},
            key=lambda key: (len(key), key),  # layer 2 before layer 10
        )
        for measure in measures
    }
    if not any(logged.values()):
        return False
    figure = new_figure(8, 3.2)
    for axes, (measure, label) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        for key, color in zip(logged[measure], shades(len(logged[measure])), strict=True):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            name = key.partition("/")[2].replace("_", " ")
            axes.plot(*zip(*points, strict=True), marker=".", color=color, label=name)
        found = [entry[key] for key in logged[measure] for entry in history if key in entry]
        highest = max(filter(math.isfinite, found), default=0)  # not all are if it diverged
        axes.set(xlabel="training step", ylabel=label, ylim=(0, 1.1 * highest or 1))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    save_picture(figure, file)
    return True
