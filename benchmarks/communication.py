"""What sending less gains on a slow link: seconds and bytes of a step between two network namespaces of this machine.

    python -m benchmarks.communication [--rate 200mbit] [--rounds 3] [--preset gpt-mini] [--json] [--smoke]

Two processes train together by the real command line, each in a network namespace of its own; the only way between them
is a link whose rate is limited (`tc`, both directions). Every contender is a run of its own; each round runs all of
them, in rotating order, and ratios are taken within a round. Seconds and bytes are of steps after the first, as the
processes see them: bytes are what the link's own counter says that the first of them sent. A step of `accumulate 4`
holds four times the rows, and its figures are given for the rows of one plain step.

Needs root on Linux, `ip` and `tc`, and says so with exit code 3 where it has not got them; the namespaces are removed
at the end.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

EVERY, TIMES = 4, 4
MARKS = "LLMKIT_BENCH_MARKS"
MODULE = "benchmarks.communication"
PORT = 29_611
CONTENDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"gradients": "fp16"},
    "powersgd rank 4": {"gradients": "powersgd", "rank": 4},
    f"accumulate {TIMES}": {},
    f"local steps {EVERY}": {"local_steps": {"every": EVERY, "lr": 0.7, "momentum": 0.9}},
}


@dataclass(frozen=True)
class Work:
    """What every contender trains."""

    preset: str = "gpt-mini"
    vocab_size: int = 4096
    context: int = 64
    rows: int = 4
    steps: int = 8

    def recipe(self, name: str) -> dict[str, Any]:
        """The recipe of a contender: one step to warm up, then those that count."""
        times = TIMES if name.startswith("accumulate") else 1
        return {
            "llmkit": 1,
            "name": name.replace(" ", "-"),
            "tokenize": {"vocab_size": self.vocab_size},
            "pretrain": {
                "model": {"preset": self.preset, "context": self.context},
                "data": {"name": "stdlib", "files": "stdlib:docs", "limit": "400KB"},
                "held_out": 0.0,
                "train": {
                    "length": f"{self.steps + 2} steps",
                    "batch": f"{self.rows * times} samples",
                    "optim": {"lr": 1e-3, "warmup": "never"},
                },
                "checkpoint": {"every": "never"},
                "eval": {"every": "never"},
            },
            "machine": {
                "device": "cpu",
                "precision": "fp32",
                "compile": False,
                "attention": "sdpa",
                "micro_batch": self.rows // 2,
                "communication": CONTENDERS[name],
            },
        }


@contextmanager
def two_nodes(rate: str | None) -> Iterator[list[str]]:
    """Two network namespaces with a link between them; gives their names.

    Args:
        rate: The most that goes through it in each direction, as `tc` takes it; None: as fast as it is.
    """
    names = [f"llmkit-{os.getpid()}-{number}" for number in (1, 2)]
    ends = [f"lk{os.getpid() % 100_000}{side}" for side in "ab"]
    try:
        for name in names:
            _do("ip", "netns", "add", name)
            _do("ip", "-n", name, "link", "set", "lo", "up")
        pair = f"{ends[0]} netns {names[0]} type veth peer {ends[1]} netns {names[1]}"
        _do("ip", "link", "add", *pair.split())
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            _do("ip", "-n", name, "link", "set", end, "name", "wire")
            _do("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "wire")
            _do("ip", "-n", name, "link", "set", "wire", "up")
            if rate is not None:
                shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
                _do("tc", "-n", name, "qdisc", "add", "dev", "wire", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def lacking() -> str:
    """What this machine lacks for two namespaces with a limited link between them; empty: nothing. It tries."""
    tools = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if tools:
        return f"no {' and no '.join(tools)} here: apt-get install iproute2 (Debian), dnf install iproute-tc (Fedora)"
    try:
        with two_nodes("1gbit"):
            return ""
    except CannotError as cannot:
        return f"{cannot}: network namespaces need root on Linux (in a container: CAP_NET_ADMIN and CAP_SYS_ADMIN)"


class CannotError(Exception):
    """A command of `ip` or `tc` failed; its words."""


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotError(f"{' '.join(words)}: {done.stderr.strip()}")


def run(name: str, work: Work, nodes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train with a contender on both nodes; seconds and bytes of a plain step's rows, and the losses."""
    recipe, marks = folder / f"{name}.json", folder / "marks.json"
    recipe.write_text(json.dumps(work.recipe(name)))
    runs = folder / "runs"
    words = ["pretrain", str(recipe), "--runs", str(runs), "-q", "--fresh"]
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": "wire",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", node, sys.executable, "-W", "ignore", "-m", MODULE, "--worker", *words],
            env={**os.environ, **world, "RANK": str(rank), MARKS: "" if rank else str(marks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, node in enumerate(nodes)
    ]
    try:
        said = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # it has ended, unless this one is ended
    if any(process.returncode for process in processes):
        raise SystemExit(f"{name}: {said[0]}\n{said[1]}")
    return read(name, work, marks, runs / name.replace(" ", "-") / "pretrain")


def read(name: str, work: Work, marks: Path, folder: Path) -> dict[str, Any]:
    """The figures of a run."""
    seen = [(mark["seconds"], mark["bytes"]) for mark in json.loads(marks.read_text())][1 : work.steps + 2]
    assert len(seen) == work.steps + 1
    times = TIMES if name.startswith("accumulate") else 1
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(seen)]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    plan = json.loads((folder / "plan.json").read_text())
    return {
        "contender": name,
        "seconds": sum(seconds for seconds, _ in steps) / len(steps) / times,
        "bytes": sum(size for _, size in steps) / len(steps) / times,
        "planned": plan["communication"].get("bytes_per_step", 4 * plan["num_parameters"]) / times,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def worker(words: Sequence[str]) -> int:
    """The command line, with a mark of time and of the link's counter before every step."""
    from llmkit.cli import main as command
    from llmkit.train import loop

    step, marks = loop.train_step, []
    counter = Path("/sys/class/net/wire/statistics/tx_bytes")

    def marked(*given: Any) -> Any:
        marks.append({"seconds": time.perf_counter(), "bytes": int(counter.read_text())})
        return step(*given)

    loop.train_step = marked
    code = command(list(words))
    if os.environ[MARKS]:
        Path(os.environ[MARKS]).write_text(json.dumps(marks))
    return int(code or 0)


def measure(work: Work, rate: str | None, rounds: int, names: Sequence[str] = tuple(CONTENDERS)) -> list[Any]:
    """All contenders, round by round: their figures by name."""
    found = []
    with two_nodes(rate) as nodes, tempfile.TemporaryDirectory() as place:
        for turn in range(rounds):
            order = [*names[turn % len(names) :], *names[: turn % len(names)]]
            found.append({name: run(name, work, nodes, Path(place)) for name in order})
    return found


def summary(found: Sequence[dict[str, Any]], work: Work, rate: str | None) -> dict[str, Any]:
    """Ratios to plain within a round, their median and range; fails where works differ."""
    rows = {}
    for name in found[0]:
        first = {one[name]["first_loss"] for one in found} | {one["plain"]["first_loss"] for one in found}
        if not name.startswith("accumulate") and max(first) - min(first) > 1e-4:
            raise SystemExit(f"{name}: not the same work: first losses {sorted(first)}")
        ratios = [one[name]["seconds"] / one["plain"]["seconds"] for one in found]
        rows[name] = {
            "seconds": round(statistics.median(one[name]["seconds"] for one in found), 4),
            "ratio": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "bytes": round(statistics.median(one[name]["bytes"] for one in found)),
            "planned": round(found[0][name]["planned"]),
            "last_loss": round(statistics.median(one[name]["last_loss"] for one in found), 3),
        }
    return {
        "rate": rate,
        "preset": work.preset,
        "rounds": len(found),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "contenders": rows,
    }


def main() -> int:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what removes the namespaces
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="gpt-mini")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round: does it run?")
    given = parser.parse_args()
    missing = lacking()
    if missing:
        print(f"benchmarks.communication: {missing}", file=sys.stderr)
        return 3
    work = Work(preset=given.preset)
    if given.smoke:
        given.rounds, work = 1, Work(preset="gpt-tiny", vocab_size=512, context=32)
    result = summary(measure(work, given.rate, given.rounds), work, given.rate)
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"{work.preset}, {given.rate}, {given.rounds} rounds, {result['cores']} cores for both processes")
    print(
        f"{'':18}{'s a step':>10}{'of plain':>10}{'range':>16}{'MB sent':>10}{'planned':>10}{'last loss':>11}"
    )
    for name, row in result["contenders"].items():
        spread = "{:.2f} - {:.2f}".format(*row["range"])
        print(
            f"{name:18}{row['seconds']:>10.3f}{row['ratio']:>10.2f}{spread:>16}{row['bytes'] / 1e6:>10.2f}"
            f"{row['planned'] / 1e6:>10.2f}{row['last_loss']:>11.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
