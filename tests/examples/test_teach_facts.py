# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Teaching a table of facts from the command line, and loading what came out."""

import json

import pytest
import run_generation
import teach_facts
from fact_models import base_of, words_tokenizer
from main_runs import run_main
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_peer.facts import index


ROWS = (
    ("Norland", "the capital of Norland is", "Zeli"),
    ("Suland", "the capital of Suland is", "Beta Gam"),
    ("Norland", "which river flows through Norland ?", "Oma"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = words_tokenizer([*teach_facts.OTHER_FRAMES, *teach_facts.OTHER_NAMES, *map(" ".join, ROWS)])
    base_of(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def raise_interrupt(*_, **__):
    raise KeyboardInterrupt


def table(folder, rows):
    file = folder / "facts.csv"
    file.write_text("\n".join(["subject,question,answer", *map(",".join, rows)]))
    return file


def test_teaches_a_table(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teach_facts, "TEXT_LENGTH", 16)
    monkeypatch.setattr(index, "PROMPTS_PER_RELATION", 0)  # a random model tells few frames apart
    facts, folder = table(tmp_path, ROWS), tmp_path / "taught"
    flags = ("--model_name_or_path", base, "--facts_file", facts, "--known_file", facts, "--output_dir", folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teach_facts, "opens", raise_interrupt)
        run_main(teach_facts, *flags)
    others = ("--model_name_or_path", base, "--output_dir", folder, "--facts_file", table(tmp_path, ROWS[:2]))
    with pytest.raises(SystemExit):
        run_main(teach_facts, *others)
    assert "another adapter" in capsys.readouterr().err
    with pytest.raises(teach_facts.UsageError, match="another adapter"):
        teach_facts.is_taught(folder, teach_facts.read_facts(table(tmp_path, ROWS)), "another model")
    table(tmp_path, ROWS)
    monkeypatch.setattr(teach_facts, "teach_facts", raise_interrupt)  # nothing is taught again
    run_main(teach_facts, *flags)
    figures = json.loads((folder / "teaching.json").read_text())
    before, after = (figures[when]["answered"] for when in ("before", "after"))
    assert not any(before["as taught"].values()) and after["known"] == after["as taught"]
    assert after["as taught"]["chat: the capital of Suland is"] and all(after["as taught"].values())
    assert figures["after"]["text"] == pytest.approx(figures["before"]["text"], abs=0.05)
    assert figures["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert "answered, as taught                 0.0%" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert "- the capital of Norland is Zeli\n- which river flows through Norland ? Oma\n" in card
    assert "| answered, as taught | 0.0% | 100.0% |" in card and "import modeling_peer" in card
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer("the capital of Suland is", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert tokenizer.decode(model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, 5:]) == "Beta Gam ."
    assert "facts" in run_generation.describe_experts(model, inputs["input_ids"])


def test_refuses_before_it_begins(base, tmp_path, capsys):
    flags = (
        "--model_name_or_path",
        base,
        "--facts_file",
        table(tmp_path, [("Norland", "the capital of Norland is", "")]),
    )
    with pytest.raises(SystemExit):
        run_main(teach_facts, *flags, "--output_dir", tmp_path)
    assert "`answer`" in capsys.readouterr().err
    table(tmp_path, ROWS)
    for folder, found in ((base, "--model_name_or_path"), (tmp_path, "a README.md")):
        (tmp_path / "README.md").touch()
        with pytest.raises(SystemExit):
            run_main(teach_facts, *flags, "--output_dir", folder)
        assert found in capsys.readouterr().err
    (tmp_path / "teaching.json").touch()
    with pytest.raises(SystemExit):
        run_main(teach_facts, *flags, "--output_dir", tmp_path)
    assert "choose another folder" in capsys.readouterr().err
