# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The scaling study as a user runs it: every run is made once, as planned, and a killed study can be resumed."""

import json
import shutil
import subprocess

import pytest
import torch
from datasets import load_from_disk
from preloaded import python
from slow_tests import slow
from study_runs import make_study

import studies.scaling.__main__ as scaling
from common.model_arguments import RETIRED_FIELDS
from common.subprocesses import module_environment
from modeling_peer import PeerConfig
from studies.common import training_study
from studies.common.single_run import load
from studies.common.training_plan import CORPUS
from studies.scaling.plan import Plan, with_seeds
from studies.scaling.plots import PLOTS
from studies.scaling.report import describe, read_results


pytestmark = slow

SMALL = {
    "training_texts": ["old"],
    "evaluation_texts": ["new"],
    "block_size": 32,
    "batch_size": 4,
    "hidden_sizes": [[32]],
    "budgets": [6e8],
    "learning_rates": [0.01],
    "seeds": 2,
    "eval_sequences": 8,
    "training": {"lr_scheduler_type": "cosine"},
    "fields": {"initializer_range": 0.08},
    "variants": {
        "dense": {"configuration": "dense-tiny"},
        "moe-expert-choice": {"configuration": "moe-tiny", "moe_num_experts": 4, "moe_routing": "expert_choice"},
        "peer": {
            "configuration": "peer-tiny",
            "training": {"down_proj_lr_multiplier": 4},
            "sparse_expert_gradients": True,
            "num_experts": 64,
            "num_retrieval_heads": 2,
            "num_experts_per_head": 4,
            "query_size": 64,
        },
    },
    "reference_hidden_size": 32,
    "ablations": {
        "num_experts": {"16": {"num_experts": 16}},
        "active": {},
        "query_norm": {},
        "variation": {
            "no activation": {"expert_act": None},
            "one learning rate": {"training": {"down_proj_lr_multiplier": 1}},
        },
    },
    "repeated_ablations": ["num_experts"],
    "after_training": {"k = 2": {"num_experts_per_head": 2}, "h = 1": {"num_retrieval_heads": 1}},
}


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """The study at its smallest, made once, and as a function that goes on with it."""
    return make_study(scaling, tmp_path_factory.mktemp("scaling"), SMALL)


@pytest.fixture(scope="module")
def results(small_study):
    return read_results(small_study[0] / "results.json")


def test_comes_to_its_end_and_makes_nothing_again(small_study, results, monkeypatch):
    folder, main = small_study
    assert results.plan == Plan.read(folder / "plan.json")
    assert (folder / "tables.md").read_text() == describe(results)
    for name in PLOTS:
        assert (folder / f"{name}.png").stat().st_size > 5000
    for run in results.equal_seconds(results.plan.budgets[0]):
        assert len(results.with_seeds(run)) == 2
    assert not list(folder.glob("models/*/checkpoint-*"))
    before = {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()}
    monkeypatch.setattr(training_study.subprocess, "run", lambda *_, **__: pytest.fail("a run is made again"))
    main()
    assert {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()} == before


def test_every_run_was_trained_as_it_says(small_study, results):
    folder, _ = small_study
    for name, result in results.runs.items():
        arguments = result["run_clm"]
        trained = result["all_results"]
        sequences = trained["epoch"] * trained["train_samples"]
        assert sequences == pytest.approx(result["steps"] * 4, abs=0.1)
        # 32 tokens a sequence, three times the forward's FLOPs.
        assert result["training_flops"] == round(3 * result["flops_per_token"] * sequences * 32)
        saved = PeerConfig.from_pretrained(folder / "models" / name)
        fields = {field: value for field, value in result["fields"].items() if field not in RETIRED_FIELDS}
        assert {field: getattr(saved, field) for field in fields} == fields, name
        optimizer = json.loads((folder / "work" / f"{name}.run_clm.json").read_text())
        if optimizer["row_adamw"]:  # none of the learning rates that run_clm.py has by itself
            assert optimizer["expert_lr_multiplier"] == arguments.get("expert_lr_multiplier", 1.0)
            assert optimizer["down_proj_lr_multiplier"] == arguments.get("down_proj_lr_multiplier", 1.0)
        assert result["train_history"][-1][0] <= result["steps"]


def test_losses_are_those_of_the_saved_model(small_study, results):
    """
    By the model's own loss, on each text, without what balances the experts of a MoE; also with h or k changed.
    """
    folder, _ = small_study
    texts = {name: torch.tensor(load_from_disk(folder / "held_out" / name)["input_ids"]) for name in (CORPUS, "new")}

    def losses(name, **fields):
        model = load(folder / "models" / name, router_aux_loss_coef=0.0, **fields)
        with torch.no_grad():
            return {text: model(input_ids=tokens, labels=tokens).loss.item() for text, tokens in texts.items()}

    for name, result in results.runs.items():
        assert result["losses"] == pytest.approx(losses(name), rel=1e-5), name
    assert results.losses(results.reference())[CORPUS] != results.losses(results.reference())["new"]
    run = with_seeds(results.reference(), results.plan)[0]
    changed = {name: each["losses"] for name, each in results.runs[run.name]["after_training"].items()}
    assert changed["k = 2"] == pytest.approx(losses(run.name, num_experts_per_head=2), rel=1e-5)
    assert changed["h = 1"] == pytest.approx(losses(run.name, num_retrieval_heads=1), rel=1e-5)


def test_a_run_goes_on_where_it_was_killed(small_study, results, tmp_path):
    """
    After a checkpoint, and after the last one: it ends as one that was not killed, with the same arguments only.
    """
    folder, _ = small_study
    run = results.reference()
    expected = results.runs[run.name]
    work = json.loads((folder / "work" / f"{run.name}.json").read_text())
    work["run_clm"] |= {"output_dir": str(tmp_path / "model"), "save_steps": 2, "save_total_limit": 10}
    file, result_file = tmp_path / "work.json", tmp_path / "result.json"
    file.write_text(json.dumps(work | {"result_file": str(result_file)}))

    def make():
        result_file.unlink(missing_ok=True)
        command, output = [python(), "-m", "studies.common.single_run", file], {"stderr": subprocess.STDOUT}
        subprocess.run(command, env=module_environment(), stdout=subprocess.PIPE, text=True, check=True, **output)
        return json.loads(result_file.read_text())

    first = make()
    assert first["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    last = max(tmp_path.glob("model/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert last.name == f"checkpoint-{run.steps}"
    for name in ("trainer_state.json", "all_results.json"):
        (tmp_path / "model" / name).unlink()  # killed while the model was saved
    killed = make()
    assert killed["losses"] == pytest.approx(first["losses"], rel=1e-5)
    assert killed["all_results"]["train_samples"] == first["all_results"]["train_samples"]
    shutil.rmtree(last)
    again = make()
    assert again["losses"] == pytest.approx(first["losses"], rel=1e-5)
    assert again["all_results"]["train_runtime"] != first["all_results"]["train_runtime"]
    file.write_text(
        json.dumps(work | {"run_clm": work["run_clm"] | {"learning_rate": 0.5}, "result_file": str(result_file)})
    )
    with pytest.raises(subprocess.CalledProcessError) as error:
        make()
    assert "was started with other arguments" in error.value.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_size": 16}, "block_size was 32, got 16"),
        # A variant that was redefined has results that are not its own.
        ({"variants": SMALL["variants"] | {"dense": {"configuration": "moe-tiny"}}}, "config_name was"),
    ],
)
def test_refuses_results_of_another_study(small_study, monkeypatch, changed, message):
    folder, main = small_study
    monkeypatch.setattr(training_study.subprocess, "run", lambda *_, **__: pytest.fail("trains before it refuses"))
    (folder / "plan.json").write_text(json.dumps(SMALL | changed))
    try:
        with pytest.raises((ValueError, SystemExit), match=message):
            main()
    finally:
        (folder / "plan.json").write_text(json.dumps(SMALL))
