# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands that pages show name scripts, parts, extras and files that exist, with flags that their parsers know."""

import importlib
import re
import shlex

import pytest
import typer
from documentation import PAGES, ROOT, STUDY_PAGES, code_blocks, name_of, prose
from transformers import HfArgumentParser
from transformers.cli.serve import Serve


FOREIGN = {"hf", "git", "cd", "dd", "lm_eval", "mkdir", "mlx_lm", "pip", "sh", "systemd-run", "transformers", "vllm"}

# Parts of `./run` that are a script or package of examples/.
MODULES = {
    "quickstart": "quickstart",
    "facts": "store_facts",
    "benchmark": "benchmark.__main__",
    "gpu": "gpu.__main__",
}


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
    """A script of examples/ and its flags, or one of tests/ without any; in front what launches it, of files that exist."""
    place = next(place for place, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[place], words[place + 1 :]
    assert all((ROOT / word).exists() for word in words[: place + 1] if "/" in word), words
    if script.startswith("tests/"):
        assert not flags, words
    else:
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
    if part == "study":
        check_flags(f"studies.{rest[0]}.__main__", rest[1:], monkeypatch)
    elif part in MODULES:
        check_flags(MODULES[part], rest, monkeypatch)
    else:
        assert part in ("tests", "checks")
        assert all((ROOT / word).exists() for word in rest if "/" in word), rest


def check_pip(words):
    """What is installed: this package from a clone, with extras that it has."""
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
    assert extras, words
    optional = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = re.findall(r"^(\w+) = \[", optional, flags=re.M)
    assert set(filter(None, (extras[1] or "").split(","))) <= set(known), words


def check_launch_file(words, monkeypatch):
    """Variables that a launch file reads, in front of it, and the script that it launches."""
    place = next(place for place, word in enumerate(words) if "=" not in word)
    text = (ROOT / words[place]).read_text()
    assert all(f"${{{word.partition('=')[0]}:-" in text for word in words[:place]), words
    check_script([*words, "--ep_size", "8"], monkeypatch)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_command(words, monkeypatch):
    words = words[1:] if words[0].startswith("PYTHONPATH=") else words
    program, *rest = words[1:] if words[:2] == ["./run", "python"] else words
    if program == "./run":
        check_run(rest, monkeypatch)
    elif rest[:2] == ["-m", "modeling_peer.serving"]:
        check_serving(rest[2:])
    elif program in ("python", "accelerate", "sbatch") and rest[0] != "-m":
        check_script(rest, monkeypatch)
    elif words[:2] == ["pip", "install"] or rest[:3] == ["-m", "pip", "install"]:
        check_pip(rest)
    elif re.match(r"[A-Z_]+=|configuration/launch/", program):
        check_launch_file(words, monkeypatch)
    else:  # programs that no test starts: what follows them is not ours
        assert (rest[1] if rest[:1] == ["-m"] else program).partition(".")[0] in FOREIGN, words
