# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compares ways to run a model whose expert tables are on a disk: their rows are read together, or pages of the mapped
file one after the other, or whole tables by accelerate, or everything is in memory.

    ./run python examples/compare_disk.py

The checkpoint, of 8.8 GB by default, is written first, one piece of a table at a time. Each way runs in processes of
its own, in turn with the others; a round takes three minutes. If it is interrupted, the same command resumes. A cold
measurement begins without the tables in the page cache; a warm one repeats the same tokens. For comparison, a plain
loop makes as many reads from random places of the same tables, past the page cache.

Two more ways read and map the tables in a control group that limits memory: make one and give its folder.

    mkdir /sys/fs/cgroup/small && echo 1G > /sys/fs/cgroup/small/memory.max
    ./run python examples/compare_disk.py --control_group /sys/fs/cgroup/small
"""

import ctypes
import json
import math
import mmap
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.utils import logging

from common.command_line import parse_arguments
from common.machine import OwnMemory, machine
from modeling_peer import PeerConfig, PeerForCausalLM, keep_tables_on_disk
from modeling_peer.experts import expert_tables
from modeling_peer.memory.advice import advise_huge_pages, advise_whole_access
from studies.common.study_folder import claim_folder, read_json, write_json
from studies.common.tables import markdown_table


FILE, PIECE = "model.safetensors", 2**24
READERS, SECTOR = 16, 4096  # threads of the plain loop, and the bytes of its smallest read
AT_THE_ENDS = 2**24  # bytes of tables that may stay in the page cache, whose pages come in large groups
LABELS = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


@dataclass
class ComparisonArguments:
    """Size of the model, and its workload."""

    num_experts: int = field(default=1024**2, metadata={"help": "Experts of each of two PEER layers, of four layers."})
    hidden_size: int = field(default=1024, metadata={"help": "Width of the model, in bfloat16."})
    prompt_tokens: int = field(default=512, metadata={"help": "Tokens of the prompt."})
    new_tokens: int = field(
        default=128, metadata={"help": "Tokens that are read one at a time after a prompt of as many."}
    )
    rounds: int = field(default=3, metadata={"help": "Turns of each way, of which medians are taken."})
    control_group: str | None = field(
        default=None, metadata={"help": "Folder of a control group with little memory, for two more ways."}
    )
    output_dir: str = field(default="runs/disk", metadata={"help": "Folder of the checkpoint and of results.json."})


def configuration(num_experts: int, hidden_size: int) -> PeerConfig:
    """A decoder of four layers, two of them PEER, each with a pool of its own."""
    return PeerConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=11 * hidden_size // 4,
        num_attention_heads=16,
        num_hidden_layers=4,
        feed_forward_types=["dense", "peer", "dense", "peer"],
        num_experts=num_experts,
        num_retrieval_heads=8,
        eos_token_id=None,
        dtype="bfloat16",
        architectures=["PeerForCausalLM"],
    )


def write_checkpoint(
    folder: Path, config: PeerConfig, fill: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> int:
    """
    Write the checkpoint of a model that is never held in memory.

    Args:
        folder (`Path`)
        config ([`PeerConfig`])
        fill (`Callable`):
            Returns the values of a piece of a tensor (some of its rows), given the tensor's name and an empty piece.
            `None` leaves the rest of the tensor as a hole in the file.

    Returns:
        `int`: the size of the file.
    """
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = PeerForCausalLM(AutoConfig.from_pretrained(folder)).state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start, dtypes = 0, {}
    for name, tensor in state.items():
        is_weight = tensor.dtype == torch.float32 and "running" not in name
        dtypes[name] = torch.bfloat16 if is_weight else tensor.dtype
        size = tensor.numel() * dtypes[name].itemsize
        offsets = [start, start + size]
        header[name] = {"dtype": LABELS[dtypes[name]], "shape": list(tensor.shape), "data_offsets": offsets}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = folder / f"{FILE}.part"
    with open(unfinished, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        file.truncate(begin + start)
        for name, tensor in tqdm(state.items(), "writing"):
            rows = max(PIECE // max(math.prod(tensor.shape[1:]), 1), 1)
            file.seek(begin + header[name]["data_offsets"][0])
            for piece in tensor.split(rows) if tensor.dim() else [tensor]:
                values = fill(name, torch.empty_like(piece, device="cpu"))
                if values is None:
                    break
                file.write(values.to(dtypes[name]).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / FILE)
    return begin + start


def random_values(name: str, piece: torch.Tensor) -> torch.Tensor:
    """
    Weights as at initialization, except that each token retrieves experts of its own. For this, embeddings are large,
    and all sub-keys have the same length: many queries would retrieve the long ones.
    """
    if name.endswith((".bias", "running_mean", "num_batches_tracked")):
        return piece.zero_()
    if "embed" in name or "sub_keys" in name:
        return nn.functional.normalize(piece.normal_(), dim=-1) * piece.shape[-1] ** 0.5
    return piece.fill_(1.0) if "norm" in name or "running_var" in name else piece.normal_(std=0.02)


def places_of_tables(folder: Path) -> list[tuple[int, int]]:
    """The offset of each expert table in the file of a checkpoint, and its size, in bytes."""
    with open(folder / FILE, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    spans = [each["data_offsets"] for name, each in header.items() if "expert_pool" in name]
    return [(8 + size + start, end - start) for start, end in spans]


class Tables:
    """The expert tables in the file of a checkpoint: how much the page cache holds of them, and plain reads."""

    def __init__(self, folder: Path):
        self.path, self.places = folder / FILE, places_of_tables(folder)

    def drop(self) -> None:
        """Drop the tables from the page cache, and check that they are gone. Mapped pages are read again on access."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(str(self.path.resolve())):
                start, end = (int(each, 16) for each in line.split()[0].split("-"))
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
            for start, length in self.places:
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        if (left := self.bytes_in_cache()) > AT_THE_ENDS:
            raise RuntimeError(f"{left / 1e6:.0f} MB of the tables are in the page cache still.")

    def bytes_in_cache(self) -> int:
        """Bytes of the tables that the page cache holds."""
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
            view = torch.frombuffer(mapped, dtype=torch.uint8)
            pages = torch.empty(-(-len(mapped) // mmap.PAGESIZE), dtype=torch.uint8)
            address, vector = (ctypes.c_void_p(each.data_ptr()) for each in (view, pages))
            ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), vector)
            del view
        spans = [
            pages[start // mmap.PAGESIZE + 1 : (start + length) // mmap.PAGESIZE] for start, length in self.places
        ]
        return mmap.PAGESIZE * int((torch.cat(spans) & 1).sum())

    def seconds_per_row(self, number: int, row_bytes: int) -> float:
        """Seconds per row of a plain loop that reads random rows, several at a time, past the page cache."""
        count = number // len(self.places)
        starts = [
            start + int(row) * row_bytes
            for start, length in self.places
            for row in torch.randint(length // row_bytes, (count,))
        ]
        file = os.open(self.path, os.O_RDONLY | os.O_DIRECT)

        def read(own: list[int]) -> None:
            buffer = mmap.mmap(-1, row_bytes // SECTOR * SECTOR + 2 * SECTOR)
            for start in own:
                first, end = start // SECTOR * SECTOR, -(-(start + row_bytes) // SECTOR) * SECTOR
                os.preadv(file, [memoryview(buffer)[: end - first]], first)

        begun = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, [starts[each::READERS] for each in range(READERS)]))
        os.close(file)
        return (time.perf_counter() - begun) / len(starts)


def read_from_disk() -> int:
    """The bytes that this process has read from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def load_in_memory(folder: Path) -> tuple[nn.Module, None]:
    """A model whose tables are copied from the mapped file."""
    model = load_mapped(folder)[0]
    for table in expert_tables(model).values():
        whole = advise_whole_access(table.weight)
        table.weight.data = advise_huge_pages(torch.empty_like(whole)).copy_(whole)
    return model, None


def load_mapped(folder: Path) -> tuple[nn.Module, None]:
    """A model as `from_pretrained` loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), None


def load_from_disk(folder: Path) -> tuple[nn.Module, Any]:
    """A model that reads the rows of its tables together, and the meter of its reads."""
    model = load_mapped(folder)[0]
    return model, keep_tables_on_disk(model)


def load_offloaded(folder: Path) -> tuple[nn.Module, None]:
    """A model whose PEER layers accelerate loads for each forward pass."""
    config = AutoConfig.from_pretrained(folder)
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for layer, kind in enumerate(config.feed_forward_types):
        places[f"model.layers.{layer}"] = "disk" if kind == "peer" else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=folder / "offload")
    return model.eval(), None


IN_MEMORY, DISK, MAPPED, SLOW = "in memory", "rows read together", "mapped file", "accelerate"
LITTLE_MEMORY = ", little memory"
WAYS = {
    IN_MEMORY: load_in_memory,
    DISK: load_from_disk,
    DISK + LITTLE_MEMORY: load_from_disk,
    MAPPED: load_mapped,
    MAPPED + LITTLE_MEMORY: load_mapped,
    SLOW: load_offloaded,
}
WORKER = "--worker"


def read_on(model: nn.Module, output: Any, tokens: torch.Tensor) -> list[int]:
    """The most likely next token after each of `tokens`, which a model reads one at a time, starting from `output`."""
    # The name of the cache depends on the release of Transformers.
    cache, following = next(name for name in ("cache", "past_key_values") if name in output), []
    for token in tokens:
        output = model(token.view(1, 1), **{cache: output[cache]}, use_cache=True)
        following.append(int(output.logits[:, -1].argmax()))
    return following


@torch.no_grad()
def measure(way: str, seed: int, args: ComparisonArguments) -> dict[str, Any]:
    """Measure the seconds and the reads of a way for new tokens and for a prompt, cold and warm."""
    if way.endswith(LITTLE_MEMORY):
        Path(args.control_group, "cgroup.procs").write_text(str(os.getpid()))
    set_seed(seed)
    tables = Tables(Path(args.output_dir))
    # Random tokens read rows of their own. Tokens that a model generates repeat, and so do their experts.
    short, long = (torch.randint(32000, (1, number)) for number in (args.new_tokens, args.prompt_tokens))
    new = torch.randint(32000, (1 if way == SLOW else args.new_tokens,))
    result: dict[str, Any] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        if name.endswith("cold"):
            tables.drop()
        if meter is not None:
            meter.reset()
        read, start = read_from_disk(), time.perf_counter()
        value = run()
        result[name] = {"seconds": time.perf_counter() - start}
        result[name]["read_from_disk"] = read_from_disk() - read
        if meter is not None:
            result[name] |= {"rows": meter.num_rows, "bytes": meter.num_bytes, "hit_rate": meter.hit_rate}
            result[name]["reading"] = meter.seconds
        return value

    with OwnMemory() as memory:
        model, meter = WAYS[way](tables.path.parent)
        model(short)  # does the one-time work of a process
        states = ("warm",) if way == IN_MEMORY else ("cold", "warm")
        for state in states:
            output = model(short, use_cache=True)
            tokens = timed(f"decode, {state}", partial(read_on, model, output, new))
            result[f"decode, {state}"]["seconds"] /= len(new)
        for state in states:
            timed(f"prompt, {state}", lambda: model(long))
    return {**result, "tokens": tokens, "own_memory": memory.peak}


def measure_apart(way: str, seed: int, args: ComparisonArguments) -> dict[str, Any]:
    """[`measure`] in a process of its own."""
    command = [sys.executable, __file__, WORKER, json.dumps([way, seed, asdict(args)])]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure_raw(seed: int, args: ComparisonArguments, found: dict[str, Any]) -> float:
    """Seconds per row of a plain loop that reads as many rows as the new tokens did."""
    set_seed(seed)
    tables = Tables(Path(args.output_dir))
    tables.drop()
    return tables.seconds_per_row(found["decode, cold"]["rows"], 2 * args.hidden_size)


def tables(results: dict[str, Any]) -> str:
    """The results in Markdown, medians over rounds."""
    return "\n\n".join(markdown_table(make(results)) for make in (summary, reads))


def summary(results: dict[str, Any]) -> list[list[str]]:
    """Speed and memory of all ways."""

    def cell(way: str, name: str, value: Callable[[dict], float], form: str) -> str:
        found = [value(each[name]) for each in results["ways"][way] if name in each]
        return format(statistics.median(found), form) if found else ""

    rows = [["", "tokens a second, cold", "warm", "prompt, s, cold", "warm", "own memory, GB"]]
    for way, each in results["ways"].items():
        cells = [cell(way, f"decode, {state}", lambda of: 1 / of["seconds"], ".2f") for state in ("cold", "warm")]
        cells += [cell(way, f"prompt, {state}", lambda of: of["seconds"], ".2f") for state in ("cold", "warm")]
        rows.append([way, *cells, f"{max(of['own_memory'] for of in each) / 1e9:.2f}"])
    return rows


def reads(results: dict[str, Any]) -> list[list[str]]:
    """Reads per token, and their time relative to a plain loop."""
    args = ComparisonArguments(**results["arguments"])
    of_row, of_token = 2 * args.hidden_size, statistics.median(results["seconds_per_raw_row"])
    config = configuration(args.num_experts, args.hidden_size)
    named = 2 * 2 * config.num_retrieval_heads * config.num_experts_per_head * of_row  # two tables of two layers
    rows = [
        [
            "read for a token",
            "rows, KB",
            "of all h k",
            "from the disk, KB",
            "in the page cache",
            "ms",
            "of a plain loop",
        ]
    ]
    for way in (DISK, DISK + LITTLE_MEMORY):
        for state in ("cold", "warm"):
            found = [each[f"decode, {state}"] for each in results["ways"].get(way, [])]
            if not found:
                continue
            own = {name: statistics.median(each[name] for each in found) for name in found[0]}
            size = own["bytes"] / args.new_tokens
            cells = [
                f"{size / 1e3:,.0f}",
                f"{size / named:.2f}",
                f"{own['read_from_disk'] / args.new_tokens / 1e3:,.0f}",
            ]
            loop = own["rows"] / args.new_tokens * of_token
            cells += [f"{own['hit_rate']:.1%}", f"{1e3 * own['reading'] / args.new_tokens:.2f}"]
            cells.append(f"{own['reading'] / args.new_tokens / loop:.2f}" if state == "cold" else "")
            rows.append([f"{way}, {state}", *cells])
    return rows


def main():
    if sys.argv[1:2] == [WORKER]:
        way, seed, values = json.loads(sys.argv[2])
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        print(json.dumps(measure(way, seed, ComparisonArguments(**values))))
        return
    (args,) = parse_arguments((ComparisonArguments,), __doc__)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(args.num_experts, args.hidden_size)
    claim_folder(folder, {"num_experts": args.num_experts, "hidden_size": args.hidden_size})
    if not (folder / FILE).exists():
        write_checkpoint(folder, config, random_values)
    ways = [way for way in WAYS if args.control_group is not None or not way.endswith(LITTLE_MEMORY)]
    arguments = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "rounds")}
    file, settings = folder / "results.json", {"arguments": arguments, "machine": machine()}
    results: dict[str, Any] = {"ways": {way: [] for way in ways}, "seconds_per_raw_row": [], **settings}
    if file.exists() and {**(before := read_json(file)), **settings} == before:
        results = before  # resumes after the finished rounds
    for turn in tqdm(range(len(results["seconds_per_raw_row"]), args.rounds), "rounds"):
        found = {way: measure_apart(way, turn, args) for way in ways}
        tokens = [each.pop("tokens") for each in found.values()]
        if any(each != tokens[0][: len(each)] for each in tokens):
            raise RuntimeError(f"The ways have predicted different tokens: {dict(zip(ways, tokens, strict=True))}.")
        for way, each in found.items():
            results["ways"][way].append(each)
        results["seconds_per_raw_row"].append(measure_raw(turn, args, found[DISK]))
        write_json(file, results)
    print(f"\n\n{tables(results)}\n\nIn {folder}: results.json, and the checkpoint, which you may delete.")


if __name__ == "__main__":
    main()
