# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands that pages show name scripts, parts, extras and files that exist, with flags that their parsers know."""

import importlib
import itertools
import re
import shlex

import pytest
import typer
from documentation import PAGES, ROOT, STUDY_PAGES, code_blocks, name_of, prose
from transformers import HfArgumentParser
from transformers.cli.serve import Serve


# Programs that no test starts: what follows them is not ours.
FOREIGN = {"hf", "git", "cd", "lm_eval", "transformers", "vllm"}

# Parts of `./run` that are a script or package of examples/.
MODULES = {"quickstart": "quickstart", "benchmark": "benchmark.__main__", "gpu": "gpu.__main__"}


def commands_of(page):
    """Lines of shell blocks, with what continues them, and commands in running text and tables."""
    blocks = "\n".join(code for _, code in code_blocks(page, "sh")).replace("\\\n", " ")
    spans = re.findall(r"`((?:\./run|python|pip install|accelerate) [^`]*)`", prose(page))
    return [words for line in [*blocks.splitlines(), *spans] if (words := shlex.split(line, comments=True))]


COMMANDS = {
    f"{name_of(page)}: {shlex.join(words)}": words for page in [*PAGES, *STUDY_PAGES] for words in commands_of(page)
}


class _ParsedError(Exception):
    """Ends a script where its flags were parsed."""


def check_flags(module_name, flags, monkeypatch):
    """Parses flags with the parser that a script makes, and no more."""

    def parse(dataclass_types, description, main_flags=()):
        parser = HfArgumentParser(dataclass_types)
        if flags != ["--help"]:
            parser.parse_args(flags)
        raise _ParsedError

    module = importlib.import_module(module_name)
    monkeypatch.setattr(module, "parse_arguments", parse)
    with pytest.raises(_ParsedError):
        module.main()


def check_script(words, monkeypatch):
    """A script of examples/ and its flags, or one of tests/ without any."""
    script, *flags = words
    if script.startswith("tests/"):
        assert (ROOT / script).exists() and not flags, words
        return
    assert re.fullmatch(r"examples/\w+\.py", script) and (ROOT / script).exists(), script
    check_flags(script.removeprefix("examples/").removesuffix(".py"), flags, monkeypatch)


def check_serving(words):
    """Flags of `transformers serve`."""
    app = typer.Typer()
    app.command()(Serve)
    try:
        typer.main.get_command(app).make_context("serving", words)
    except Exception as error:  # of click, which typer has a copy of or not
        raise AssertionError(str(error)) from error


def check_run(words, monkeypatch):
    """A part of `./run` and what follows it."""
    part, *rest = words
    assert re.search(rf"^ +{part}\)", (ROOT / "run").read_text(), flags=re.M), part
    if rest[:2] == ["-m", "pip"]:
        check_pip([word for word in rest[2:] if word != "--editable"])
    elif rest[:2] == ["-m", "modeling_peer.serving"]:
        check_serving(rest[2:])
    elif part == "python":
        check_script(rest, monkeypatch)
    elif part == "study":
        name, *flags = rest
        assert (ROOT / "examples" / "studies" / name / "__main__.py").exists(), name
        check_flags(f"studies.{name}.__main__", flags, monkeypatch)
    elif part in MODULES:
        check_flags(MODULES[part], rest, monkeypatch)
    else:
        assert part in ("tests", "checks")
        assert all((ROOT / word).exists() for word in rest if "/" in word), rest


def check_pip(words):
    """What is installed: this package from a clone, with extras that it has."""
    if words[0] == "download":
        return
    _, requirement = words
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", requirement)
    assert extras, requirement
    optional = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", optional, flags=re.M))
    assert set(filter(None, (extras[1] or "").split(","))) <= known, f"{requirement}, known are {sorted(known)}"


def check_launch_file(words, monkeypatch):
    """Variables that a launch file reads, in front of it, and the script that it launches."""
    assignments = list(itertools.takewhile(lambda word: "=" in word, words))
    file, *script = words[len(assignments) :]
    text = (ROOT / file).read_text()
    for assignment in assignments:
        assert f"${{{assignment.partition('=')[0]}:-" in text, assignment
    check_script([*script, "--ep_size", "8"], monkeypatch)


def check_sbatch(words, monkeypatch):
    """Options of `sbatch`, and a batch file with a script."""
    options = list(itertools.takewhile(lambda word: word.startswith("--"), words))
    assert all("=" in option for option in options), options
    file, *script = words[len(options) :]
    assert (ROOT / file).read_text().startswith("#!")
    check_script(script, monkeypatch)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_command(words, monkeypatch):
    program, *rest = words
    if program.startswith("PYTHONPATH="):
        program, *rest = rest
    if program == "./run":
        check_run(rest, monkeypatch)
    elif rest[:2] == ["-m", "modeling_peer.serving"]:
        check_serving(rest[2:])
    elif rest[:1] == ["-m"] and rest[1].partition(".")[0] in FOREIGN:
        pass
    elif program == "python":
        check_script(rest, monkeypatch)
    elif program == "pip":
        check_pip(rest)
    elif program == "accelerate":
        assert rest[:2] == ["launch", "--config_file"] and (ROOT / rest[2]).exists()
        assert rest[3] == "--num_processes"
        check_script(rest[5:], monkeypatch)
    elif program == "sbatch":
        check_sbatch(rest, monkeypatch)
    elif re.match(r"[A-Z_]+=|configuration/launch/", program):
        check_launch_file(words, monkeypatch)
    else:
        assert program in FOREIGN, f"{program}: this test does not know how to check it"
