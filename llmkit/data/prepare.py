"""A recipe's text as a tokenizer and shards: made once, found again, never stale."""

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.data.rows import Ints
from llmkit.data.shards import SPLITS, Split, TokenShards, add_counts
from llmkit.data.tokenizers import LightTokenizer, fingerprint, load_tokenizer, open_tokenizer, save_tokenizer
from llmkit.data.tokenizers.learn import learn, refuse_impossible
from llmkit.data.tokenizers.special import CHAT_TOKENS, chat_template
from llmkit.durable import naming_full_disks, one_at_a_time, sweep_beside, verify_folder, write_folder
from llmkit.errors import CorruptError
from llmkit.plan import DataFacts, SourceFacts
from llmkit.recipe.schema import Tokenize
from llmkit.report.console import Reporter

_LEARNER = 2
"""Part of a tokenizer's identity: raised when the same text and settings come to give another one."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_NOT_LEARNT = {"tokenizer", "data", "prepare", "held_out", "chat_template"}


def ensure_tokenizer(
    spec: Tokenize, corpus: Corpus, reporter: Reporter, *, max_length: int | None
) -> tuple[Path, dict[str, Any]]:
    """Make the tokenizer in the cache, or find it there if the same text and settings made it.

    Args:
        spec: The recipe's `tokenize` section.
        corpus: The text to learn from; held-out documents are not learnt from.
        reporter: Told what happens.
        max_length: The longest input of the model it is made for.

    Returns:
        Its folder, named by what made it, and figures about it, see `tokenizers.learn`, and whether it was `found`.
    """
    if spec.tokenizer is None:
        refuse_impossible(spec)
    identity = _identity(spec, corpus, max_length)
    folder = corpus.cache / "tokenizers" / identity[:32]
    with naming_full_disks(folder), one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        sweep_beside(folder)
        found = None if corpus.fresh else _found(folder, identity)
        if found is not None:
            return folder, {**found, "found": True}
        reporter.phase("tokenizer", _what(spec))
        facts: dict[str, object] = {"kind": "tokenizer", "identity": identity}
        with write_folder(folder, facts=facts) as temporary:
            figures = _make(spec, corpus, temporary, max_length)
            facts["figures"] = figures
        if figures.get("note"):
            reporter.note(str(figures["note"]))
    return folder, {**figures, "found": False}


def publish_tokenizer(made: Path, folder: Path) -> None:
    """Put a tokenizer of the cache into a run folder, in the place of another one."""
    manifest = verify_folder(made)
    if _found(folder, manifest["identity"]) is not None:
        return
    with write_folder(
        folder, facts={key: manifest[key] for key in ("kind", "identity", "figures")}
    ) as temporary:
        for name in manifest["files"]:
            shutil.copyfile(made / name, temporary / name)


def data_facts(shards: Sequence[TokenShards]) -> DataFacts:
    """Exact counts of what training reads."""
    per_source = [
        SourceFacts(
            name=shard.name,
            num_documents=shard.counts("train").documents,
            num_tokens=shard.counts("train").tokens,
            num_bytes=shard.counts("train").bytes,
        )
        for shard in shards
    ]
    return DataFacts(
        num_tokens=sum(one.num_tokens for one in per_source),
        num_documents=sum(one.num_documents for one in per_source),
        num_bytes=sum(one.num_bytes for one in per_source),
        exact=True,
        per_source=per_source,
        num_held_out_tokens=sum(shard.counts("held_out").tokens for shard in shards),
    )


def data_card(shards: Sequence[TokenShards]) -> dict[str, Any]:
    """What the report says of the data: counts of the training part and of what is held out, by source and in all.

    `unigram_entropy` is the held-out loss, in nats a token, of a model that knows how common each token is and
    nothing else: a line that a language model has to come below.
    """
    sources = [_source_card(shard) for shard in shards]
    counted = [key for key in sources[0] if key.startswith("num_")]
    totals = {key: sum(source[key] for source in sources) for key in counted}
    lengths = document_lengths(shards)
    return {**totals, "lengths": lengths, "unigram_entropy": unigram_entropy(shards), "sources": sources}


def document_lengths(shards: Sequence[TokenShards]) -> list[dict[str, int]]:
    """How many training documents have up to 2, 4, 8, ... tokens, and more than half of that."""
    bins = np.zeros(64, dtype=np.int64)
    for shard in shards:
        lengths = shard.split("train").document_lengths()
        if len(lengths):
            bins += np.bincount(np.ceil(np.log2(np.maximum(lengths, 2))).astype(np.int64), minlength=64)
    used = np.flatnonzero(bins)
    return [{"up_to": 2 ** int(power), "documents": int(bins[power])} for power in used]


def unigram_entropy(shards: Sequence[TokenShards]) -> float:
    """The loss on the held-out tokens, in nats a token, of the frequencies that tokens have in the training text.

    Each id up to the largest that occurs counts once more than it does, so that none is impossible. Where nothing is
    held out, the training tokens stand in for it.
    """
    train, held_out = (occurrences(shards, split) for split in SPLITS)
    measured = held_out if held_out.any() else train
    if not measured.any():
        return 0.0
    return unigram_loss(train, measured, max(len(train), len(held_out)))


def unigram_loss(train: Ints, measured: Ints, size: int = 0) -> float:
    """The loss, in nats a token, of the frequencies that tokens have in one text, on another.

    Args:
        train: How often each id occurs in the first.
        measured: In the second.
        size: Ids that count once more than they occur; at least all that occur.
    """
    size = max(size, len(train), len(measured))
    p = (np.pad(train, (0, size - len(train))) + 1) / (train.sum() + size)
    return float(-(measured * np.log(p[: len(measured)])).sum() / measured.sum())


def occurrences(shards: Sequence[TokenShards], split: Split) -> Ints:
    """How often each id occurs in one split of some sources."""
    found = np.zeros(0, dtype=np.int64)
    for shard in shards:
        found = add_counts(found, shard.token_counts(split))
    return found


def _source_card(shard: TokenShards) -> dict[str, Any]:
    train, held_out = (shard.counts(split) for split in SPLITS)
    return {
        "name": shard.name,
        "num_documents": train.documents,
        "num_tokens": train.tokens,
        "num_bytes": train.bytes,
        "num_chars": train.chars,
        "num_held_out_documents": held_out.documents,
        "num_held_out_tokens": held_out.tokens,
        "longest_document": max(train.longest, held_out.longest),
        "shortest_document": train.shortest,
        "encoder": shard.manifest["encoder"],
        "skipped": shard.manifest["skipped"],
        "address": shard.folder.name,
    }


def _identity(spec: Tokenize, corpus: Corpus, max_length: int | None) -> str:
    if spec.tokenizer is not None:
        fixed = fingerprint(open_tokenizer(spec.tokenizer))
        content: dict[str, Any] = {"tokenizer": fixed, "special_tokens": spec.special_tokens}
    else:
        content = {
            "version": _LEARNER,
            "made by": _versions(spec),
            "settings": spec.model_dump(mode="json", exclude=_NOT_LEARNT),
            "held_out_below": corpus.held_out_below,
            "max_length": max_length,
            "sources": [texts.identity for texts in corpus.texts],
        }
    content["chat_template"] = chat_template(spec, corpus.base)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _versions(spec: Tokenize) -> dict[str, str]:
    """What decides the vocabulary besides text and settings."""
    packages = ["tokenizers", *(["rjieba"] if spec.algorithm == "words" else [])]
    found = {package: version(package) if find_spec(package) else "" for package in packages}
    return {**found, "unicode": unicodedata.unidata_version}


def _found(folder: Path, identity: str) -> Mapping[str, Any] | None:
    try:
        manifest = verify_folder(folder)
    except CorruptError:
        return None
    figures: Mapping[str, Any] = manifest.get("figures", {})
    return figures if manifest.get("identity") == identity else None


def _make(spec: Tokenize, corpus: Corpus, folder: Path, max_length: int | None) -> dict[str, Any]:
    if spec.tokenizer is not None:
        return _take(spec.tokenizer, spec, corpus.base, folder)
    sample = corpus.sample(spec.sample)
    return learn(sample.learn, sample.measure, spec, folder, max_length, base=corpus.base)


def _take(name: str, spec: Tokenize, base: Path, folder: Path) -> dict[str, Any]:
    """An existing tokenizer: its files as they are, or written anew where the recipe adds tokens or a template."""
    template = chat_template(spec, base)
    tokens = [*spec.special_tokens, *(CHAT_TOKENS if spec.chat_template == "chatml" else ())]
    tokenizer = open_tokenizer(name)
    if isinstance(tokenizer, LightTokenizer) and template is None and not tokens:
        for file in _TOKENIZER_FILES:
            if (path := Path(tokenizer.name_or_path) / file).is_file():
                shutil.copyfile(path, folder / file)
        return {"vocab_size": len(tokenizer), "taken_from": name}
    tokenizer = load_tokenizer(name)
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    if template is not None:
        tokenizer.chat_template = template
    save_tokenizer(tokenizer, folder)
    return {"vocab_size": len(tokenizer), "taken_from": name}


def _what(spec: Tokenize) -> str:
    if spec.tokenizer is not None:
        return f"taking {spec.tokenizer}"
    return f"learning {spec.vocab_size:,} entries by {spec.algorithm}"
