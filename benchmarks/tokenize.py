"""`llmkit tokenize` against other ways from JSON lines to token ids: CPU seconds and memory for the same ids.

    python -m benchmarks.tokenize [--size 100MB] [--rounds 3] [--only llmkit,datatrove] [--json] [--smoke]

Every contender is a process of its own, which reads the same JSONL file (`benchmarks.corpus`), encodes the text with
the same byte-level BPE of 16k entries (learnt once by llmkit from the corpus's first 20 MB; that is not measured) and
writes ids to the disk, on one thread. It prints one JSON line: CPU seconds (user and system, of itself and of all
its children, from its start with all imports to the last byte written), wall seconds, the largest resident set among
its processes, and then, no longer measured, the number of tokens without ends of text and a hash of all ids in
order. Each round runs all contenders, in rotating order, and ratios are taken within a round, so that a machine that
others use too treats all alike. The benchmark fails when numbers of tokens or hashes differ.

- `datasets`: `load_dataset("json")`, `map(tokenize)`, `map(group_texts)`, both batched, as transformers' run_clm.py.
- `datatrove`: JsonlReader and DocumentTokenizer (not shuffling), local executor, one task.
- `tiktoken`: as nanochat writes its shards: batches of texts through `encode_ordinary_batch`, uint16 to a file. The
  encoding is built from our tokenizer's vocabulary and pattern.
- `tokenizers`: a loop with Hugging Face's `encode_batch_fast` into a uint16 memory map.
- `llmkit`: `llmkit tokenize` as it is, with the encoder that it chooses after its own proof, its hashes, its counts.
- `llmkit-tokenizers`: the same, kept to Hugging Face's encoder.

A contender whose package is missing is reported as absent.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.corpus import bytes_of, write_corpus

BLOCK = 1024  # group_texts
BATCH_CHARS = 1_000_000
LEARN_BYTES = 20_000_000
VOCABULARY = 16_000
BASELINES = ("datasets", "datatrove", "tokenizers")
GOALS = {"llmkit": {"datasets": 25.0, "datatrove": 15.0}, "llmkit-tokenizers": {"datasets": 1.7}}


@dataclass(frozen=True)
class Work:
    """Where everything is."""

    corpus: Path
    tokenizer: Path
    folder: Path


Count = Callable[[], Iterable[Any]]
"""After the clock has stopped: all ids in order as arrays, without ends of text."""


# --- contenders: each in a process of its own -------------------------------------------------------------------


def run_datasets(work: Work) -> Count:
    """The two maps of run_clm.py, without its arguments."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(work.tokenizer)
    raw = datasets.load_dataset(
        "json", data_files=str(work.corpus), split="train", cache_dir=str(work.folder / "cache")
    )

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"])

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = {k: list(chain(*examples[k])) for k in examples}
        total = len(joined["input_ids"]) // BLOCK * BLOCK
        result = {k: [t[i : i + BLOCK] for i in range(0, total, BLOCK)] for k, t in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    tokenized = raw.map(tokenize, batched=True, remove_columns=raw.column_names)
    tokenized.map(group_texts, batched=True)

    def ids() -> Iterator[Any]:
        for batch in tokenized.with_format("arrow").iter(1000):
            for chunk in batch["input_ids"].chunks:
                yield chunk.flatten().to_numpy()

    return ids


def run_datatrove(work: Work) -> Count:
    """Its own reader, tokenizer step and executor."""
    import numpy as np
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(work.corpus.parent), glob_pattern=work.corpus.name),
        DocumentTokenizer(
            str(work.folder / "tokens"),
            str(work.tokenizer / "tokenizer.json"),
            shuffle_documents=False,
        ),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(work.folder / "logs")).run()
    return lambda: [np.fromfile(p, np.uint16) for p in sorted((work.folder / "tokens").glob("*.ds"))]


def run_tiktoken(work: Work) -> Count:
    """Batches of texts through tiktoken, each document to an array, appended to a file."""
    import numpy as np

    encoding = tiktoken_of(work.tokenizer)
    path = work.folder / "tokens.bin"
    with path.open("wb") as file:
        for batch in _batches(work.corpus):
            for ids in encoding.encode_ordinary_batch(batch, num_threads=1):
                file.write(np.asarray(ids, np.uint16).tobytes())
    return lambda: [np.fromfile(path, np.uint16)]


def tiktoken_of(folder: Path) -> Any:
    """The tokenizer as tiktoken writes it: bytes to ranks, and the pattern."""
    import tiktoken

    rules = json.loads((folder / "tokenizer.json").read_bytes())
    specials = {token["content"]: token["id"] for token in rules["added_tokens"]}
    as_byte = {char: byte for byte, char in byte_alphabet().items()}
    ranks = {
        bytes(as_byte[char] for char in token): rank
        for token, rank in rules["model"]["vocab"].items()
        if token not in specials
    }
    before = rules["pre_tokenizer"].get("pretokenizers", [rules["pre_tokenizer"]])
    pattern = next(part["pattern"]["Regex"] for part in before if part["type"] == "Split")
    return tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's visible characters for the 256 bytes."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def run_tokenizers(work: Work) -> Count:
    """As little as possible around Hugging Face's fastest call."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work.tokenizer / "tokenizer.json"))
    path = work.folder / "tokens.bin"
    # No text has more byte-level tokens than bytes; what is not written takes no space.
    tokens = np.memmap(path, np.uint16, "w+", shape=(work.corpus.stat().st_size,))
    end = 0
    for batch in _batches(work.corpus):
        for encoded in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids = encoded.ids
            tokens[end : end + len(ids)] = ids
            end += len(ids)
    tokens.flush()
    return lambda: [tokens[:end]]


def _batches(path: Path) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    with path.open("rb") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            size += len(batch[-1])
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def run_llmkit(work: Work) -> Count:
    """The command itself; its shards are in the order of the documents, each ended by the end of text."""
    import numpy as np

    recipe = {"tokenizer": str(work.tokenizer), "data": {"files": str(work.corpus)}, "held_out": 0}
    result = llmkit_tokenize(work.folder, recipe)

    def ids() -> Iterator[Any]:
        end = json.loads((work.tokenizer / "tokenizer.json").read_bytes())["model"]["vocab"]["<|endoftext|>"]
        for path in sorted(Path(result).glob("train-[0-9]*.npy")):
            tokens = np.load(path, mmap_mode="r")
            yield tokens[tokens != end]

    return ids


def llmkit_tokenize(folder: Path, settings: dict[str, Any]) -> Path:
    """Run `llmkit tokenize` on one worker, in this process as the other contenders; the folder of its shards."""
    from llmkit.cli import main as llmkit

    recipe = folder / "bench.yaml"
    recipe.write_text(json.dumps({"llmkit": 1, "name": "bench", "tokenize": settings}))
    words = ["tokenize", str(recipe), "--json", "--runs", str(folder / "runs"), "machine.workers=1"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        code = llmkit(words)
    if code != 0:
        raise SystemExit(f"llmkit tokenize failed with exit code {code}:\n{said.getvalue()[-3000:]}")
    made = sorted((folder / "runs").rglob("train-00000.npy"))
    if len(made) != 1:
        raise SystemExit(f"llmkit tokenize left {len(made)} folders of shards in {folder / 'runs'}")
    return made[0].parent


@dataclass(frozen=True)
class Contender:
    """How it runs, which packages it needs, and what the environment pins."""

    run: Callable[[Work], Count]
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


CONTENDERS = {
    "datasets": Contender(run_datasets, ("datasets", "transformers")),
    "datatrove": Contender(run_datatrove, ("datatrove", "orjson")),
    "tiktoken": Contender(run_tiktoken, ("tiktoken",)),
    "tokenizers": Contender(run_tokenizers, ("tokenizers",)),
    "llmkit": Contender(run_llmkit),
    "llmkit-tokenizers": Contender(run_llmkit, (), (("LLMKIT_ENCODER", "tokenizers"),)),
}


def contend(name: str, work: Work) -> dict[str, Any]:
    """Run a contender in this process; what it took, and what it made."""
    started = time.perf_counter()
    count = CONTENDERS[name].run(work)
    wall = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    import numpy as np

    digest, tokens = hashlib.sha256(), 0
    for ids in count():
        for start in range(0, len(ids), 1 << 20):
            digest.update(np.asarray(ids[start : start + (1 << 20)], np.uint32).tobytes())
        tokens += len(ids)
    return {
        "contender": name,
        "cpu_s": round(sum(u.ru_utime + u.ru_stime for u in used), 3),
        "wall_s": round(wall, 3),
        "peak_bytes": max(u.ru_maxrss for u in used) * 1024,
        "tokens": tokens,
        "ids": digest.hexdigest()[:16],
    }


def learn_tokenizer(corpus: Path, folder: Path) -> Path:
    """A BPE learnt by llmkit from the corpus's first megabytes."""
    folder.mkdir()
    head = folder / "head.jsonl"
    with corpus.open("rb") as source, head.open("wb") as target:
        while target.tell() < LEARN_BYTES and (line := source.readline()):
            target.write(line)
    settings = {"vocab_size": VOCABULARY, "data": {"files": str(head)}, "held_out": 0}
    llmkit_tokenize(folder, settings)
    [found] = (folder / "runs").glob("**/tokenizer/tokenizer.json")
    return found.parent


# --- the benchmark ------------------------------------------------------------------------------------------------


_NOT_PASSED_ON = ("LLMKIT_ENCODER", "PYTHONDONTWRITEBYTECODE")
"""Compiling every imported module anew is not how people run Python."""


def in_process(name: str, work: Work) -> dict[str, Any]:
    """One contender in a fresh process and a fresh folder; its JSON line."""
    folder = work.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    threads = ("OMP", "RAYON", "OPENBLAS", "MKL", "ARROW")
    environment = {
        **{key: value for key, value in os.environ.items() if key not in _NOT_PASSED_ON},
        **{f"{library}_NUM_THREADS": "1" for library in threads},
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        **dict(CONTENDERS[name].environment),
    }
    command = [sys.executable, "-m", "benchmarks.tokenize", "--contender", name, "--folder", str(folder)]
    command += ["--corpus", str(work.corpus), "--tokenizer", str(work.tokenizer)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    shutil.rmtree(folder)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_same_work(results: Sequence[dict[str, Any]]) -> None:
    """Raise SystemExit when a contender made other ids than the first."""
    reference = results[0]
    for result in results[1:]:
        for key in ("tokens", "ids"):
            if result[key] != reference[key]:
                raise SystemExit(
                    f"not the same work: {key} of {result['contender']}: {result[key]}, of "
                    f"{reference['contender']}: {reference[key]}"
                )


def chosen(asked: str) -> tuple[list[str], dict[str, str]]:
    """The contenders to run, and why others are absent."""
    names = asked.split(",") if asked else list(CONTENDERS)
    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown:
        raise SystemExit(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    lacking = {n: [p for p in CONTENDERS[n].needs if find_spec(p) is None] for n in names}
    absent = {n: f"not installed: {', '.join(packages)}" for n, packages in lacking.items() if packages}
    return [n for n in names if n not in absent], absent


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
    }


def summarise(rounds: Sequence[dict[str, dict[str, Any]]], size: int) -> dict[str, Any]:
    """Per contender: median and range over the rounds, and ratios taken within each round."""
    table: dict[str, Any] = {}
    for name in rounds[0]:
        mine = [a_round[name] for a_round in rounds]
        row: dict[str, Any] = {key: spread([r[key] for r in mine]) for key in ("cpu_s", "wall_s")}
        row["mb_per_cpu_s"] = round(size / 1e6 / row["cpu_s"]["median"], 2)
        row["peak_bytes"] = statistics.median(r["peak_bytes"] for r in mine)
        row["tokens"], row["ids"] = mine[0]["tokens"], mine[0]["ids"]
        for baseline in BASELINES:
            if baseline in rounds[0]:
                ratios = [r[baseline]["cpu_s"] / r[name]["cpu_s"] for r in rounds]
                row[f"speed_vs_{baseline}"] = spread(ratios)
        for baseline, goal in GOALS.get(name, {}).items():
            if baseline in rounds[0]:
                reached = row[f"speed_vs_{baseline}"]["median"] >= goal
                row.setdefault("goals", {})[baseline] = {"goal": goal, "reached": reached}
        table[name] = row
    return table


def print_table(summary: dict[str, Any]) -> None:
    print(
        f"{summary['machine']['processor']}, one thread, {summary['bytes'] / 1e6:.0f} MB of JSON lines, ",
        end="",
    )
    print(f"{summary['rounds']} round(s); medians, in brackets the range over the rounds\n")
    heads = (f"x {b}" for b in BASELINES)
    print(f"{'':18} {'MB/CPU s':>9} {'CPU s':>22}" + "".join(f"{h:>22}" for h in heads) + f"{'peak GB':>9}")
    for name, row in summary["contenders"].items():
        cells = "".join(f"{_cell(row.get(f'speed_vs_{b}')):>22}" for b in BASELINES)
        print(
            f"{name:18} {row['mb_per_cpu_s']:9.2f} {_cell(row['cpu_s']):>22}{cells}{row['peak_bytes'] / 1e9:9.2f}"
        )
    for name, why in summary["absent"].items():
        print(f"{name:18} absent ({why})")
    for name, row in summary["contenders"].items():
        for baseline, goal in row.get("goals", {}).items():
            verdict = "reached" if goal["reached"] else "NOT reached"
            print(f"goal: {name} at least {goal['goal']:g} x {baseline}: {verdict}")


def _cell(value: dict[str, float] | None) -> str:
    return f"{value['median']:.2f} [{value['low']:.2f}-{value['high']:.2f}]" if value else "-"


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds; progress goes to stderr."""
    from llmkit.hardware import detect_cpu

    names, absent = chosen(arguments.only)
    corpus = folder / "corpus.jsonl"
    made = write_corpus(corpus, arguments.size, folder=arguments.text)
    print(f"corpus: {json.dumps(made)}", file=sys.stderr, flush=True)
    work = Work(corpus, learn_tokenizer(corpus, folder / "tokenizer"), folder)
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(arguments.rounds):
        shift = number % len(names)
        results = {n: in_process(n, work) for n in names[shift:] + names[:shift]}
        check_same_work([results[n] for n in names])
        rounds.append({n: results[n] for n in names})
        line = ", ".join(f"{n} {results[n]['cpu_s']:.2f}" for n in names)
        print(f"round {number + 1} of {arguments.rounds}, CPU s: {line}", file=sys.stderr, flush=True)
    return {
        "machine": {"processor": detect_cpu().device_name, "system": platform.platform()},
        "versions": _versions(),
        "rounds": arguments.rounds,
        "bytes": made["bytes"],
        "documents": made["documents"],
        "absent": absent,
        "contenders": summarise(rounds, made["bytes"]),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("llmkit", "datasets", "datatrove", "tiktoken", "tokenizers", "gigatoken"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokenize", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--size", type=bytes_of, help="size of the corpus (default 100MB)")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default 3)")
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(CONTENDERS)}")
    parser.add_argument("--text", type=Path, help="a folder of text instead of Python's library")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--smoke", action="store_true", help="2 MB, one round: does it work at all?")
    parser.add_argument("--folder", type=Path, default=Path("runs/.bench"), help="where it works")
    for internal in ("--contender", "--corpus", "--tokenizer"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.size = parsed.size or bytes_of("2MB" if parsed.smoke else "100MB")
    parsed.rounds = parsed.rounds or (1 if parsed.smoke else 3)
    return parsed


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    folder = arguments.folder.resolve()
    if arguments.contender:
        work = Work(Path(arguments.corpus), Path(arguments.tokenizer), folder)
        print(json.dumps(contend(arguments.contender, work)))
        return 0
    folder = folder / "tokenize"  # only what this benchmark made is removed
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        summary = measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(summary, indent=2)) if arguments.json else print_table(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
