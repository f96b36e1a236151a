"""Shards joined from many parts are the plain concatenation of their documents, with and without preparation."""

import json
import random
from multiprocessing.context import SpawnProcess

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizing import train_bpe

from llmkit.data.corpus import Corpus
from llmkit.data.pipeline import Engine, Stage
from llmkit.data.shards import SPLITS
from llmkit.data.split import is_held_out
from llmkit.data.tokenizers import open_tokenizer
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.schema import Source

PART = 2_000
RATIO = 0.2
EOS = "<|endoftext|>"
MIN_CHARS = 30


def written(seed, count):
    """Documents of all lengths, some longer than a part, some blank, some with the end of text spelled out."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        line = f"{seed}.{number}: the cat sat on mat {draw.randrange(10**6)}, 从前有 {number} 座山 {EOS} 😀 "
        texts.append(line * draw.choice((1, 1, 2, 3)))
    texts[count // 3] *= 70  # several parts in which no document begins
    texts[count // 2] = "\n "
    texts[count // 4] = "short"
    return texts


FIRST, SECOND = written(1, 90), written(2, 70)


def with_copies(draw, texts, others, count=25):
    """The texts with copies of texts of their own, and of others, at any place."""
    copies = [*draw.sample(texts, count), *draw.sample(others, count)]
    mixed = [*texts]
    for copy in copies:
        mixed.insert(draw.randrange(len(mixed) + 1), copy)
    return mixed


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([*FIRST, *SECOND], vocab_size=400, folder=folder)
    return open_tokenizer(str(folder))


@pytest.fixture(scope="module")
def plain(tokenizer):
    """The ids of a text by the `tokenizers` library alone, and the end of text."""
    library = Tokenizer.from_file(f"{tokenizer.name_or_path}/tokenizer.json")
    library.encode_special_tokens = True  # text never becomes a special token
    eos = library.token_to_id(EOS)
    return lambda text: [*library.encode(text, add_special_tokens=False).ids, eos]


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of two kilobytes, and as many processes as there are workers, however little there is to do."""
    monkeypatch.setattr("llmkit.data.texts.SMALLEST_PART", PART)
    make = Stage.__init__

    def at_once(self, work, store, sizes, worth_bytes=0):
        make(self, work, store, sizes, 0)

    monkeypatch.setattr(Stage, "__init__", at_once)


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    found, begin = [], SpawnProcess.start

    def start(self):
        found.append(self)
        begin(self)

    monkeypatch.setattr(SpawnProcess, "start", start)
    return found


def write(folder, name, texts):
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(files=[str(folder / name)], name=name)


def corpus(here, sources, workers=1, **prepare):
    prepared = Prepare.model_validate(prepare)
    return Corpus(sources, prepared, RATIO, here, here / "cache", Engine(workers))


def expected(plain, texts, split):
    """Ids, starts and counts of one split, document by document."""
    ids, starts, lengths, chosen = [], [], [], []
    for text in texts:
        if is_held_out(text, RATIO) == (split == "held_out"):
            document = plain(text)
            starts.append(len(ids))
            lengths.append(len(document))
            ids += document
            chosen.append(text)
    return ids, starts, lengths, chosen


def check(shards, plain, texts):
    """The shards hold these documents, in this order, and count them right."""
    for split in SPLITS:
        ids, starts, lengths, chosen = expected(plain, texts, split)
        assert len(chosen) > 5
        stream, counts = shards.split(split), shards.counts(split)
        assert stream.read(0, stream.num_tokens).tolist() == ids
        assert stream.document_starts(0, stream.num_tokens).tolist() == starts
        assert stream.document_lengths().tolist() == lengths
        assert (counts.documents, counts.tokens) == (len(chosen), len(ids))
        assert counts.bytes == sum(len(text.encode()) for text in chosen)
        assert counts.chars == sum(map(len, chosen))
        assert (counts.longest, counts.shortest) == (max(lengths), min(lengths))


def readable(texts):
    return [text for text in texts if text.strip()]


def deduplicated(*sources):
    """The long enough documents of each source, of copies the first one in all sources."""
    seen, kept = set(), []
    for texts in sources:
        left = []
        for text in texts:
            if len(text) >= MIN_CHARS and text not in seen:
                seen.add(text)
                left.append(text)
        kept.append(left)
    return kept


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("several", [False, True])
def test_parts_are_joined_in_order(tmp_path, tokenizer, plain, small_parts, started, workers, several):
    given = [FIRST, SECOND] if several else [FIRST]
    sources = [write(tmp_path, f"{number}.jsonl", texts) for number, texts in enumerate(given)]
    text = corpus(tmp_path, sources, workers)
    assert all(5 <= len(one.sizes) <= 25 for one in text.texts)
    shards = text.shards(tokenizer)
    assert len(started) == (0 if workers == 1 else 2 * len(given))
    assert [one.name for one in shards] == [source.name for source in sources]
    for one, texts in zip(shards, given, strict=True):
        check(one, plain, readable(texts))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("several", [False, True])
def test_what_was_decided_of_a_document_is_done_to_that_one(
    tmp_path, tokenizer, plain, small_parts, started, workers, several
):
    draw = random.Random(5)
    given = [with_copies(draw, FIRST, FIRST)]
    if several:  # copies in both directions, so that each source loses some to the other or to itself
        given = [with_copies(draw, FIRST, SECOND), with_copies(draw, SECOND, FIRST)]
    left = deduplicated(*given)
    assert all(len(kept) < len(readable(texts)) - 20 for kept, texts in zip(left, given, strict=True))
    sources = [write(tmp_path, f"{number}.jsonl", texts) for number, texts in enumerate(given)]
    text = corpus(tmp_path, sources, workers, normalise=None, filter={"min_chars": MIN_CHARS}, duplicates={})
    assert all(5 <= len(one.sizes) <= 40 for one in text.texts)
    shards = text.shards(tokenizer)
    assert (len(started) > 0) == (workers == 2)
    for one, texts in zip(shards, left, strict=True):
        check(one, plain, texts)
    steps = {step["name"]: step for step in text.prepared.report["steps"]}
    kept = sum(map(len, left))
    assert steps["exact"]["documents_out"] == text.prepared.report["kept"]["documents"] == kept
    assert steps["filter"]["documents_in"] == sum(len(readable(texts)) for texts in given)


def test_menus_are_stripped_and_copies_that_come_to_light_dropped_in_the_right_part(
    tmp_path, tokenizer, plain, small_parts
):
    """What a document is after its lines were taken decides, and it is the one at its place that goes."""
    bodies = [
        f"body {number} " + "has words of its own " * (number % 7 + 2) + str(number) for number in range(60)
    ]
    again = [f"Menu\n{body}" if number % 3 else body for number, body in enumerate(bodies)]
    given = [[f"Menu\n{body}" for body in bodies], [*reversed(again), "Menu\nthe last one is alone here"]]
    sources = [write(tmp_path, f"{number}.jsonl", texts) for number, texts in enumerate(given)]
    text = corpus(tmp_path, sources, duplicates={"lines": 10})
    assert all(len(one.sizes) > 2 for one in text.texts)
    kept = [[*one.read(number, tally())] for one in text.texts for number in range(len(one.sizes))]
    assert [one for part in kept for one in part] == [*bodies, "the last one is alone here"]


def tally():
    from llmkit.data.places import Tally

    return Tally()


@pytest.mark.parametrize("max_bytes", [1_000, 100_000])
def test_files_of_tokens_are_cut_by_size_alone_whatever_the_parts(
    tmp_path, tokenizer, plain, small_parts, max_bytes
):
    from llmkit.data.shards import build_shards

    text = corpus(tmp_path, [write(tmp_path, "a.jsonl", FIRST)])
    [made] = build_shards(
        text.texts,
        tokenizer,
        held_out=RATIO,
        held_out_below=text.held_out_below,
        cache=text.cache,
        max_file_bytes=max_bytes,
    )
    check(made, plain, readable(FIRST))
    for split in SPLITS:
        sizes = [len(np.load(path)) for path in sorted(made.folder.glob(f"{split}-0*.npy"))]
        assert all(size == max_bytes // 2 for size in sizes[:-1])
        assert sum(sizes) == made.counts(split).tokens


def test_lines_of_text_files_are_joined_the_same_way(tmp_path, tokenizer, plain, small_parts):
    lines = [[text.strip() for text in texts if text.strip()] for texts in (FIRST, SECOND)]
    for name, texts in zip("ab", lines, strict=True):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts) + "\n")
    source = Source(files=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], documents="line", name="lines")
    text = corpus(tmp_path, [source])
    assert len(text.texts[0].sizes) > 10
    [made] = text.shards(tokenizer)
    check(made, plain, [*lines[0], *lines[1]])
