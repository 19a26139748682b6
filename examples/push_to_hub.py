# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Pushes a trained checkpoint to the Hub, with its tokenizer, generation configuration and a model card, and pulls it
back.

    hf auth login
    python examples/push_to_hub.py --model_name_or_path runs/quickstart/peer-toy --repo_id USER/peer-toy --pull

The push is one commit, so either all files are pushed or none. `--pull` alone downloads the model and continues a
prompt; after a push it also checks that the downloaded model continues the prompt as the local checkpoint does. A
README.md in the folder is pushed unchanged. Without one, or with one that a training wrote, a model card is made from
the configuration and from what the training left in the folder: results, settings, and logs of expert usage, which it
shows as a picture.
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.cards import (
    MAX_NEW_TOKENS,
    PROMPT,
    TEACHING_FLAGS_FILE,
    TRAINING_FILE,
    USAGE_PICTURE,
    card_of_folder,
    is_written_card,
)
from common.command_line import ends_on_usage_error, parse_arguments
from common.model_arguments import loads_checkpoint


# What a checkpoint must contain, with the files that show it.
NEEDED = {
    "a configuration": "config.json",
    "a generation configuration": "generation_config.json",
    "a tokenizer": "tokenizer_config.json",
    "weights": "*.safetensors",
}
# Files that are pushed, and files among them that only describe the training.
PUSHED = ("*.json", "*.safetensors", "*.py", "*.txt", "*.model", "*.jinja", "*.png", "README.md", "LICENSE")
LEFT_OUT = ("trainer_state.json", "train_results.json", "eval_results.json", TRAINING_FILE, TEACHING_FLAGS_FILE)


@dataclass
class PushArguments:
    """What to push, and where to."""

    repo_id: str = field(metadata={"help": "Repository on the Hub: `user/name` or `organization/name`."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder of the checkpoint to push."})
    pull: bool = field(default=False, metadata={"help": "Download the model (after the push, if any) and test it."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    license: str | None = field(default=None, metadata={"help": "License of the model, such as `apache-2.0`."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of the Hub that the model was trained on."}
    )
    tags: list[str] = field(default_factory=list, metadata={"help": "Tags of the model card, in addition to `peer`."})
    commit_message: str = field(default="Upload model", metadata={"help": "Commit message."})
    prompt: str = field(default=PROMPT, metadata={"help": "Prompt to test the model with."})
    max_new_tokens: int = field(default=MAX_NEW_TOKENS, metadata={"help": "Maximum number of tokens to generate."})

    def __post_init__(self):
        if self.model_name_or_path is None and not self.pull:
            raise ValueError("Give a checkpoint to push, --model_name_or_path, or ask for a download, --pull.")


def push(args: PushArguments) -> str:
    """Pushes the checkpoint in one commit. Returns the full id of the repository."""
    folder = Path(args.model_name_or_path)
    config = _check_checkpoint(folder)
    api = HfApi()
    user = _logged_in_user(api)
    repo_id = args.repo_id if "/" in args.repo_id else f"{user}/{args.repo_id}"
    files = sorted(
        {file for pattern in PUSHED for file in folder.glob(pattern) if file.is_file() and file.name not in LEFT_OUT}
    )
    readme = folder / "README.md"
    has_own_card = readme.exists() and not is_written_card(readme)
    operations = []
    if not has_own_card:
        card = card_of_folder(
            folder,
            repo_id,
            config,
            license=args.license,
            dataset_name=args.dataset_name,
            tags=args.tags,
            prompt=args.prompt,
            max_new_tokens=args.max_new_tokens,
        )
        files = sorted({*files, *folder.glob(USAGE_PICTURE)})
        operations.append(CommitOperationAdd("README.md", str(card).encode()))
    operations += [CommitOperationAdd(file.name, file) for file in files if file != readme or has_own_card]
    try:
        api.create_repo(repo_id, private=args.private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=args.commit_message)
    except HfHubHTTPError as error:
        raise SystemExit(f"{repo_id} could not be pushed to {api.endpoint}, and nothing of it was: {error}") from error
    print(f"Pushed {len(operations)} files: {commit.commit_url}")
    return repo_id


def _check_checkpoint(folder):
    """Returns the configuration of a folder, if it contains a complete checkpoint of a language model."""
    if not folder.is_dir():
        raise SystemExit(
            f"{folder} is not a folder: give the folder of a checkpoint, such as the --output_dir of run_clm.py."
        )
    missing = [name for name, pattern in NEEDED.items() if not any(folder.glob(pattern))]
    if missing:
        raise SystemExit(f"{folder} is not a complete checkpoint, it lacks {', '.join(missing)}: see run_clm.py.")
    config = AutoConfig.from_pretrained(folder)
    if not any(name.endswith("ForCausalLM") for name in config.architectures or []):
        raise SystemExit(f"{folder} contains {config.architectures}, not a language model.")
    return config


def _logged_in_user(api):
    try:
        return api.whoami()["name"]
    except LocalTokenNotFoundError as error:
        raise SystemExit(
            f"You are not logged in to {api.endpoint}: run `hf auth login`, or set HF_TOKEN to a token with write "
            "access."
        ) from error
    except HfHubHTTPError as error:
        raise SystemExit(
            f"{api.endpoint} does not accept your token: run `hf auth login`, or set HF_TOKEN to another. {error}"
        ) from error
    except (HTTPError, ConnectionError) as error:  # of the HTTP client of the Hub, or of its offline mode
        raise SystemExit(f"{api.endpoint} cannot be reached, so nothing was pushed: {error}") from error


def continuation(name_or_path: str, args: PushArguments) -> str:
    """Returns the prompt and its greedy continuation by a checkpoint."""
    with loads_checkpoint(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForCausalLM.from_pretrained(name_or_path).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@ends_on_usage_error()
def main():
    (args,) = parse_arguments((PushArguments,), __doc__)
    repo_id = args.repo_id if args.model_name_or_path is None else push(args)
    if not args.pull:
        return
    pulled = continuation(repo_id, args)
    print(f"{repo_id} continues:\n{pulled}")
    if args.model_name_or_path is not None:
        if pulled != continuation(args.model_name_or_path, args):
            raise SystemExit(f"{repo_id} does not continue the prompt as {args.model_name_or_path} does.")
        print(f"So does {args.model_name_or_path}.")


if __name__ == "__main__":
    main()
