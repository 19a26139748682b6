# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The page on which to explore experts: what it carries, and its use in a browser."""

import json
import re
import shutil
import subprocess

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


@pytest.mark.skipif(BROWSER is None, reason="the page is used in Chromium or Chrome, which is not installed")
def test_tokens_and_experts_in_a_browser(page):
    """The keyboard goes from token to token; an expert that is chosen marks the tokens that use it."""
    key = 'document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "%s", bubbles: true}));'
    presses = "".join(key % name for name in ("End", "Home", "ArrowRight", "ArrowRight", "ArrowRight"))
    script = f'document.querySelector("#tokens button").focus();{presses}'
    script += 'document.querySelector("#layers .expert").click();'
    used = page.with_name("used.html")
    used.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000"]
    shown = subprocess.run([BROWSER, *flags, used.as_uri()], capture_output=True, text=True, timeout=120).stdout
    first, _ = data_of(page)
    (expert, *_), *_ = first["layers"]["layer_0"][3]
    tokens = re.findall(r'<button [^>]*aria-label="[^"]*: (?:the first token|loss [^"]*)"[^>]*>', shown)
    assert ['aria-pressed="true"' in token for token in tokens] == [place == 3 for place in range(11)]
    uses = [any(each == expert for each, *_ in own) for own in first["layers"]["layer_0"]]
    assert ['class="uses"' in token for token in tokens] == uses


def test_the_script_saves_a_page_and_names_a_tokenizer_that_is_missing(tmp_path, capsys):
    checkpoint, page = ROOT / "examples" / "checkpoints" / "peer-nano", tmp_path / "page.html"
    flags = ("--text", "def f(x):", "--num_switched_off", 1, "--output_file", page)
    run_main(make_explorer_page, "--model_name_or_path", checkpoint, *flags)
    assert "".join(data_of(page)[0]["tokens"]) == "def f(x):"
    shutil.copytree(checkpoint, tmp_path / "alone", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(SystemExit):
        run_main(make_explorer_page, "--model_name_or_path", tmp_path / "alone", *flags)
    assert "alone has no tokenizer" in capsys.readouterr().err
