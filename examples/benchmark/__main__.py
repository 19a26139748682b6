# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Benchmarks a PEER layer against other implementations, other layers and the limits of memory and matrix products.

    ./run benchmark

A table of all times is printed; the measurements (results.json) and a plot of them
(results.png) are saved in --output_dir. Every contender runs in processes of its own, in turn with the others,
--rounds times; a time is the median over all rounds. Existing measurements are kept, so that an interrupted benchmark
resumes, unless --overwrite is given.

| section | |
|---|---|
| `forward` | forward of a layer, and of a wide layer |
| `training` | forward and backward, and a training step |
| `experts` | experts of this package without retrieval, in float32 and bfloat16, for even and uneven retrieval |
| `scaling` | forward against the number of experts and of tokens |
| `decode` | decoding of whole models, one token at a time |
| `quantized` | experts in bfloat16, 8 and 4 bits: without retrieval, for many tokens and one, and in decoding |

The floor of an operation is the best time of the machine, in the same benchmark, for the memory traffic of the
distinct retrieved experts and for the products of queries and keys. A forward reads the row of each retrieved expert,
a backward reads it again and writes its gradient, an optimizer step reads and writes it together with its moments.
Reads are measured at random rows, writes in order.
"""

import json
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark.contenders import CONTENDERS, OURS, Task
from benchmark.report import AGAINST, Results, comparison_table, plot, table
from common.command_line import parse_arguments
from common.machine import processor_name
from common.subprocesses import module_command, module_environment
from common.text_data import standard_library
from studies.common.study_folder import write_json


TRAINED_INDICES = "trained_indices.pt"
WORKER = "benchmark.worker"
SECTIONS = ("forward", "training", "experts", "scaling", "decode", "quantized")
PRODUCTS = ("query_product", "query_product_dx", "query_product_dw", "key_product")
ROWS = ("row_read_bag", "row_read_select", "write", "copy")
INTEGER_ROWS = ROWS[1:]  # `F.embedding_bag` takes no integer tables
VERSIONS = ("torch", "transformers", "PEER-pytorch")
LAYERS = ("peer", "peer_eager", "peer_pytorch", "doge_cdmoe", "pkm", "pkm_embedding_bag", "dense", "dense_gated")


@dataclass
class BenchmarkArguments:
    """What to measure, at which sizes, and how often."""

    sections: list[str] = field(
        default_factory=lambda: list(SECTIONS), metadata={"help": f"Sections to measure: {', '.join(SECTIONS)}."}
    )
    contenders: list[str] = field(
        default_factory=lambda: list(CONTENDERS), metadata={"help": "Contenders to measure."}
    )
    output_dir: str = field(default="runs/benchmark", metadata={"help": "The folder of results.json and results.png."})
    overwrite: bool = field(default=False, metadata={"help": "Measure sections again that results.json has already."})
    repetitions: int = field(default=9, metadata={"help": "Number of timed repetitions, over all rounds."})
    rounds: int = field(default=3, metadata={"help": "Number of turns of every contender."})
    dtype: str = field(default="float32", metadata={"help": "Data type of weights and tokens, float32 or bfloat16."})
    allow_fallback: bool = field(
        default=False,
        metadata={"help": "Measure layers of this package even if the C kernels are unavailable."},
    )
    checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A trained model of this package with a pool of the same size and as many active experts. Experts "
            "are also measured on what it retrieves for held-out text."
        },
    )
    against: str | None = field(
        default=None,
        metadata={
            "help": "The folder of another checkout of this project. Its layers are measured in turn with those of "
            "this one, and a table of the ratios of their times is printed."
        },
    )
    num_experts: list[int] = field(
        default_factory=lambda: [1024**2, 512**2],
        metadata={"help": "Numbers of experts N of a layer; the curve against tokens uses the last one."},
    )
    num_tokens: int = field(default=1024, metadata={"help": "Tokens T per batch."})
    hidden_size: int = field(default=512, metadata={"help": "Hidden size d."})
    wide_hidden_size: int = field(default=1024, metadata={"help": "Hidden size of the wide layer."})
    num_retrieval_heads: int = field(default=8, metadata={"help": "Retrieval heads h."})
    num_experts_per_head: int = field(default=16, metadata={"help": "Experts per head k."})
    query_size: int = field(default=256, metadata={"help": "Query size d_k."})
    scaling_num_experts: list[int] = field(
        default_factory=lambda: [64**2, 128**2, 256**2, 512**2, 1024**2],
        metadata={"help": "Numbers of experts of the curve against experts."},
    )
    scaling_num_tokens: list[int] = field(
        default_factory=lambda: [1, 16, 128, 1024, 4096, 16384],
        metadata={"help": "Tokens per batch of the curve against tokens."},
    )

    def __post_init__(self):
        for name, known in (("sections", SECTIONS), ("contenders", (*CONTENDERS, "machine"))):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"--{name} must be some of {list(known)}, but got {unknown}.")
        if self.against is not None:
            self.against = str(Path(self.against).resolve())
            if not Path(self.against, "examples", "benchmark").is_dir():
                raise ValueError(f"--against must be a checkout of this project, got {self.against}.")


def section_tasks(args: BenchmarkArguments) -> dict[str, list[Task]]:
    """All tasks by section, grouped by contender and, within a contender, by size."""

    def tasks(contenders, operations, num_experts, num_tokens=(args.num_tokens,), **fields):
        names = ("hidden_size", "num_retrieval_heads", "num_experts_per_head", "query_size", "dtype")
        fields = {name: getattr(args, name) for name in names} | fields
        return [
            Task(contender, operation, num_experts=experts, num_tokens=tokens, **fields)
            for contender in contenders
            for experts in num_experts
            for tokens in num_tokens
            for operation in operations
        ]

    largest = [max(args.num_experts)]
    wide = {"hidden_size": args.wide_hidden_size}
    skews = ["uniform", "zipf"] + ["trained"] * (args.checkpoint is not None)
    compared = ["peer", "peer_pytorch", "doge_cdmoe", "dense_gated"]
    sections = {
        "forward": tasks(["machine"], ROWS + PRODUCTS, args.num_experts)
        + tasks(["machine"], ROWS + PRODUCTS, largest, **wide)
        + tasks(LAYERS, ["forward"], args.num_experts)
        + tasks(["peer", "dense", "dense_gated"], ["forward"], largest, **wide),
        "training": tasks(["machine"], ROWS + PRODUCTS, args.num_experts)
        + tasks(LAYERS, ["forward_backward", "step"], args.num_experts)
        + tasks(["peer"], ["step_row_moment"], args.num_experts),
        "experts": [
            task
            for dtype in ("float32", "bfloat16")
            for task in tasks(["machine"], ROWS, largest, dtype=dtype)
            + [
                task
                for skew in skews
                for task in tasks(["expert_part"], ["forward", "forward_backward"], largest, dtype=dtype, indices=skew)
            ]
        ],
        "scaling": tasks(compared, ["forward"], args.scaling_num_experts)
        + tasks(
            [name for name in compared if name != "doge_cdmoe"],
            ["forward"],
            args.num_experts[-1:],
            args.scaling_num_tokens,
        ),
        "decode": tasks(["peer-tiny", "dense-tiny"], ["decode"], [128**2], [1], hidden_size=128)
        + tasks(["peer-mid", "dense-mid"], ["decode"], largest, [1]),
        "quantized": tasks(["machine"], ROWS, largest, dtype="bfloat16", **wide)
        + tasks(["machine"], INTEGER_ROWS, largest, dtype="int8", **wide)
        + tasks(
            ["expert_part", "expert_part_int8", "expert_part_int4"],
            ["forward"],
            largest,
            [args.num_tokens, 1],
            dtype="bfloat16",
            indices="uniform",
            **wide,
        )
        + tasks(["peer-mid", "peer-mid_int8", "peer-mid_int4"], ["decode"], largest, [1], dtype="bfloat16", **wide),
    }
    order = ["machine", *CONTENDERS]
    wanted = {"machine", *args.contenders}
    return {
        name: sorted(
            (task for task in dict.fromkeys(sections[name]) if task.contender in wanted),
            key=lambda task: (order.index(task.contender), task.hidden_size, task.num_experts),
        )
        for name in SECTIONS
        if name in args.sections
    }


def conditions(args: BenchmarkArguments) -> dict:
    """Conditions, besides the task, that the measured times depend on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "transparent_huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "versions": {d.name: d.version for d in distributions() if d.name in VERSIONS},
        "checkpoint": args.checkpoint,
    }


def _read(file):
    return Path(file).read_text() if Path(file).is_file() else ""


def save_trained_indices(args: BenchmarkArguments, file: Path) -> None:
    """
    Save the expert indices that the checkpoint's first layer with a router retrieves, of shape `(num_tokens,
    num_active)`. The tokens are the first ones of held-out files of the examples' default text. Raises `ValueError` if
    the checkpoint has another pool size or another number of active experts.
    """
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
    sizes = {name: getattr(model.config, name) for name in ("num_experts", "num_experts_per_tok")}
    expected = {
        "num_experts": max(args.num_experts),
        "num_experts_per_tok": args.num_retrieval_heads * args.num_experts_per_head,
    }
    if sizes != expected:
        raise ValueError(f"--checkpoint must have {expected}, but {args.checkpoint} has {sizes}.")
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    texts = standard_library()["validation"]["text"]
    blocks = [tokenizer(text, truncation=True, max_length=256, return_tensors="pt") for text in texts[:64]]
    with torch.no_grad():
        retrieved = [model(**block, output_router_indices=True).router_indices[0] for block in blocks]
    torch.save(torch.cat([indices[0].flatten(-2) for indices in retrieved]), file)


def make_job(tasks: list[Task], args: BenchmarkArguments, turn: int) -> dict:
    """The job of a worker process: tasks of one contender. Each turn has a seed of its own, and so new tokens."""
    return {
        "tasks": [asdict(task) for task in tasks],
        "seed": turn,
        "facts": turn == 0,
        "repetitions": repetitions_per_turn(args),
        "indices": str(Path(args.output_dir, TRAINED_INDICES).resolve()),
        "allow_fallback": args.allow_fallback,
    }


def repetitions_per_turn(args: BenchmarkArguments) -> int:
    """Repetitions per turn, rounded up."""
    return -(-args.repetitions // args.rounds)


def run_worker(tasks: list[Task], args: BenchmarkArguments, turn: int, checkout: str | None = None) -> list[dict]:
    """
    Measure tasks of one contender in a process of their own, and return one record per task. If `checkout` is given,
    the process runs the code of that checkout.
    """
    job = make_job(tasks, args, turn)
    done = subprocess.run(
        module_command(WORKER, json.dumps(job)),
        cwd=checkout,
        env=module_environment(checkout),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode > 0:
        raise RuntimeError(f"{tasks[0].contender} could not be measured: see the error of its process above.")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    reason = f"its process was ended by signal {-done.returncode}, most likely out of memory"
    return records + [{**asdict(task), "seconds": [], "reason": reason} for task in tasks[len(records) :]]


class Store:
    """The results file, which is written after every worker process, with lookups of missing measurements."""

    def __init__(self, file: Path):
        self.file = file
        self.sections = json.loads(file.read_text()) if file.is_file() else {}

    def open_section(self, name: str, now: dict, overwrite: bool) -> None:
        """Starts or resumes a section. Raises `ValueError` if it was measured under other conditions."""
        section = self.sections.get(name)
        if section is None or overwrite:
            self.sections[name] = {"settings": now, "measurements": []}
            return
        differing = [key for key in now if key != "date" and now[key] != section["settings"].get(key)]
        if differing:
            raise ValueError(
                f"The section {name} in {self.file} was measured with other {differing}: --overwrite measures it "
                "again, another --output_dir keeps both."
            )

    def record_of(self, name: str, task: Task) -> dict | None:
        """The record of a task in a section. `None` if there is none."""
        fields = asdict(task)
        records = self.sections[name]["measurements"]
        return next((r for r in records if {key: r[key] for key in fields} == fields), None)

    def missing(self, name: str, tasks: list[Task], repetitions: int) -> list[Task]:
        """Tasks that have fewer repetitions so far, except those recorded as impossible to measure."""
        records = [self.record_of(name, task) for task in tasks]
        return [
            task
            for task, record in zip(tasks, records, strict=True)
            if record is None or ("reason" not in record and len(record["seconds"]) < repetitions)
        ]

    def add(self, name: str, records: list[dict]) -> None:
        """Adds repetitions to the existing records, and writes the file atomically."""
        for new in records:
            record = self.record_of(name, Task(**{key: new[key] for key in Task.__dataclass_fields__}))
            if record is None:
                self.sections[name]["measurements"].append(new)
            else:
                record.update(new, seconds=record["seconds"] + new["seconds"])
        write_json(self.file, self.sections)


def measure_sections(args: BenchmarkArguments, store: Store) -> None:
    """Measure all sections; within each, the contenders take turns."""
    sections = section_tasks(args)
    for name in sections:
        store.open_section(name, conditions(args), args.overwrite)
        if args.against is not None:
            store.open_section(name + AGAINST, {**conditions(args), "checkout": args.against}, args.overwrite)
    turns = [
        (name, turn, list(tasks))
        for name, section in sections.items()
        for turn in range(args.rounds)
        for _, tasks in groupby(section, key=lambda task: task.contender)
    ]
    with tqdm(turns) as bar:
        for name, turn, tasks in bar:
            bar.set_description(f"{name}: {tasks[0].contender}")
            sides: list[tuple[str, tuple[str, ...]]] = [(name, ())]
            if args.against is not None and tasks[0].contender in OURS:
                sides.insert(turn % 2, (name + AGAINST, (args.against,)))
            for side, checkout in sides:
                if missing := store.missing(side, tasks, (turn + 1) * repetitions_per_turn(args)):
                    store.add(side, run_worker(missing, args, turn, *checkout))


def main():
    (args,) = parse_arguments((BenchmarkArguments,), __doc__)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / "results.json")
    trained_indices = folder / TRAINED_INDICES
    if args.checkpoint is not None:
        save_trained_indices(args, trained_indices)
    measure_sections(args, store)
    trained_indices.unlink(missing_ok=True)
    results = Results(store.sections)
    plot(results, folder / "results.png")
    for name in args.sections:
        print(f"\n{name}\n{table(results, name)}")
    if args.against is not None:
        print(f"\nover {args.against}\n{comparison_table(results, args.sections)}")
    print(f"\nIn {folder}: results.json, results.png")


if __name__ == "__main__":
    main()
