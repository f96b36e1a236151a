"""A recipe's text as a tokenizer and shards: made once, found again, never stale."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data import sources as text
from llmkit.data.order import common_weights
from llmkit.data.shards import SPLITS, TokenShards, build_shards, held_out_threshold
from llmkit.data.tokenizers import fingerprint, load_tokenizer, save_tokenizer, train_bpe
from llmkit.durable import naming_full_disks, one_at_a_time, verify_folder, write_folder
from llmkit.errors import CorruptError, UsageError
from llmkit.plan import DataFacts, SourceFacts
from llmkit.recipe.schema import Recipe, Source, Tokenize
from llmkit.report.console import Reporter

_ENTROPY_TOKENS = 10_000_000
_HELD_OUT = 0.01
_UNPACKED = 3


@dataclass(frozen=True)
class Corpus:
    """Where a recipe's text is, and how it is divided.

    Attributes:
        sources: The text.
        held_out: Share of documents kept out of training.
        base: The recipe's folder.
        cache: Where shards are kept.
    """

    sources: Sequence[Source]
    held_out: float
    base: Path
    cache: Path

    @property
    def weights(self) -> list[float] | None:
        """The sources' weights, or None where they count by size."""
        return common_weights([source.weight for source in self.sources])

    def sizes(self) -> list[tuple[str, int]]:
        """Each source's name and the bytes of its files as they lie on the disk; 0 where it is not known."""
        return [
            (
                text.source_name(source, self.base, cache=self.cache),
                text.num_bytes(source, self.base, cache=self.cache),
            )
            for source in self.sources
        ]

    def expected_bytes(self) -> int:
        """A guess at the bytes of the text itself: compressed files and parquet hold a few times their size."""
        return sum(
            size * (_UNPACKED if any(map(_is_packed, source.files or ())) else 1)
            for source, (_, size) in zip(self.sources, self.sizes(), strict=True)
        )

    def shards(self, tokenizer: Any, reporter: Reporter) -> list[TokenShards]:
        """The shards, one of them a source; made where they are not there yet."""
        return build_shards(
            self.sources,
            tokenizer,
            held_out=self.held_out,
            cache=self.cache,
            base=self.base,
            progress=lambda done, total: reporter.progress("encode", done, total or None, unit="bytes"),
        )


def corpus_of(recipe: Recipe, *, base: Path, cache: Path, for_tokenizer: bool = False) -> Corpus:
    """The text that a recipe trains its model on, or its tokenizer: each by default what the other section names.

    Raises:
        UsageError: The recipe names none.
    """
    order = (recipe.tokenize, recipe.pretrain) if for_tokenizer else (recipe.pretrain, recipe.tokenize)
    sections = [section for section in order if section is not None]
    named = next((section.data for section in sections if section.data), None)
    if named is None:
        raise UsageError("the recipe names no text", hint="add `data: {files: ...}` to `pretrain`")
    held_out = recipe.tokenize.held_out if recipe.tokenize else None
    if held_out is None:
        held_out = recipe.pretrain.held_out if recipe.pretrain else _HELD_OUT
    return Corpus(named if isinstance(named, list) else [named], held_out, base, cache)


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
        Its folder, named by what made it, and figures about it, see `tokenizers.train_bpe`, and whether it was `found`.
    """
    threshold = held_out_threshold(corpus.sources, corpus.held_out, base=corpus.base, cache=corpus.cache)
    identity = _identity(spec, corpus, threshold, max_length)
    folder = corpus.cache / "tokenizers" / identity[:32]
    with naming_full_disks(folder), one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        found = _found(folder, identity)
        if found is not None:
            return folder, {**found, "found": True}
        reporter.phase("tokenizer", _what(spec))
        facts: dict[str, object] = {"kind": "tokenizer", "identity": identity}
        with write_folder(folder, facts=facts) as temporary:
            figures = _make(spec, corpus, threshold, temporary, max_length)
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

    `unigram_entropy` is the loss, in nats a token, of a model that knows how common each token is and nothing
    else: a line that a language model has to come below.
    """
    sources = [_source_card(shard) for shard in shards]
    counted = [key for key in sources[0] if key.startswith("num_")]
    totals = {key: sum(source[key] for source in sources) for key in counted}
    return {**totals, "unigram_entropy": unigram_entropy(shards), "sources": sources}


def unigram_entropy(shards: Sequence[TokenShards]) -> float:
    """-sum p log p of the training tokens' frequencies in nats, over at most the first ten million of each source."""
    counts = np.zeros(0, dtype=np.int64)
    for shard in shards:
        stream = shard.split("train")
        if stream.num_tokens:
            found = np.bincount(stream.read(0, min(stream.num_tokens, _ENTROPY_TOKENS)))
            wider = np.zeros(max(len(found), len(counts)), dtype=np.int64)
            wider[: len(counts)] += counts
            wider[: len(found)] += found
            counts = wider
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


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
        "address": shard.folder.name,
    }


def _is_packed(pattern: str) -> bool:
    return pattern.endswith((".gz", ".zst", ".parquet"))


def _identity(spec: Tokenize, corpus: Corpus, threshold: int, max_length: int | None) -> str:
    settings = spec.model_dump(mode="json", include={"algorithm", "vocab_size", "sample", "special_tokens"})
    content = {
        "settings": settings,
        "held_out_below": threshold,
        "max_length": max_length,
        "sources": [text.fingerprint(s, corpus.base, cache=corpus.cache) for s in corpus.sources],
    }
    if spec.tokenizer is not None:
        content = {"tokenizer": fingerprint(load_tokenizer(spec.tokenizer))}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _found(folder: Path, identity: str) -> Mapping[str, Any] | None:
    try:
        manifest = verify_folder(folder)
    except CorruptError:
        return None
    figures: Mapping[str, Any] = manifest.get("figures", {})
    return figures if manifest.get("identity") == identity else None


def _make(
    spec: Tokenize, corpus: Corpus, threshold: int, folder: Path, max_length: int | None
) -> dict[str, Any]:
    if spec.tokenizer is not None:
        tokenizer = load_tokenizer(spec.tokenizer)
        save_tokenizer(tokenizer, folder)
        return {"vocab_size": len(tokenizer), "taken_from": spec.tokenizer}
    documents = (
        document.text
        for source in corpus.sources
        for document in text.read_documents(source, base=corpus.base, cache=corpus.cache)
    )
    return train_bpe(
        documents,
        vocab_size=spec.vocab_size,
        special_tokens=spec.special_tokens,
        sample_bytes=spec.sample,
        folder=folder,
        held_out_below=threshold,
        max_length=max_length,
    )


def _what(spec: Tokenize) -> str:
    if spec.tokenizer is not None:
        return f"taking {spec.tokenizer}"
    return f"learning {spec.vocab_size:,} entries by {spec.algorithm}"
