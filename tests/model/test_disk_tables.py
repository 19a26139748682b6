# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Expert tables that stay on a disk: the same outputs and gradients, every row read once, and errors of the disk."""

import copy
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from compare_disk import Tables
from graft_models import merged_in_turn
from tiny_models import EXPERTS, GROWN, VARIANTS, random_tokens, tiny_config, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from modeling_peer import PeerForCausalLM, add_experts, keep_tables_on_disk, quantize_experts, train_added_experts_only
from modeling_peer.experts import expert_tables
from modeling_peer.ops.disk_tables import DiskMeter, DiskRows, pieces_from_disk


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="rows are read from a disk on Linux only")

CONFIGS = {name: VARIANTS[name] for name in ("pkm", "peer", "all_in_one")} | GROWN
CONFIGS |= {name: EXPERTS[name] for name in ("gelu-gated-branch-one_pool", "None-plain-alone-own_pool")}
# A buffer of one byte: a token at a time.
BUFFERS = {"whole": 2**26, "by_token": 1}


@pytest.fixture
def saved(tmp_path):
    """Saves a model of a configuration; gives its folder."""

    def save(config, bits=None, **options):
        model = tiny_model(config).to(**options)
        folder = tmp_path / "saved"
        (model if bits is None else quantize_experts(model, bits)).save_pretrained(folder)
        return folder

    return save


def loaded(folder):
    return PeerForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer_bytes", BUFFERS.values(), ids=BUFFERS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_outputs_are_those_of_tables_in_memory(config, buffer_bytes, dtype, saved):
    folder, tokens = saved(config, dtype=dtype), random_tokens(2, 9)
    expected, model = loaded(folder), loaded(folder)
    keep_tables_on_disk(model, buffer_bytes)
    for table in expert_tables(model).values():
        table.weight.data = torch.full_like(table.weight, float("nan"))  # what is in memory is not read
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **options), expected.generate(tokens, **options))


@pytest.mark.parametrize("kernels", ["torch", "eager"])
@torch.no_grad()
def test_on_other_kernels(kernels, saved):
    folder, tokens = saved(VARIANTS["peer"], dtype=torch.float64), random_tokens(2, 9)
    expected, model = loaded(folder), loaded(folder)
    keep_tables_on_disk(model)
    model.config.expert_kernels = kernels
    assert_close(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantized_tables(bits, saved):
    folder, tokens = saved(VARIANTS["all_in_one"], bits), random_tokens(2, 9)
    expected, model = loaded(folder), loaded(folder)
    meter = keep_tables_on_disk(model)
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert meter.num_bytes == meter.num_rows * 24 * bits // 8
    model.config.expert_kernels = "eager"
    assert_close(model(tokens).logits, expected(tokens).logits)


def test_merged_grafts(tmp_path):
    merged_in_turn(25).save_pretrained(tmp_path)
    expected, model = (AutoModelForCausalLM.from_pretrained(tmp_path).eval() for _ in range(2))
    meter = keep_tables_on_disk(model)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert meter.num_rows > 0


@torch.no_grad()
def test_each_row_is_read_once(saved):
    folder, tokens = saved(VARIANTS["peer"]), random_tokens(2, 9)
    model = loaded(folder)
    meter = keep_tables_on_disk(model)
    output = model(tokens, output_router_indices=True)
    rows = output.router_indices[0].unique().numel()
    assert meter.num_rows == 2 * rows < 2 * output.router_indices[0].numel()
    assert meter.num_bytes == 2 * rows * 24 * 4
    assert meter.hit_rate == 1.0 and meter.seconds > 0  # the file was written a moment ago
    meter.reset()
    assert meter.num_rows == 0 and meter.hit_rate != meter.hit_rate


@torch.no_grad()
def test_rows_that_are_not_in_the_page_cache(saved):
    folder, tokens = saved(tiny_config(num_experts=64**2, query_norm="rms")), random_tokens(2, 9)
    model = loaded(folder)
    logits = model(tokens).logits
    meter = keep_tables_on_disk(model)
    tables = Tables(folder)
    tables.places = [(0, (folder / "model.safetensors").stat().st_size)]  # pages come in large groups
    for _ in range(50):  # on a busy machine the disk may be faster than the process
        meter.reset()
        tables.drop()
        assert torch.equal(model(tokens).logits, logits)
        if meter.num_cached < meter.num_rows / 2:
            break
    assert meter.num_cached < meter.num_rows / 2
    first = meter.num_cached, meter.num_rows
    model(tokens)
    assert (meter.num_cached - first[0], meter.num_rows) == (first[1], 2 * first[1])  # all of them


def read_from_file(file, number, width):
    """A table in a file, and what reads its rows."""
    expected = torch.randn(number, width)
    expected.numpy().tofile(file)
    table = nn.Embedding(number, width, _weight=torch.from_file(str(file), size=number * width).view(number, width))
    return expected, DiskRows("table", table, DiskMeter(), 1)


def test_nothing_is_read_beside_the_rows(tmp_path):
    """Rows in order look like a file that is read from end to end, of which the system reads ahead."""
    number, file = 4096, tmp_path / "model.safetensors"
    expected, reader = read_from_file(file, number, 1024)
    places = [(0, file.stat().st_size)]
    tables = SimpleNamespace(path=file, places=places, bytes_in_cache=lambda: Tables.bytes_in_cache(tables))
    Tables.drop(tables)
    rows = torch.arange(0, number, 2)
    found = reader(rows)
    assert tables.bytes_in_cache() <= found.nbytes
    assert torch.equal(found, expected[rows])


def test_a_row_of_which_a_part_was_read_is_missing(tmp_path):
    """As where the page cache has a part of it. Here the file ends in the row, as soon as its state was looked at."""
    file = tmp_path / "model.safetensors"
    expected, reader = read_from_file(file, 4, 1024)
    os.truncate(file, reader.row_bytes * 3 // 2)
    reader.state = reader._state()
    assert torch.equal(reader(torch.tensor([0])), expected[:1])
    with pytest.raises(OSError, match="could not be read from .*: it has ended"):
        reader(torch.tensor([1]))


def test_pieces_have_all_tokens(saved):
    """The last piece has fewer."""
    model, rows = loaded(saved(VARIANTS["peer"])), torch.randint(36, (8, 5))
    keep_tables_on_disk(model, 2 * 3 * 5 * 2 * 24 * 4)
    pool = model.model.layers[0].mlp.expert_pool
    tables = pool.up_proj, None, pool.down_proj
    pieces = list(pieces_from_disk(rows, tables))
    assert [len(places) for _, places, _ in pieces] == [3, 3, 2]
    for tokens, places, (up, _, down) in pieces:
        assert torch.equal(up[places], pool.up_proj.weight[rows[tokens]])
        assert torch.equal(down[places], pool.down_proj.weight[rows[tokens]])


@pytest.mark.parametrize("buffer_bytes", BUFFERS.values(), ids=BUFFERS)
def test_gradients_of_all_else(buffer_bytes, saved):
    folder, tokens = saved(VARIANTS["all_in_one"]), random_tokens(2, 9)
    expected, model = loaded(folder), loaded(folder)
    keep_tables_on_disk(model, buffer_bytes)
    for each in (expected, model):
        each(tokens, labels=tokens).loss.backward()
    tables = {f"{name}.weight" for name in expert_tables(model)}
    for name, parameter in model.named_parameters():
        if name in tables:
            assert not parameter.requires_grad and parameter.grad is None
        else:
            assert_close(parameter.grad, expected.get_parameter(name).grad)


def test_experts_are_added_beside_tables_on_a_disk(saved):
    folder, tokens = saved(VARIANTS["peer"]), random_tokens(2, 9)
    model = loaded(folder)
    before = model(tokens).logits
    keep_tables_on_disk(model)
    add_experts(model, 5**2)
    assert torch.equal(model(tokens).logits, before)
    train_added_experts_only(model)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_they_neither_grow_nor_train(saved):
    model = loaded(saved(VARIANTS["peer"]))
    keep_tables_on_disk(model)
    with pytest.raises(ValueError, match="add experts in protected mode"):
        add_experts(model, 13, mode="open")
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="load the model again to train them"):
        model(random_tokens(2, 9))


def test_it_is_copied_saved_and_compiled(saved, tmp_path):
    folder, tokens = saved(VARIANTS["peer"]), random_tokens(2, 9)
    model = loaded(folder)
    keep_tables_on_disk(model)
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(copy.deepcopy(model)(tokens).logits, logits)
        assert_close(torch.compile(model, backend="aot_eager")(tokens).logits, logits)
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(loaded(tmp_path / "again")(tokens).logits, logits)


def _touched(file):
    os.utime(file, ns=(0, 0))


def _truncated(file):
    os.truncate(file, 4096)


@pytest.mark.parametrize("change", [_touched, _truncated])
def test_a_file_that_changes_is_refused(change, saved):
    folder = saved(VARIANTS["peer"])
    model = loaded(folder)
    keep_tables_on_disk(model)
    change(folder / "model.safetensors")
    with pytest.raises(OSError, match=r"model\.safetensors has changed since the model was loaded"):
        model(random_tokens(2, 9))


def test_a_file_that_is_cut_short_before_is_refused(saved):
    folder = saved(VARIANTS["peer"])
    model = loaded(folder)
    _truncated(folder / "model.safetensors")
    with pytest.raises(OSError, match=r"model\.safetensors is not the file any more"):
        keep_tables_on_disk(model)


@torch.no_grad()
def test_a_file_that_another_one_replaces_is_read_on(saved):
    folder, tokens = saved(VARIANTS["peer"]), random_tokens(2, 9)
    model, later = loaded(folder), loaded(folder)
    logits = model(tokens).logits
    keep_tables_on_disk(model)
    file = folder / "model.safetensors"
    shutil.copy(file, folder / "other")
    os.replace(folder / "other", file)
    assert torch.equal(model(tokens).logits, logits)
    with pytest.raises(OSError, match="model.safetensors"):
        keep_tables_on_disk(later)
    assert torch.equal(later(tokens).logits, logits)  # as it was


@pytest.mark.parametrize("row", [-1, 36])
def test_an_index_without_a_row_is_refused(row, saved):
    model = loaded(saved(VARIANTS["peer"]))
    keep_tables_on_disk(model)
    table = model.model.layers[0].mlp.expert_pool.up_proj
    with pytest.raises(IndexError, match=f"below the number of experts 36, got {row}"):
        table(torch.tensor([3, row]))
    rows = torch.tensor([[3, 5], [5, 3]])
    assert torch.equal(table(rows.int()), table.weight[rows])


def test_a_disk_that_fails_is_named(saved):
    folder = saved(VARIANTS["peer"])
    model = loaded(folder)
    keep_tables_on_disk(model)
    with open(folder / "model.safetensors", "ab") as unreadable:
        for table in expert_tables(model).values():
            table.forward.file = unreadable
        with pytest.raises(OSError, match=r"could not be read from .*model\.safetensors: Bad file descriptor"):
            model(random_tokens(2, 9))


def test_what_has_no_tables_in_a_file_is_refused(saved):
    with pytest.raises(ValueError, match="has no expert tables"):
        keep_tables_on_disk(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.expert_pool\.up_proj is not mapped from a file"):
        keep_tables_on_disk(tiny_model(VARIANTS["peer"]))
    model = loaded(saved(VARIANTS["peer"]))
    keep_tables_on_disk(model)
    with pytest.raises(ValueError, match="on a disk already"):
        keep_tables_on_disk(model)
