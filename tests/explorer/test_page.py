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
"""The page in a browser: what it shows, and what the keyboard does."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import ROOT
from tiny_models import random_tokens, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_tokenizer import word_tokenizer

from modeling_peer.explorer import ExpertContexts, make_app, save_explorer_page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ENDING = "<!--<script></script><b>"  # a token that would change where the script ends that holds the data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    tokenizer = word_tokenizer(last=ENDING)
    model = tiny_model(tiny_config("peer", "pkm"))
    texts = [f"{ENDING} {tokenizer.decode(random_tokens(10))}", "w1 w2"]
    contexts = ExpertContexts.measure(model, tokenizer, [tokenizer.decode(random_tokens(99))], progress_bar=False)
    file = tmp_path_factory.mktemp("explorer") / "page.html"
    save_explorer_page(model, tokenizer, texts, file, contexts=contexts, title="A < B")
    return file


def data_of(page):
    return json.loads(re.search(r'<script id="data".*?>(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_needs_nothing_else(page):
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", text)
    assert "A &lt; B" in text and "{{" not in text
    first, second = data_of(page)
    assert first["tokens"][0] == ENDING and second["tokens"] == ["w1", "w2"]


@pytest.mark.skipif(BROWSER is None, reason="the page is used in Chromium or Chrome, which is not installed")
class TestInABrowser:
    def shown(self, page, script):
        """The page after a script has used it."""
        file = page.with_name("used.html")
        file.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000"]
        done = subprocess.run([BROWSER, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
        return done.stdout

    def test_tokens_experts_and_switches(self, page):
        first, _ = data_of(page)
        (expert, *_), *_ = first["layers"]["layer_0"][3]
        neighbor = first["experts"]["layer_0"][str(expert)]["neighbors"][0][0]
        key = 'document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "%s", bubbles: true}));'
        presses = "".join(key % name for name in ("End", "Home", "ArrowRight", "ArrowRight", "ArrowRight"))
        shown = self.shown(
            page,
            'document.querySelector("#tokens button").focus();'
            + presses
            + 'document.querySelector("#layers .expert").click();'
            + 'const button = document.querySelector(".switch"); if (button) button.click();',
        )
        assert f"Token 3: {first['tokens'][3]}" in shown
        tokens = re.findall(r'<button [^>]*aria-label="[^"]*: (?:the first token|loss [^"]*)"[^>]*>', shown)
        assert len(tokens) == 11
        assert ['aria-pressed="true"' in token for token in tokens].index(True) == 3
        uses = [any(each == expert for each, *_ in own) for own in first["layers"]["layer_0"]]
        assert ['class="uses"' in token for token in tokens] == uses
        assert f"Expert {expert} of layer 0" in shown
        assert str(neighbor) in shown
        own = first["experts"]["layer_0"][str(expert)]
        assert ("Switched off" in shown) == ("without" in own)
        if "without" in own:
            change = own["without"]["losses"][2] - first["losses"][2]
            assert f"{abs(change):.2f} without the expert" in shown
        assert '<div class="context"' in shown

    def test_code_keeps_its_lines(self, tmp_path):
        """Of a trained model: a token may end a line and indent the next one, and a context may be of the end of a line."""
        folder = ROOT / "examples" / "checkpoints" / "peer-nano"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        text, file = "try:\n    pass\n", tmp_path / "page.html"
        contexts = ExpertContexts.measure(model, tokenizer, [text], progress_bar=False)
        save_explorer_page(model, tokenizer, [text], file, contexts=contexts, num_switched_off=0)
        assert data_of(file)[0]["tokens"] == ["try", ":", "\n   ", " pass", "\n"]
        last = 'document.querySelectorAll("#tokens button")[4].click(); document.querySelector("#layers .expert").click();'
        shown = self.shown(file, last)
        assert re.search(r">⏎</button><br> {3}<button [^>]*> pass</button><button [^>]*>⏎</button><br></div>", shown)
        assert "<b>⏎</b>\n" in shown

    def test_offers_the_experts_that_it_can_switch_off(self, page):
        first, _ = data_of(page)
        expert = next(expert for expert, own in first["experts"]["layer_0"].items() if "without" in own)
        offered = re.search(r"Experts that this page can switch off</h3>(.*?)</ul>", self.shown(page, ""))[1]
        assert f">{expert}</button>" in offered
        shown = self.shown(page, 'document.querySelector("#expert .link").click();')
        assert f"Expert {expert} of layer 0" in shown and "Switch it off" in shown

    def test_another_text(self, page):
        shown = self.shown(
            page, 'const s = document.querySelector("#text"); s.value = "1"; s.dispatchEvent(new Event("change"));'
        )
        assert "Token 0: w1" in shown and 'id="choice"' in shown


def test_the_app_names_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match="install the extra `explorer`"):
        make_app(None, None)


def test_the_space_asks_for_what_the_package_needs():
    """Its requirements are those of the package, which lies beside it, and of the app."""
    root = Path(__file__).parents[2]
    lists = dict(re.findall(r"^(\w+) = (\[.*\])$", (root / "pyproject.toml").read_text(), re.M))
    needed = json.loads(lists["dependencies"]) + json.loads(lists["explorer"])
    assert (root / "examples/explorer_space/requirements.txt").read_text().split() == needed
