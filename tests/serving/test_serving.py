# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m modeling_peer.serving` answers an OpenAI client with what `generate` generates."""

import os
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from graft_models import PLACEMENTS, grafted
from preloaded import start_python
from tiny_models import tiny_config, tiny_model
from word_tokenizer import word_tokenizer


ROOT = Path(__file__).parents[2]

PROMPT = "w5 w40 w17 w3 w22 w9"
CHAT = [{"role": "user", "content": PROMPT}]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NEW_TOKENS = 8


def start_server(folder, *arguments):
    """Starts the command with its arguments; its process, the file with what it prints, and its address."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = ["-m", "modeling_peer.serving", *arguments, "--port", port, "--device", "cpu"]
    return start_python(arguments, environment, folder / port), folder / port, f"http://localhost:{port}"


def client_of(process, output, address):
    """A client of a server, once it answers."""
    while True:
        assert process.is_alive(), output.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health")
            return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        except urllib.error.URLError:
            time.sleep(0.1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of each model with its tokenizer, and the text with which it continues the prompt."""
    tokenizer, found = word_tokenizer(), {}
    tokenizer.chat_template = CHAT_TEMPLATE
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    models = {"peer": tiny_model(tiny_config()), "graft": grafted(**PLACEMENTS["in_place"]).merge_and_unload()}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        continued = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        found[name] = (str(folder), tokenizer.decode(continued[0, tokens.shape[1] :]))
    return found


@pytest.fixture(scope="module")
def clients(checkpoints, tmp_path_factory):
    """Clients of a server of any model, and of one of a single model in continuous batches."""
    folder = tmp_path_factory.mktemp("servers")
    flags = ("--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64")
    servers = {"any": start_server(folder), "batches": start_server(folder, checkpoints["peer"][0], *flags)}
    yield {name: client_of(*server) for name, server in servers.items()}
    for process, *_ in servers.values():
        process.terminate()
        process.join()


# What generates a text, and what each of the parts that are streamed adds to it.
ENDPOINTS = {
    "completions": (
        lambda client, **options: client.completions.create(prompt=PROMPT, max_tokens=NEW_TOKENS, **options),
        lambda answer: answer.choices[0].text,
        lambda part: part.choices[0].text,
    ),
    "chat": (
        lambda client, **options: client.chat.completions.create(messages=CHAT, max_tokens=NEW_TOKENS, **options),
        lambda answer: answer.choices[0].message.content,
        lambda part: part.choices[0].delta.content or "",
    ),
    "responses": (
        lambda client, **options: client.responses.create(input=PROMPT, max_output_tokens=NEW_TOKENS, **options),
        lambda answer: answer.output_text,
        lambda part: part.delta if part.type == "response.output_text.delta" else "",
    ),
}


@pytest.mark.parametrize(
    ("server", "model", "endpoint"),
    [("any", "peer", "completions"), ("any", "graft", "responses"), ("batches", "peer", "chat")],
)
def test_it_answers_what_generate_generates(clients, checkpoints, server, model, endpoint):
    ask, text_of, addition_of = ENDPOINTS[endpoint]
    folder, expected = checkpoints[model]
    options = {"model": folder, "temperature": 0}
    assert text_of(ask(clients[server], stream=False, **options)) == expected
    assert "".join(map(addition_of, ask(clients[server], stream=True, **options))) == expected


def test_a_server_of_one_model_loads_no_other_folder(clients, checkpoints):
    served, other = checkpoints["peer"][0], checkpoints["graft"][0]
    for name in (other, f"{served}/../{Path(served).name}", f"{served}/../../..", "../../../etc"):
        with pytest.raises(openai.BadRequestError):
            clients["batches"].completions.create(model=name, prompt=PROMPT, max_tokens=1)
