"""The tokenizing benchmark's own arithmetic, that it notices other ids, and the corpora it runs on."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.corpus import base_texts, bytes_of, documents, make_base, rows, write_corpus
from benchmarks.tokenize import byte_alphabet, check_same_work, chosen, parse, summarise, tiktoken_of

ROOT = Path(__file__).parents[2]


def result(name, cpu_s=1.0, **changes):
    facts = {"contender": name, "cpu_s": cpu_s, "wall_s": cpu_s, "peak_bytes": 100, "tokens": 9, "ids": "a1"}
    return facts | changes


@pytest.mark.parametrize("changes", [{"tokens": 8}, {"ids": "a2"}])
def test_other_ids_are_noticed(changes):
    check_same_work([result("a"), result("b")])
    with pytest.raises(SystemExit, match=r"not the same work: .* of b"):
        check_same_work([result("a"), result("b", **changes)])


def test_ratios_are_taken_within_a_round():
    rounds = [
        {"datasets": result("datasets", 60.0), "llmkit": result("llmkit", 2.0)},
        {"datasets": result("datasets", 180.0), "llmkit": result("llmkit", 6.0)},
    ]
    row = summarise(rounds, 100_000_000)["llmkit"]
    assert row["speed_vs_datasets"] == {"median": 30.0, "low": 30.0, "high": 30.0}
    assert row["mb_per_cpu_s"] == 25.0
    assert row["goals"] == {"datasets": {"goal": 25.0, "reached": True}}


def test_an_absent_contender_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setattr("benchmarks.tokenize.find_spec", lambda name: None if name == "tiktoken" else name)
    names, absent = chosen("llmkit,tiktoken")
    assert names == ["llmkit"]
    assert absent == {"tiktoken": "not installed: tiktoken"}
    with pytest.raises(SystemExit, match="no contender sentencepiece"):
        chosen("sentencepiece")


def test_the_defaults():
    asked = parse([])
    assert (asked.size, asked.rounds) == (100_000_000, 3)
    assert bytes_of("5GB") == 5 * 10**9
    assert bytes_of("1.5KiB") == 1536


def test_our_tokenizer_as_tiktoken_gives_the_same_ids(tmp_path):
    pytest.importorskip("tiktoken")
    from tokenizers import Tokenizer

    from llmkit.data.tokenizers.learn import learn
    from llmkit.recipe.schema import Tokenize

    texts = [text[:4000] for text in islice(base_texts(None, 0), 40)]
    learn(texts[:30], texts[30:], Tokenize(vocab_size=600), tmp_path, None)
    ours, theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), tiktoken_of(tmp_path)
    assert len(set(byte_alphabet().values())) == 256
    for text in [*texts, "naïve 中文 😀 \x00\r\n  don't"]:
        assert theirs.encode_ordinary(text) == ours.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def folder_of_text(tmp_path_factory):
    """A small base: 2,000 words after Zipf's law."""
    folder = tmp_path_factory.mktemp("text")
    words = [
        f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("an", "el", "ir", "ou") for c in ("ba", "do", "ke")
    ]
    lines = [
        " ".join(words[int((i * j * 7919) ** 0.5) % len(words)] + "ae" * (i % 3) for j in range(1, 90))
        for i in range(1, 60)
    ]
    rare = [f"{line} rare{chr(97 + i % 26)}{chr(97 + i // 26)}word" for i, line in enumerate(lines)]
    (folder / "a.txt").write_text("\n\n".join(rare[:30]))
    (folder / "b.md").write_text("\n\n".join(rare[30:]))
    return folder


def test_the_same_seed_gives_the_same_bytes(folder_of_text, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        write_corpus(path, 200_000, folder=folder_of_text, seed=seed)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    assert 200_000 <= paths[0].stat().st_size < 300_000


def test_documents_differ_and_new_words_keep_coming(folder_of_text):
    base = make_base(folder_of_text)
    made = list(islice(documents(base), 400))
    assert len(set(made)) > 390  # with 59 paragraphs a pair comes again by chance; with real text none did
    word = re.compile(r"[^\W\d_]+")
    size = sum(len(p.text) for p in base.paragraphs)
    counts, seen, after_pass = Counter(), 0, []
    for text in made:
        counts.update(word.findall(text))
        seen += len(text)
        if seen >= size * (len(after_pass) + 1):
            after_pass.append(len(counts))
    assert len(after_pass) >= 4
    # By Heaps' law the first pass has all the base's words, and n passes n ** exponent times as many.
    for passes, num_words in enumerate(after_pass[1:4], start=2):
        expected = base.num_words * passes**base.exponent
        assert num_words == pytest.approx(expected, rel=0.15)
    assert after_pass[3] > after_pass[1] > base.num_words * 1.02


def test_planted_documents_have_labels(folder_of_text):
    found = list(islice(rows(make_base(folder_of_text), planted=True), 3000))
    planted = [row["planted"]["kind"] for row in found if "planted" in row]
    assert 0.05 < len(planted) / len(found) < 0.2
    assert {"exact copy", "near copy", "foreign", "personal", "evaluation"} <= set(planted)
    json.dumps(found)


@pytest.mark.slow
def test_the_smoke_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.tokenize", "--smoke", "--json", "--folder", str(tmp_path)]
    command += ["--only", "tokenizers,llmkit,llmkit-tokenizers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)["contenders"]
    assert set(table) == {"tokenizers", "llmkit", "llmkit-tokenizers"}
    assert len({(row["tokens"], row["ids"]) for row in table.values()}) == 1
