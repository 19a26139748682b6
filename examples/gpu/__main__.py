# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Checks and measures PEER on a machine with a GPU.

    ./run gpu

Nothing is installed and no network is needed: it runs on the Python that is there. It ends after --minutes, and the
same command goes on, also when it was killed: first with rows that never ran, part by part, at most eight minutes of
each; then with the others, and with those that failed or were skipped. Every part has a file of results in
--output_dir. Tables are printed last. The exit code is 2 without a GPU, and 1 if a row failed.

| part | |
|---|---|
| `equality` | kernels, optimizer, layer and model against references; waiting, graphs |
| `kernels` | times of kernels beside torch's operators and the bandwidth of a copy |
| `layer` | a layer with a million experts beside PEER-pytorch and a dense one, with floors and peak memory |
| `training` | a PEER model and its dense twin for equal seconds |
| `decode` | one token at a time, with and without CUDA graphs |
| `tuning` | candidates of block sizes and the like, and the lines to change |
| `sanitizer` | accesses out of bounds and races, by compute-sanitizer |
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from common.command_line import parse_arguments
from common.subprocesses import module_command, module_environment
from gpu.report import is_without_failures, report
from gpu.settings import Settings, tiny_sizes
from gpu.wheels import unpack
from gpu.worker import CONTEXT_LOST, PARTS, open_part, part_rows
from modeling_peer.ops.kernels import FASTEST_KERNELS, KERNELS


# Seconds of a part, after which the next one begins.
PART_SECONDS = 480

# Seconds that a row may take: if there are fewer left, none starts.
ROW_SECONDS = {"training": 260, "sanitizer": 280}
MOST_ROW_SECONDS = 50

# The row of a process that ended before any other.
PROCESS = "process"


@dataclass
class GpuArguments:
    """What to check and measure."""

    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Parts: {', '.join(PARTS)}."})
    output_dir: str = field(default="runs/gpu", metadata={"help": "The folder of results, tables and pictures."})
    wheels: str | None = field(default=None, metadata={"help": "A folder with wheels of packages that are missing."})
    overwrite: bool = field(default=False, metadata={"help": "Run again what has results already."})
    device: str = field(default="cuda", metadata={"help": "Device, cuda or cpu. A CPU is for tests, with --tiny."})
    tiny: bool = field(default=False, metadata={"help": "Toy sizes, to try the command."})
    kernels: str | None = field(
        default=None, metadata={"help": "Kernels to run, the fastest of the device if not set."}
    )
    minutes: float = field(default=9.0, metadata={"help": "Minutes after which the command ends."})
    seed: int | None = field(
        default=None, metadata={"help": "Seed of random inputs, another one each time if not set."}
    )

    def __post_init__(self):
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown:
            raise ValueError(f"--parts must be some of {list(PARTS)}, but got {unknown}.")
        if self.device not in FASTEST_KERNELS:
            raise ValueError(f"--device must be one of {sorted(FASTEST_KERNELS)}, but got {self.device!r}.")


def make_settings(args: GpuArguments) -> Settings:
    """The settings of a run. Ends the process if there is no GPU, or if its kernels cannot run."""
    if args.device == "cuda" and not torch.cuda.is_available():
        end_process(2, "There is no GPU here that torch can use: `--device cpu --tiny` tries the command without one.")
    kernels = args.kernels or FASTEST_KERNELS[args.device]
    reason = KERNELS[kernels].unavailable_reason(torch.empty(1, 1, device=args.device))
    if reason is not None:
        end_process(2, f"The kernels {kernels!r} cannot run here: {reason}")
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    sizes = tiny_sizes() if args.tiny else {}
    return Settings(device=args.device, kernels=kernels, output_dir=args.output_dir, seed=seed, **sizes)


def end_process(code: int, sentence: str) -> None:
    """Ends the process with a sentence."""
    print(sentence, file=sys.stderr)
    raise SystemExit(code)


def run_worker(job: dict) -> tuple[int, str]:
    """Runs rows in a process of their own, and returns its exit code and, for people, why it ended."""
    command = module_command("gpu.worker", json.dumps({**job, "parent": os.getpid()}))
    worker = subprocess.Popen(command, env=module_environment(), start_new_session=True)
    try:
        code = worker.wait(max(job["end"] - time.time(), 0))
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL, "It was not over when the time was. The same command runs it again."
    finally:
        if worker.poll() is None:  # with what it started
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    return code, f"Its process was ended by signal {-code}." if code < 0 else f"Its process ended with {code}."


def run_part(part: str, settings: Settings, packages: Path | None, end: float, attempt: str, again: bool) -> None:
    """
    Runs the rows of a part that never ran or, if `again`, all that have no result, until there is no time. A row that
    ends its process fails, and the others go on.
    """
    file = open_part(part, settings)
    if not again:
        end = min(end, time.time() + PART_SECONDS - file.seconds())
    job = {"part": part, "settings": asdict(settings), "packages": packages and str(packages)}
    job |= {"attempt": attempt, "again": again, "end": end}
    job |= {"deadline": end - ROW_SECONDS.get(part, MOST_ROW_SECONDS)}
    names = list(part_rows(part, settings))
    while time.time() < job["deadline"] and any(file.is_due(name, attempt, again) for name in names):
        print(f"\n{part}", flush=True)
        file.forget(PROCESS)
        code, reason = run_worker(job)
        file = open_part(part, settings)
        if code == 0:
            return
        if not file.put_ended(reason, attempt) and code != CONTEXT_LOST:
            file.put(PROCESS, {"error": reason}, attempt)
            return


def rows_ahead(part: str, settings: Settings) -> int:
    """How many rows of a part never ran."""
    return len(part_rows(part, settings).keys() - open_part(part, settings).content["rows"])


def main():
    (args,) = parse_arguments((GpuArguments,), __doc__)
    end, attempt = time.time() + 60 * args.minutes, uuid.uuid4().hex
    settings, folder = make_settings(args), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    packages = None if args.wheels is None else unpack(Path(args.wheels), folder / "packages")
    try:
        with FileLock(folder / ".lock", timeout=0):
            if args.overwrite:
                for part in args.parts:
                    Path(folder, f"{part}.json").unlink(missing_ok=True)
            for again in (False, True):
                for part in args.parts:
                    run_part(part, settings, packages, end, attempt, again)
    except Timeout:
        end_process(1, f"Another process runs in {folder}: wait for it, or choose another --output_dir.")
    print(report(folder))
    if ahead := {part: count for part in args.parts if (count := rows_ahead(part, settings))}:
        print(f"Rows that never ran, with which the same command goes on: {ahead}")
    if not is_without_failures(folder, args.parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
