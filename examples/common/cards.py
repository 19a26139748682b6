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
"""Model cards in the format of the Hub, generated from a configuration and from results."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from modeling_peer import PeerConfig, model_costs


TEMPLATE = Path(__file__).parents[2] / "model_cards" / "template.md"

# Labels of results by their keys in all_results.json. The key `perplexity/brown` is the perplexity of the text
# `brown`.
RESULTS = {"perplexity": "Held-out perplexity", "eval_loss": "Held-out loss, nats per token"}


def make_card(
    repo_id: str,
    config: PreTrainedConfig,
    results: dict[str, float],
    *,
    license: str | None = None,
    dataset_name: str | None = None,
    tags: list[str] | None = None,
    description: str = "",
    prompt: str,
    max_new_tokens: int,
    sequence_length: int | None = None,
) -> ModelCard:
    """
    Makes a model card from `model_cards/template.md`.

    Args:
        repo_id (`str`): Repository of the model.
        config (`PreTrainedConfig`): Configuration of the model. A [`PeerConfig`] is described, with its costs.
        results (`dict[str, float]`): Results as in all_results.json. Keys that are not in `RESULTS` are left out.
        license, dataset_name (`str`, *optional*):
            License of the model, and the dataset of the Hub that it was trained on.
        tags (`list[str]`, *optional*): Tags in addition to `peer`, which models with PEER layers and adapters have.
        description (`str`, *optional*): Further description, in Markdown.
        prompt (`str`), max_new_tokens (`int`): Prompt of the example code, and number of tokens that it generates.
        sequence_length (`int`, *optional*): Sequence length at which FLOPs are counted, see [`model_costs`].
    """
    model_name = repo_id.split("/")[-1]
    has_experts = not isinstance(config, PeerConfig) or "peer" in config.feed_forward_types
    found = [(*key.partition("/")[::2], value) for key, value in results.items()]
    found = [each for each in found if each[0] in RESULTS]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        datasets=dataset_name,
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
        ]
        or None,
    )
    lines = [f"{RESULTS[metric]}{text and f', {text}'}: {value:.4g}." for metric, text, value in found]
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        model_name=model_name,
        has_experts=has_experts,
        description="\n\n".join(filter(None, [_describe(config, sequence_length), description, "\n".join(lines)])),
        repo_id=repo_id,
        prompt=prompt.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"),
        max_new_tokens=max_new_tokens,
    )


def _describe(config, sequence_length):
    if not isinstance(config, PeerConfig):
        return ""
    costs = model_costs(config, sequence_length)
    return (
        f"Feed-forwards of its layers: {', '.join(config.feed_forward_types)}. {costs.parameters:,} parameters, "
        f"{costs.active_parameters:,} of which a token reads; {costs.flops / 1e6:,.1f} MFLOPs per token at "
        f"{costs.sequence_length:,} tokens."
    )
