# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The page on which to explore experts: what it carries, and its use in a browser."""

import json
import re
import shutil
import subprocess
from html import unescape

import make_explorer_page
import pytest
from documentation import ROOT
from explorer import ExpertContexts, save_explorer_page
from main_runs import run_main
from tiny_models import random_tokens, tiny_config, tiny_model
from word_tokenizer import word_tokenizer


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ENDING = "<!--<script></script><b>"  # a token that would change where the script ends that holds the data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    model, tokenizer = tiny_model(tiny_config("peer", "pkm")), word_tokenizer(last=ENDING)
    texts = [f"{ENDING} {tokenizer.decode(random_tokens(10))}", "w1 w2"]
    contexts = ExpertContexts.measure(model, tokenizer, [tokenizer.decode(random_tokens(99))], progress_bar=False)
    file = tmp_path_factory.mktemp("explorer") / "page.html"
    save_explorer_page(model, tokenizer, texts, file, contexts=contexts, title="A < B")
    return file


def data_of(page):
    return json.loads(re.search(r'<script id="data".*?>(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", text)
    assert "A &lt; B" in text and "{{" not in text
    first, second = data_of(page)
    assert first["tokens"][0] == ENDING and second["tokens"] == ["w1", "w2"]


def in_browser(page, script, *flags):
    """The value of `result` after a script in the page."""
    used = page.with_name("used.html")
    script = f"<script>let result; {script} document.title = JSON.stringify(result);</script></body>"
    used.write_text(page.read_text().replace("</body>", script))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000", *flags]
    shown = subprocess.run([BROWSER, *flags, used.as_uri()], capture_output=True, text=True, timeout=120).stdout
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", shown, re.DOTALL)[1]))


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to use the page in")


@needs_browser
def test_tokens_and_experts_in_a_browser(page):
    """The keyboard goes from token to token; an expert that is chosen marks the tokens that use it."""
    key = 'document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "%s", bubbles: true}));'
    presses = "".join(key % name for name in ("End", "Home", "ArrowRight", "ArrowRight", "ArrowRight"))
    script = f'document.querySelector("#tokens button").focus();{presses}'
    script += """document.querySelector("#layers button").click();
    result = [...document.querySelectorAll("#tokens button")].map((each) => [each.ariaPressed, each.className]);"""
    tokens = in_browser(page, script)
    first, _ = data_of(page)
    (expert, *_), *_ = first["layers"]["layer_0"][3]
    uses = [any(each == expert for each, *_ in own) for own in first["layers"]["layer_0"]]
    assert tokens == [[str(place == 3).lower(), "uses" if use else ""] for place, use in enumerate(uses)]


@needs_browser
def test_a_token_is_raised_in_the_list_and_in_the_panel_alike(page):
    """Whatever the sign of the coefficient, which stands beside; and experts that can be switched off are marked."""
    script = """
    result = [...document.querySelectorAll("#tokens button")].flatMap((_, token) => {
      document.querySelectorAll("#tokens button")[token].click();
      return [...document.querySelectorAll("#layers button")].map((_, place) => {
        document.querySelectorAll("#layers button")[place].click();
        const columns = [...document.querySelectorAll("#layers button")[place].children].map((each) => each.textContent);
        const words = [...document.querySelectorAll("#expert .word")].slice(0, 12).map((each) => each.textContent);
        return [...columns, words, document.querySelector("#expert h3").textContent, !!document.querySelector(".switch")];
      });
    });"""
    found = in_browser(page, script)
    first, _ = data_of(page)
    uses = [(layer, use) for token in range(11) for layer in first["layers"] for use in first["layers"][layer][token]]
    signs = set()
    for (layer, (expert, _, coefficient)), shown in zip(uses, found, strict=True):
        index, _, _, number, raised, words, heading, switch = shown
        own = first["experts"][layer][str(expert)]
        both = [own["lowers"], own["raises"]] if coefficient < 0 else [own["raises"], own["lowers"]]
        assert words == [*both[0], *both[1]] and raised == " ".join(both[0])
        assert float(number.replace("\N{MINUS SIGN}", "-")) == pytest.approx(coefficient, rel=0.06)
        assert heading.endswith(number)
        assert switch == ("without" in own) and index == f"{expert} •" * switch + str(expert) * (not switch)
        signs.add(coefficient < 0)
    assert signs == {True, False}


@needs_browser
def test_white_space_is_seen_and_colors_follow_the_system(page):
    spaces = page.with_name("spaces.html")
    spaces.write_text(page.read_text().replace('"tokens": ["w1", "w2"]', r'"tokens": ["   ", "\r"]'))
    script = """
    document.getElementById("text").value = 1;
    document.getElementById("text").dispatchEvent(new Event("change"));
    const color = (name) => Number(getComputedStyle(document.body)[name].match(/\\d+/)[0]);
    result = [[...document.querySelectorAll("#tokens button")].map((each) => each.textContent),
              color("color") > color("backgroundColor")];"""
    for preferred, is_dark in ((0, True), (1, False)):
        flag = f"--blink-settings=preferredColorScheme={preferred}"
        assert in_browser(spaces, script, flag) == [["␣␣␣", "U+000d"], is_dark]


def test_the_script_saves_a_page_and_names_a_tokenizer_that_is_missing(tmp_path, capsys):
    checkpoint, page = ROOT / "examples" / "checkpoints" / "peer-nano", tmp_path / "page.html"
    flags = ("--text", "def f(x):", "--num_switched_off", 1, "--output_file", page)
    run_main(make_explorer_page, "--model_name_or_path", checkpoint, *flags)
    assert "".join(data_of(page)[0]["tokens"]) == "def f(x):"
    shutil.copytree(checkpoint, tmp_path / "alone", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(SystemExit):
        run_main(make_explorer_page, "--model_name_or_path", tmp_path / "alone", *flags)
    assert "alone has no tokenizer" in capsys.readouterr().err
