# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The model that examples train, from their flags, and mistakes that end a script before it works for hours."""

import convert_to_mlx
import huggingface_hub
import push_to_hub
import pytest
import quantize
import quickstart
import run_classification
import run_clm
import run_generation
import teach_domain
import teach_facts
import train_nano
from main_runs import run_main
from tiny_models import tiny_config
from trainer_worker import small_model
from transformers import HfArgumentParser, TrainingArguments

from common.training import OptimizerArguments, make_optimizers
from modeling_peer import PeerQuantizationConfig


MODEL = ("--model_name_or_path", "runs/none")
DATA = ("--train_file", "a.md", "--output_dir", "out")
TRAIN = ("--do_train", *DATA)


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (run_generation, MODEL, "runs/none"),
        (push_to_hub, ("--repo_id", "user/none", "--pull"), "user/none"),
        (quickstart, ("--train_file", "no.txt"), "no.txt"),
        (quantize, (*MODEL, "--bits", "3", "--output_dir", "out"), "bits"),
        (quantize, ("--model_name_or_path", "quantized", *DATA), "quantized"),
        (run_clm, ("--do_train",), "--output_dir"),
        (run_clm, (*TRAIN, "--config_overrides", "num_experts=60"), "num_experts"),
        (run_clm, (*TRAIN, "--config_overrides", "vocab_size=9"), "258"),
        (run_clm, DATA, "--do_train"),
        (run_clm, (*TRAIN, "--streaming"), "--max_steps"),
        # The figures of an untrained model would be written into the card of the model that is in the folder.
        (run_clm, ("--do_eval", "--output_dir", "out"), "--model_name_or_path"),
        (run_classification, ("--do_eval", "--output_dir", "out"), "--model_name_or_path"),
        (run_classification, TRAIN, "'label'"),
        (run_clm, ("no.json",), "no.json"),
        (train_nano, (*DATA, "--streaming"), "--streaming"),
        (teach_facts, (*MODEL, "--facts_file", "no.csv"), "no.csv"),
        (convert_to_mlx, ("--model_name_or_path", "a/b/c", "--output_dir", "out"), "a/b/c"),
        *((each, (*TRAIN, "--resume_from_checkpoint", "no"), "resume") for each in (run_clm, run_classification)),
        (teach_domain, (*TRAIN, "--resume_from_checkpoint", "no"), "resume"),
        (teach_domain, ("--model_name_or_path", "here", *DATA, "--streaming"), "--streaming"),
        (teach_domain, (*MODEL, *DATA, "--validation_split_percentage", "0"), "--validation_file"),
        # Scripts that change a model refuse its folder.
        (quantize, ("--model_name_or_path", "out", "--output_dir", "out"), "--output_dir"),
        (teach_domain, ("--model_name_or_path", "out", *DATA), "--output_dir"),
        (run_classification, ("--model_name_or_path", "out", *TRAIN), "--output_dir"),
    ],
)
def test_mistakes_end_with_one_line(script, flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("one and two\n" * 100)
    (tmp_path / "out").mkdir()
    tiny_config(quantization_config=PeerQuantizationConfig()).save_pretrained("quantized")
    with pytest.raises(SystemExit) as end:
        run_main(script, *flags)
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and named in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("flags", "is_new", "up", "down"),
    [
        ([], True, 0.25, 48),
        (["--rates", "facts"], True, 4, 384),
        (["--rates", "facts", "--expert_lr_multiplier", "2"], True, 2, 192),
        ([], False, 1, 1),
        (["--down_proj_lr_multiplier", "3"], False, 1, 3),
    ],
)
def test_rates_of_expert_tables(flags, is_new, up, down):
    (args,) = HfArgumentParser(OptimizerArguments).parse_args_into_dataclasses(flags)
    model = small_model("peer")
    optimizer, _ = make_optimizers(args, TrainingArguments("unused", learning_rate=0.01), model, is_new)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    pool = model.model.layers[0].mlp.expert_pool
    assert rates[pool.up_proj.weight] == pytest.approx(0.01 * up)
    assert rates[pool.down_proj.weight] == pytest.approx(0.01 * down)


@pytest.mark.parametrize("flags", [["--rates", "facts"], ["--second_moment", "row"]])
def test_another_optimizer_has_no_rates_of_tables(flags):
    with pytest.raises(ValueError, match="--rates.*need RowAdamW"):
        HfArgumentParser(OptimizerArguments).parse_args_into_dataclasses(["--no_row_adamw", *flags])
