"""`llmkit` against Hugging Face `Trainer` on one GPU: pre-training of three sizes and LoRA of two, by one command.

    python -m benchmarks.gpu [--jobs 124m,350m,1.3b,lora-1.7b,lora-8b] [--rounds 3] [--steps 20] [--json] [--toy]

Each job has three contenders, every one a process of its own that prints one JSON line: `trainer`, as people run it
(bf16, all else as it comes); `trainer-tuned` (bf16, torch.compile, TF32, fused AdamW, as many rows at a time as the job
says); `llmkit`. All train the same model from the same weights on the same rows in the same order. They take turns, the
order rotates, and ratios are taken within a round. The benchmark fails when works differ: first losses that are not
equal, last losses that are not close, another number of tokens. MFU is of the GPU's published dense bf16 peak.

`--toy` does all of it with tiny models on whatever there is, which shows that it runs and nothing about speed.
Models have random weights: nothing is downloaded. Their vocabulary is that of a tokenizer made here (16k), so their
output layer is smaller than that of models of these sizes elsewhere.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import finetune, pretrain
from benchmarks.pretrain import Clock, check_same_work, spread

WARMUP_STEPS = 3
CONTENDERS = ("trainer", "trainer-tuned", "llmkit")
GOALS = {"mfu": {"124m": 0.42, "350m": 0.47, "1.3b": 0.52}, "trainer": 1.4, "trainer-tuned": 1.1}
"""What is aimed at; no figure of a run."""
LORA_RANK = 16
NO_GPU = 3
"""The exit code without one, as llmkit has it for what is missing."""
_BASELINES = CONTENDERS[:2]


@dataclass(frozen=True)
class Job:
    """A model and how it is trained.

    Attributes:
        work: Of `benchmarks.pretrain`, or of `benchmarks.finetune` for LoRA.
        usual: Rows at a time of Trainer as people run it.
        tuned: Rows at a time of Trainer tuned.
    """

    work: Any
    usual: int
    tuned: int

    @property
    def lora(self) -> bool:
        return isinstance(self.work, finetune.Work)


def _new(hidden: int, layers: int, heads: int, inner: int, rows: int, usual: int, tuned: int) -> Job:
    shape = {"hidden_size": hidden, "layers": layers, "heads": heads, "inner_size": inner}
    return Job(pretrain.Work(rows=rows, context=1024, **shape), usual, tuned)


def _lora(hidden: int, layers: int, heads: int, inner: int, usual: int, tuned: int) -> Job:
    shape = {"hidden_size": hidden, "layers": layers, "heads": heads, "inner_size": inner}
    adapter = {"method": "lora", "rank": LORA_RANK, "dropout": 0.0}
    work = finetune.Work(vocab_size=16_384, mean=384.0, longest=1024, lr=1e-4, adapter=adapter, **shape)
    return Job(work, usual, tuned)


JOBS = {
    "124m": _new(768, 12, 12, 2048, rows=128, usual=8, tuned=32),
    "350m": _new(1024, 24, 16, 2816, rows=128, usual=8, tuned=32),
    "1.3b": _new(2048, 24, 16, 5632, rows=64, usual=4, tuned=16),
    "lora-1.7b": _lora(2048, 28, 16, 6144, usual=8, tuned=16),
    "lora-8b": _lora(4096, 32, 32, 14336, usual=4, tuned=8),
}


def toy(job: Job) -> Job:
    """The same job with a tiny model."""
    small = pretrain.SMOKE
    if not job.lora:
        return Job(small, 2, 4)
    shape = finetune.SMOKE
    return Job(replace(shape, adapter=job.work.adapter, lr=job.work.lr), 8, 16)


def find_machine() -> dict[str, Any]:
    """The device that is measured."""
    from llmkit.hardware import detect_hardware
    from llmkit.recipe.machine import Machine

    found = detect_hardware(Machine())
    return {
        "device": found.device,
        "name": found.device_name,
        "bf16": found.bf16,
        "peak_flops": found.peak_flops,
    }


# --- contenders: each in a process of its own ------------------------------------------------------------------------


def contend(name: str, folder: Path, job: Job, steps: int, *, is_toy: bool) -> dict[str, Any]:
    """Run a contender in this process; return what it took."""
    machine = find_machine()
    on_gpu = machine["device"] == "cuda"
    bf16 = bool(machine["bf16"])
    if name == "llmkit":
        clock, facts = _llmkit(folder, job, steps, machine["device"], compiled=not is_toy)
    else:
        tuned = name == "trainer-tuned"
        options: dict[str, Any] = {"bf16": bf16, "use_cpu": not on_gpu}
        rows = job.tuned if tuned else job.usual
        batch = finetune.BATCH if job.lora else job.work.rows
        options |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batch // rows}
        if tuned:
            options |= {
                "torch_compile": not is_toy,
                "tf32": True if on_gpu else None,
                "optim": "adamw_torch_fused",
            }
        clock, facts = _trainer(folder, job, steps, options)
    wall = [b - a for a, b in pairwise(clock.wall)]
    assert len(wall) == len(clock.losses) == steps, (len(wall), len(clock.losses), steps)
    step_s = statistics.median(wall[WARMUP_STEPS:])
    return {
        "contender": name,
        "wall_s": step_s,
        "first_s": round(sum(wall[:WARMUP_STEPS]), 2),
        "peak_bytes": _peak_bytes(on_gpu),
        "first_loss": clock.losses[0],
        "last_loss": clock.losses[-1],
        "tokens": _tokens(folder, job),
        "precision": "bf16" if bf16 else "fp32",
        **facts,
    }


def _llmkit(
    folder: Path, job: Job, steps: int, device: str, *, compiled: bool
) -> tuple[Clock, dict[str, Any]]:
    machine = {"device": device, "precision": "auto", "compile": compiled}
    if job.lora:
        # Rows of many lengths: each would be compiled anew.
        work = replace(job.work, machine={**machine, "processes": 1, "compile": False})
        clock = finetune.run_llmkit(folder, work, "sft", steps)
        made = max((folder / "runs").glob("*/finetune*/plan.json"), key=lambda path: path.stat().st_mtime)
    else:
        clock, _ = pretrain.run_llmkit(folder, job.work, steps, machine)
        made = max((folder / "runs").glob("*/pretrain*/plan.json"), key=lambda path: path.stat().st_mtime)
    plan = json.loads(made.read_text())
    return clock, {
        "planned_bytes": plan["memory"]["total"],
        "flops_per_token": plan["flops_per_token"],
        "micro_batch": plan["micro_batch_size"],
        "attention": plan["attention"],
        "compile": plan["compile"],
    }


def _trainer(folder: Path, job: Job, steps: int, options: dict[str, Any]) -> tuple[Clock, dict[str, Any]]:
    facts = {
        "micro_batch": options["per_device_train_batch_size"],
        "compile": bool(options.get("torch_compile")),
    }
    if not job.lora:
        return pretrain.run_trainer(folder, job.work, steps, options)[0], facts
    clock = finetune.run_trainer(
        folder, job.work, "sft", steps, grouped=False, wrap=lambda model: _with_lora(model, folder), **options
    )
    return clock, facts


def _with_lora(model: Any, folder: Path) -> Any:
    """The layers that llmkit adapts, with the same rank; both begin at no change at all."""
    from peft import LoraConfig, get_peft_model

    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules=every)
    return get_peft_model(model, config)


def _tokens(folder: Path, job: Job) -> int:
    """Tokens of a step, padding not counted."""
    if not job.lora:
        return int(job.work.rows * job.work.context)
    rows = json.loads((folder / "encoded.json").read_text())
    return round(finetune.BATCH * statistics.mean(len(row["input_ids"]) for row in rows))


def _peak_bytes(on_gpu: bool) -> int:
    import resource

    import torch

    if on_gpu:
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- the benchmark ---------------------------------------------------------------------------------------------------


def in_process(name: str, job: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender (or `prepare`) in a fresh process; its JSON line."""
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor" / name),
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--contender",
        name,
        "--jobs",
        job,
        "--folder",
        str(folder),
    ]
    command += ["--steps", str(arguments.steps), *(["--toy"] if arguments.toy else [])]
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode != 0:
        raise SystemExit(f"{job}: {name} failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def prepare(folder: Path, job: Job, steps: int) -> None:
    """Rows and weights that all contenders begin with."""
    if job.lora:
        finetune.prepare(folder, job.work, "sft", steps)
    else:
        pretrain.prepare(folder, job.work, steps)


def measure_job(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of a job; progress goes to stderr."""
    in_process("prepare", name, folder, arguments)
    rounds = []
    for number in range(arguments.rounds):
        shift = number % len(CONTENDERS)
        order = CONTENDERS[shift:] + CONTENDERS[:shift]
        results = {one: in_process(one, name, folder, arguments) for one in order}
        check_same_work([results[one] for one in CONTENDERS])
        rounds.append(results)
        line = ", ".join(f"{one} {results[one]['wall_s']:.3f}" for one in CONTENDERS)
        print(
            f"{name}, round {number + 1} of {arguments.rounds}, s a step: {line}", file=sys.stderr, flush=True
        )
    return summarise(rounds)


def summarise(rounds: Sequence[dict[str, dict[str, Any]]], peak_flops: float | None = None) -> dict[str, Any]:
    """Per contender: median and range over the rounds, and llmkit's ratios within each round."""
    peak_flops = find_machine()["peak_flops"] if peak_flops is None else peak_flops
    table: dict[str, Any] = {}
    for name in CONTENDERS:
        mine = [one[name] for one in rounds]
        row: dict[str, Any] = {"wall_s": spread([one["wall_s"] for one in mine])}
        row["tokens_per_s"] = round(mine[0]["tokens"] / statistics.median(one["wall_s"] for one in mine))
        row["peak_bytes"] = max(one["peak_bytes"] for one in mine)
        row |= {key: mine[-1][key] for key in ("first_s", "last_loss", "micro_batch", "compile")}
        table[name] = row
    ours = [one["llmkit"] for one in rounds]
    row = table["llmkit"]
    row["planned_bytes"] = ours[-1]["planned_bytes"]
    row["peak_vs_plan"] = round(row["peak_bytes"] / row["planned_bytes"], 3)
    row["mfu"] = (
        round(row["tokens_per_s"] * ours[-1]["flops_per_token"] / peak_flops, 4) if peak_flops else None
    )
    for baseline in _BASELINES:
        row[f"speed_vs_{baseline}"] = spread(
            [one[baseline]["wall_s"] / one["llmkit"]["wall_s"] for one in rounds]
        )
    return table


def print_table(summary: dict[str, Any]) -> None:
    machine = summary["machine"]
    print(
        f"{machine['name']} ({machine['device']}), {summary['rounds']} rounds of {summary['steps']} measured steps"
    )
    if summary["toy"]:
        print("toy models: that it runs, not how fast")
    for job, table in summary["jobs"].items():
        print(f"\n{job:16} {'s/step':>9} {'tokens/s':>10} {'peak GB':>8}")
        for name, row in table.items():
            print(
                f"  {name:14} {row['wall_s']['median']:9.3f} {row['tokens_per_s']:10,} {row['peak_bytes'] / 1e9:8.2f}"
            )
        row = table["llmkit"]
        ratios = ", ".join(
            f"{row[f'speed_vs_{b}']['median']:.2f} x {b} (goal {GOALS[b]})" for b in _BASELINES
        )
        goal = GOALS["mfu"].get(job)  # type: ignore[attr-defined]
        mfu = (
            f", MFU {row['mfu']:.1%}" + (f" (goal {goal:.0%})" if goal else "")
            if row["mfu"] is not None
            else ""
        )
        print(f"  {ratios}{mfu}, peak {row['peak_vs_plan']:.2f} of the plan's")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"comma-separated, of {', '.join(JOBS)}")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default 3)")
    parser.add_argument("--steps", type=int, help="measured steps in each run (default 20)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument(
        "--toy", action="store_true", help="tiny models on any device, one round: does it work?"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/.bench"), help="where it works; removed first"
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    unknown = sorted(set(parsed.jobs.split(",")) - set(JOBS))
    if unknown:
        raise SystemExit(f"no job {', '.join(unknown)}; there are {', '.join(JOBS)}")
    if not parsed.contender:
        parsed.rounds = parsed.rounds or (1 if parsed.toy else 3)
        parsed.steps = (parsed.steps or (2 if parsed.toy else 20)) + WARMUP_STEPS
    return parsed


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    folder = arguments.folder.resolve()
    names = arguments.jobs.split(",")
    if arguments.contender:
        job = toy(JOBS[names[0]]) if arguments.toy else JOBS[names[0]]
        if arguments.contender == "prepare":
            prepare(folder, job, arguments.steps)
            print("{}")
        else:
            print(
                json.dumps(contend(arguments.contender, folder, job, arguments.steps, is_toy=arguments.toy))
            )
        return 0
    machine = find_machine()
    if machine["device"] != "cuda" and not arguments.toy:
        print(f"there is no GPU here ({machine['name']}): --toy shows that all of it runs", file=sys.stderr)
        return NO_GPU
    summary: dict[str, Any] = {
        "machine": machine,
        "versions": pretrain._versions(),
        "toy": arguments.toy,
        "rounds": arguments.rounds,
        "steps": arguments.steps - WARMUP_STEPS,
        "goals": GOALS,
        "jobs": {},
    }
    for name in names:
        place = folder / "gpu" / name  # only what this benchmark made is removed
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        summary["jobs"][name] = measure_job(name, place, arguments)
    print(json.dumps(summary, indent=2)) if arguments.json else print_table(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
