import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizing import train_bpe

from llmkit.data.corpus import Corpus
from llmkit.data.pipeline import Engine
from llmkit.data.prepare import unigram_entropy
from llmkit.data.rows import Rows
from llmkit.data.shards import SPLITS, TokenShards, build_shards
from llmkit.data.split import document_hash, is_held_out
from llmkit.data.tokenizers import load_tokenizer
from llmkit.errors import CorruptError, DataError
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.schema import Source

LINES = [f"line {i}: the cat sat on mat {i * i}, 从前有 {i} 座山 <|endoftext|> 😀" for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(LINES, vocab_size=400, folder=folder)
    return load_tokenizer(str(folder))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join(LINES[:150]))
    (tmp_path / "b.txt").write_text("\n".join(LINES[150:]))
    return tmp_path


def corpus(here, *sources, held_out=0.1, workers=1):
    found = sources or (Source(files=["a.txt", "b.txt"], documents="line", name="lines"),)
    return Corpus(found, Prepare(), held_out, here, here / "cache", Engine(workers))


def build(here, tokenizer, *sources, held_out=0.1, workers=1, **options):
    text = corpus(here, *sources, held_out=held_out, workers=workers)
    return build_shards(
        text.texts,
        tokenizer,
        held_out=held_out,
        held_out_below=text.held_out_below,
        cache=text.cache,
        engine=text.engine,
        **options,
    )


def reference(tokenizer, lines):
    """Ids and starts, by the plainest means."""
    ids, starts = [], []
    for line in lines:
        starts.append(len(ids))
        ids += [*tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"], 0]
    return ids, starts


@pytest.mark.parametrize("max_file_bytes", [2**28, 1000])
def test_content_is_the_plain_concatenation(here, tokenizer, max_file_bytes):
    [shards] = build(here, tokenizer, max_file_bytes=max_file_bytes)
    for split in SPLITS:
        lines = [line for line in LINES if is_held_out(line, 0.1) == (split == "held_out")]
        ids, starts = reference(tokenizer, lines)
        stream = shards.split(split)
        assert stream.read(0, stream.num_tokens).tolist() == ids
        assert stream.read(0, 1).dtype == np.uint16
        assert stream.document_starts(0, stream.num_tokens).tolist() == starts
        assert stream.document_starts(starts[3], starts[7]).tolist() == starts[3:7]
        assert stream.document_starts(starts[3] + 1, starts[4]).tolist() == []
        for start, stop in ((0, 1), (495, 505), (499, 500), (500, 501), (3, len(ids) - 1)):
            assert stream.read(start, stop).tolist() == ids[start:stop]
        counts = shards.counts(split)
        lengths = np.diff([*starts, len(ids)])
        assert (counts.documents, counts.tokens) == (len(lines), len(ids))
        assert counts.bytes == sum(len(line.encode()) for line in lines) == stream.num_bytes
        assert counts.chars == sum(map(len, lines))
        assert (counts.longest, counts.shortest) == (lengths.max(), lengths.min())
    assert len(list(shards.folder.glob("train-0*.npy"))) == -(
        -shards.counts("train").tokens * 2 // max_file_bytes
    )


def test_reading_outside_is_an_error(here, tokenizer):
    stream = build(here, tokenizer)[0].split("train")
    with pytest.raises(IndexError, match="lines"):
        stream.read(0, stream.num_tokens + 1)


def test_manifest_says_what_made_it(here, tokenizer):
    [shards] = build(here, tokenizer)
    manifest = json.loads((shards.folder / "manifest.json").read_text())
    assert manifest["kind"] == "shards"
    assert manifest["name"] == "lines"
    assert manifest["address"] == shards.folder.name
    assert manifest["eos"] == 0
    assert len(manifest["tokenizer"]) == len(manifest["texts"]) == 64
    assert manifest["skipped"] == {
        "empty_files": 0,
        "empty_documents": 0,
        "rows": {},
        "files": {},
        "examples": [],
    }
    assert manifest["encoder"]["encoder"] == "gigatoken"
    assert manifest["encoder"]["compared_documents"] == len(LINES)
    assert set(manifest["files"]) == {
        f"{s}-{x}.npy" for s in SPLITS for x in ("00000", "documents", "counts")
    }
    shards.verify()


def test_occurrences_of_ids_and_the_loss_of_guessing_by_them(here, tokenizer):
    """They are counted while shards are made; of shards without that file, from the ids; the loss by hand."""
    first, second = build(
        here,
        tokenizer,
        Source(files=["a.txt"], documents="line", name="first"),
        Source(files=["b.txt"], documents="line", name="second"),
    )
    for split in SPLITS:
        stream = first.split(split)
        counts = Counter(stream.read(0, stream.num_tokens).tolist())
        found = first.token_counts(split)
        assert {i: n for i, n in enumerate(found.tolist()) if n} == counts
        older = TokenShards(first.folder, "first", {**first.manifest, "files": {}})
        assert np.array_equal(older.token_counts(split), found)
    train, held_out = (
        Counter(
            i
            for shard in (first, second)
            for i in shard.split(split).read(0, shard.counts(split).tokens).tolist()
        )
        for split in SPLITS
    )
    size = max([*train, *held_out]) + 1
    nats = sum(-n * math.log((train[i] + 1) / (train.total() + size)) for i, n in held_out.items())
    assert unigram_entropy([first, second]) == pytest.approx(nats / held_out.total(), rel=1e-12)
    [alone] = build(here, tokenizer, held_out=0.0)
    own = Counter(alone.split("train").read(0, alone.counts("train").tokens).tolist())
    size = max(own) + 1
    nats = sum(-n * math.log((n + 1) / (own.total() + size)) for n in own.values())
    assert unigram_entropy([alone]) == pytest.approx(nats / own.total(), rel=1e-12)


def test_a_second_call_finds_them(here, tokenizer, monkeypatch):
    first = build(here, tokenizer)[0].folder
    stamp = (first / "manifest.json").stat().st_mtime_ns
    again = build(here, tokenizer, Source(files=["a.txt", "b.txt"], documents="line", name="renamed"))[0]
    assert again.folder == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    assert again.name == again.split("train").name == "renamed"


def test_anything_that_matters_gives_another_address(here, tokenizer, tmp_path_factory):
    addresses = [build(here, tokenizer)[0].folder.name]
    addresses.append(build(here, tokenizer, held_out=0.2)[0].folder.name)
    addresses.append(
        build(here, tokenizer, Source(files=["b.txt", "a.txt"], documents="line"))[0].folder.name
    )
    addresses.append(
        build(here, tokenizer, Source(files=["a.txt", "b.txt"], documents="file"))[0].folder.name
    )
    other = tmp_path_factory.mktemp("other")
    train_bpe(LINES, vocab_size=290, folder=other)
    addresses.append(build(here, load_tokenizer(str(other)))[0].folder.name)
    before = (here / "a.txt").stat()
    (here / "a.txt").write_text("\n".join(LINES[:150]).replace("line 77:", "line 7x:"))
    os.utime(here / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    [changed] = build(here, tokenizer)
    addresses.append(changed.folder.name)
    assert len(set(addresses)) == len(addresses)
    texts = [tokenizer.decode(changed.split(s).read(0, changed.split(s).num_tokens).tolist()) for s in SPLITS]
    assert any("line 7x:" in text for text in texts)


def test_held_out_does_not_depend_on_files_or_their_order(here, tokenizer):
    def held_out(*sources):
        found = set()
        for shards in build(here, tokenizer, *sources):
            stream = shards.split("held_out")
            starts = [*stream.document_starts(0, stream.num_tokens).tolist(), stream.num_tokens]
            for start, stop in pairwise(starts):
                found.add(tuple(stream.read(start, stop).tolist()))
        return found

    together = held_out()
    assert len(together) == sum(is_held_out(line, 0.1) for line in LINES)
    assert (
        held_out(Source(files="b.txt", documents="line"), Source(files="a.txt", documents="line")) == together
    )
    (here / "all.txt").write_text("\n".join(sorted(LINES)))
    assert held_out(Source(files="all.txt", documents="line")) == together


def test_at_least_one_document_is_held_out_over_all_sources(here, tokenizer):
    lines = [line for line in LINES if not is_held_out(line, 0.01)][:10]
    (here / "c.txt").write_text("\n".join(lines[:5]))
    (here / "d.txt").write_text("\n".join(lines[5:]))
    sources = [Source(files=name, documents="line") for name in ("c.txt", "d.txt")]
    shards = build(here, tokenizer, *sources, held_out=0.01)
    assert [one.counts("held_out").documents for one in shards] in ([0, 1], [1, 0])
    chosen = next(one for one in shards if one.counts("held_out").documents).split("held_out")
    smallest = min(lines, key=document_hash)
    assert chosen.read(0, chosen.num_tokens).tolist() == reference(tokenizer, [smallest])[0]
    assert corpus(here, *sources, held_out=0.01).held_out_below == document_hash(smallest) + 1
    empty = next(one for one in shards if not one.counts("held_out").documents).split("held_out")
    assert empty.num_tokens == len(empty.document_starts(0, 0)) == len(Rows([empty], 8, partial=True)) == 0


def test_one_document_only(here, tokenizer):
    with pytest.raises(DataError, match="one single document"):
        build(here, tokenizer, Source(files="a.txt"))
    [shards] = build(here, tokenizer, Source(files="a.txt"), held_out=0)
    assert shards.counts("train").documents == 1
    [shards] = build(here, tokenizer, Source(files="a.txt"), held_out=1)
    assert shards.counts("held_out").documents == 1


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_found_and_repaired_by_building_again(here, tokenizer, damage):
    [shards] = build(here, tokenizer)
    expected = (shards.folder / "train-00000.npy").read_bytes()
    path = shards.folder / ("manifest.json" if damage == "manifest" else "train-00000.npy")
    if damage == "truncate":
        path.write_bytes(expected[:-1])
    else:
        path.unlink()
    with pytest.raises(CorruptError, match=path.name):
        TokenShards.open(shards.folder)
    [again] = build(here, tokenizer)
    assert (again.folder / "train-00000.npy").read_bytes() == expected
    again.verify()


def test_a_flipped_bit_is_found_by_verify(here, tokenizer):
    [shards] = build(here, tokenizer)
    path = shards.folder / "train-00000.npy"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"train-00000\.npy"):
        TokenShards.open(shards.folder).verify()


def test_a_failed_build_leaves_nothing(here, tokenizer):
    (here / "bad.jsonl").write_text('{"text": "x"}\n' * 50 + "broken")
    with pytest.raises(DataError, match=r"bad\.jsonl:51"):
        build(here, tokenizer, Source(files="bad.jsonl"), held_out=0)
    assert [path.suffix for path in (here / "cache/shards").iterdir()] == [".lock"]


def test_what_a_killed_builder_left_is_swept(here, tokenizer):
    [shards] = build(here, tokenizer)
    left = shards.folder.with_name(f".{shards.folder.name}.tmp-1")
    left.mkdir()
    (shards.folder / "manifest.json").unlink()
    build(here, tokenizer)
    assert not left.exists()


def test_progress_ends_at_the_whole(here, tokenizer):
    calls = []
    build(here, tokenizer, progress=lambda done, total: calls.append((done, total)))
    total = sum((here / name).stat().st_size for name in ("a.txt", "b.txt"))
    assert calls[-1] == (total, total)
    assert all(0 <= done <= total for done, _ in calls)
    assert sorted(calls) == calls


BUILDER = """
import sys
from pathlib import Path
from llmkit.data import shards
from llmkit.data.corpus import Corpus
from llmkit.data.pipeline import Engine
from llmkit.data.tokenizers import open_tokenizer
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.schema import Source

here, tokenizer = Path(sys.argv[1]), open_tokenizer(sys.argv[2])
real = shards.finish
def finish(*arguments, **options):
    print("built", flush=True)
    return real(*arguments, **options)
shards.finish = finish
print("ready", flush=True)
sys.stdin.readline()
source = Source(files=["a.txt", "b.txt"], documents="line")
[made] = Corpus([source], Prepare(), 0.1, here, here / "cache", Engine()).shards(tokenizer)
made.verify()
print(made.folder.name)
"""


def test_two_processes_at_once_build_once(here, tokenizer):
    (here / "a.txt").write_text("\n".join(LINES * 20))
    command = [sys.executable, "-c", BUILDER, str(here), tokenizer.name_or_path]
    root = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=here,
            env=os.environ | {"PYTHONPATH": root},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(map(len, said)) == [1, 2]  # one built, the other waited and found it
    assert said[0][-1] == said[1][-1]


def test_a_file_that_changes_between_hashing_and_reading_is_noticed(here, tokenizer):
    text = corpus(here)
    assert text.texts
    with (here / "b.txt").open("a") as file:
        file.write("\none more line")
    with pytest.raises(DataError, match=r"b\.txt: it was changed while it was read"):
        text.shards(tokenizer)
    assert corpus(here).shards(tokenizer)[0].manifest["splits"]["train"]["documents"] > 300
