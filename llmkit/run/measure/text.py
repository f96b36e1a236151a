"""How likely a model finds a text: loss, perplexity, bits per byte; by source, by length, beside simple models."""

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmkit.errors import MissingError, UsageError
from llmkit.evaluate.measurement import Items, Measurement
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.schema import Model, Pretrain, Train
from llmkit.recipe.units import Amount
from llmkit.registry import ModelKind, goal_of
from llmkit.run.folders import CACHE, base_of
from llmkit.run.measure.asked import Asked, Subject

if TYPE_CHECKING:
    from llmkit.data.shards import Split, TokenShards, TokenStream
    from llmkit.evaluate.documents import Counted
    from llmkit.objectives.base import LossModule

_LONGEST_ROW = 2048
_FIRST: Mapping[ModelKind, Literal["clm", "mlm"]] = {"causal": "clm", "masked": "mlm"}
_MANY_UNKNOWN = 0.05
_MOST_SEARCHED = 20_000_000
"""Training tokens that are looked through for documents that are measured."""


@dataclass(frozen=True)
class Text:
    """What to measure on.

    Attributes:
        shards: The text as tokens of the model's tokenizer, one entry a source.
        split: Which part of it.
        last_end: Whether the mark of the end after the last document of each source belongs to it; those between
            documents do.
    """

    shards: "Sequence[TokenShards]"
    split: "Split"
    last_end: bool = True

    def streams(self) -> "list[TokenStream]":
        """The part's tokens."""
        from llmkit.data.shards import TokenStream

        found = []
        for shard in self.shards:
            counts = shard.counts(self.split)
            if not self.last_end and counts.tokens > 1:
                counts = replace(counts, tokens=counts.tokens - 1)
            found.append(TokenStream(shard.folder, self.split, shard.name, counts))
        return found

    @property
    def address(self) -> str:
        """What it is, whatever the tokenizer: equal for equal documents in the same order."""
        known = [[shard.manifest["texts"], shard.manifest["held_out_below"]] for shard in self.shards]
        return hashlib.sha256(json.dumps([known, self.split]).encode()).hexdigest()[:32]


def measure(subject: Subject, asked: Asked) -> Measurement:
    """Measure a model on held-out text, or on text of the recipe's.

    Raises:
        UsageError: Nothing says what to measure on, or the settings do not fit the model.
        MissingError: The text of the run is gone.
        DataError: There is no text.
    """
    from llmkit.data.prepare import data_card
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.documents import items_of
    from llmkit.evaluate.model import measure_streams, summarise

    section, tokenizer = asked.section, load_tokenizer(str(subject.place))
    text = text_of(subject, asked, tokenizer)
    core, learned = text_core(subject, asked, tokenizer)
    streams = text.streams()
    found = measure_streams(
        core,
        streams,
        learned,
        device=asked.device,
        context=section.context,
        stride=section.stride,
        max_rows=section.rows,
        share=asked.share,
    )
    figures = summarise(core, learned, streams, found.sums)
    counted, per_length = items_of(found, streams, tokenizer, learned)
    if learned.objective == "clm" and counted is not None:
        figures["char_perplexity"] = counted.figures(np.arange(len(counted.keys)))["char_perplexity"]
    context = section.context or learned.model.context
    return Measurement(
        subject=subject.word,
        model=str(subject.place),
        task="text",
        data=_address(text, asked, counted, learned),
        figures=figures,
        shown=[*goal_of(learned.objective).metrics, "char_perplexity"],
        best="bits_per_byte" if "bits_per_byte" in figures else "loss",
        items=None if counted is None else Items(counted.keys, counted.figures),
        tables={
            "per_source": _per_source(counted, text) if counted is not None else [],
            "per_length": per_length,
            "references": _references(subject, asked, text, learned, tokenizer),
        },
        settings={
            "objective": learned.objective,
            "text": text.address,
            "tokenizer": text.shards[0].manifest["tokenizer"],
            "context": context,
            "stride": section.stride,
            "windows": _said(context, section.stride, text.last_end),
            "precision": subject.precision,
            "held_out": section.data is None and asked.held_out_by in (None, subject),
        },
        files={"data.json": data_card(text.shards)},
        warnings=[*_learned_from(subject, asked, text), *_warnings(section.rows, text, tokenizer)],
    )


def text_core(subject: Subject, asked: Asked, tokenizer: Any) -> "tuple[LossModule, Pretrain]":
    """The model, ready to be measured, and what it learned."""
    from llmkit.evaluate.model import core_of, load_model
    from llmkit.models.build import max_length

    model = load_model(subject.place, trusted=subject.trust_remote_code)
    learned, longest = learned_by(subject), max_length(model.config)
    _check_windows(asked.section.context or learned.model.context, asked.section.stride, learned, longest)
    bf16 = subject.precision == "bf16"
    core = core_of(model, learned, tokenizer, device=asked.device, folder=subject.place, bf16=bf16)
    return core, learned


def _check_windows(context: int, stride: int | None, learned: Pretrain, longest: int | None) -> None:
    """Raise where windows were asked for that the model or its objective cannot have."""
    if stride is not None and learned.objective != "clm":
        raise UsageError(
            f"eval.stride: windows slide over what a `clm` model predicts, and this one learned `{learned.objective}`",
            hint="leave eval.stride out",
        )
    if stride is not None and stride >= context:
        raise UsageError(
            f"eval.stride is {stride}, and windows of {context} tokens that move so far do not overlap",
            hint=f"eval.stride={max(1, context // 2)}",
        )
    if longest is not None and context > longest:
        raise UsageError(
            f"eval.context is {context}, and the model reads {longest} tokens at most",
            hint=f"eval.context={longest}",
        )


def learned_by(subject: Subject) -> Pretrain:
    """What a model learned from text; one that comes without a recipe, what models of its kind learn first.

    Raises:
        UsageError: Nothing is known to measure such a model by.
    """
    from transformers import AutoConfig

    from llmkit.models.build import kind_of, max_length

    if subject.trained is not None and subject.trained.recipe.pretrain is not None:
        return subject.trained.recipe.pretrain
    place = str(subject.place)
    kind = kind_of(place)
    longest = max_length(AutoConfig.from_pretrained(place, trust_remote_code=subject.trust_remote_code))
    objective = _FIRST.get(kind)
    if objective is None:
        raise UsageError(
            f"a model of this kind ({kind}) comes without a recipe, and nothing says what it learned",
            hint="measure the run that trained it, or say what it is asked: --task cls, --task embed, ...",
        )
    model = Model(preset=None, context=min(longest or 512, _LONGEST_ROW))
    return Pretrain(objective=objective, model=model, train=Train(length=Amount(1, "steps")))


def text_of(subject: Subject, asked: Asked, tokenizer: Any) -> Text:
    """The recipe's own `eval.data`, all of it; else what a run held out, in tokens of this model."""
    from llmkit.data.corpus import Corpus, corpora_of, engine_of
    from llmkit.data.tokenizers import fingerprint

    cache, section = asked.options.runs / CACHE, asked.section
    if section.data is not None:
        corpus = Corpus(
            section.data,
            Prepare(),
            held_out=0.0,
            base=asked.base,
            cache=cache,
            engine=engine_of(asked.machine),
            reporter=asked.reporter,
        )
        return Text(corpus.shards(tokenizer), "train", last_end=_last_end(subject, asked))
    holder = asked.held_out_by or subject
    shards = shards_of_run(holder, asked.options.runs)
    if not shards:
        raise UsageError(f"{holder.word}: nothing says what to measure it on", hint="give text: --data FILES")
    if shards[0].manifest["tokenizer"] == fingerprint(tokenizer):
        return Text(shards, "held_out")
    assert holder.trained is not None
    for_model, _ = corpora_of(
        holder.trained.recipe, base=base_of(holder.trained), cache=cache, reporter=asked.reporter
    )
    return Text(for_model.shards(tokenizer), "held_out")


def _last_end(subject: Subject, asked: Asked) -> bool:
    """Whether the mark after the last document is measured: a run of ours learned to say it.

    Of other models it says nothing, and the loop of transformers' documentation has none. Models that are compared are
    asked the same.
    """
    together = [subject, *asked.others, *([asked.held_out_by] if asked.held_out_by is not None else [])]
    return any(one.trained is not None for one in together)


def shards_of_run(subject: Subject, runs: Path) -> "list[TokenShards]":
    """The shards that the run around a model was trained with; empty where there is no such run.

    Raises:
        MissingError: They are gone.
    """
    from llmkit.data.shards import TokenShards

    card = subject.place.parent / "data.json"
    if not card.is_file() or subject.trained is None:
        return []
    addresses = [source["address"] for source in json.loads(card.read_bytes()).get("sources", ())]
    caches = [runs / CACHE, *(place / CACHE for place in subject.place.absolute().parents)]
    found = []
    for address in addresses:
        folder = next((c / "shards" / address for c in caches if (c / "shards" / address).is_dir()), None)
        if folder is None:
            raise MissingError(
                f"{runs / CACHE / 'shards' / address}: the shards of the model's run are gone",
                hint=f"make them again: llmkit tokenize {subject.place.parent / 'resolved.yaml'}",
            )
        found.append(TokenShards.open(folder))
    return found


def _per_source(counted: "Counted", text: Text) -> list[dict[str, Any]]:
    if len(text.shards) < 2:
        return []
    groups = [(shard.name, np.flatnonzero(counted.source_D == n)) for n, shard in enumerate(text.shards)]
    return counted.table(groups)


def _references(
    subject: Subject, asked: Asked, text: Text, learned: Pretrain, tokenizer: Any
) -> dict[str, float]:
    """What simple models that were counted on the run's training text lose on the same text, in nats a token."""
    from llmkit.data.prepare import occurrences, unigram_loss
    from llmkit.data.tokenizers import fingerprint

    trained_on = shards_of_run(subject, asked.options.runs)
    if not trained_on or trained_on[0].manifest["tokenizer"] != fingerprint(tokenizer):
        return {}
    lines: dict[str, float] = {}
    if "unigram" in asked.section.reference:
        train, measured = occurrences(trained_on, "train"), occurrences(text.shards, text.split)
        lines["guessing by token frequency (unigram)"] = unigram_loss(train, measured)
    if "ngram" in asked.section.reference and learned.objective == "clm" and asked.share.rank == 0:
        from llmkit.evaluate.references import MOST_TOKENS, ORDER, ngram_loss

        asked.reporter.phase("eval", f"counting {ORDER}-grams")
        streams = [shard.split("train") for shard in trained_on]
        cut = sum(stream.num_tokens for stream in streams) > MOST_TOKENS
        name = f"{ORDER}-grams{f' of the first {MOST_TOKENS // 10**6}M tokens' if cut else ''} (Kneser-Ney)"
        lines[name] = ngram_loss(streams, text.streams(), learned, tokenizer)
    return lines


def _address(text: Text, asked: Asked, counted: "Counted | None", learned: Pretrain) -> str:
    """What it was measured on. Windows and chosen rows are other pieces of text under another tokenizer."""
    own = counted is None or not counted.keys or ":" not in counted.keys[0] or asked.section.rows is not None
    if not own:
        return text.address
    context = asked.section.context or learned.model.context
    parts = [text.address, text.shards[0].manifest["tokenizer"], asked.section.rows, context]
    parts += [asked.section.stride, learned.objective]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _learned_from(subject: Subject, asked: Asked, text: Text) -> list[str]:
    """Whether a model may have learned from the text that another's run held out.

    A document is held out where the hash of its text is below the run's threshold: of the same texts a run with the
    lower threshold learned from what lies between the two.
    """
    holder = asked.held_out_by
    if asked.section.data is not None:
        return _documents_learned(subject, asked, text)
    if holder in (None, subject):
        return []
    own = {shard.manifest["texts"]: shard for shard in shards_of_run(subject, asked.options.runs)}
    if not own:
        return []  # nothing is known of what it learned from
    num, total, unknown = 0, 0, False
    for shard in text.shards:
        held = shard.counts("held_out").documents
        same = own.get(shard.manifest["texts"])
        total, unknown = total + held, unknown or same is None
        if same is not None and same.manifest["held_out_below"] < shard.manifest["held_out_below"]:
            num += held - same.counts("held_out").documents
    found = []
    if num:
        found.append(
            f"{num:,} of the {total:,} documents are among those that this model's run learns from: it held out fewer "
            "of the same text"
        )
    if unknown:
        found.append(
            "text was held out by another run from other texts: this one may have learned from some of it"
        )
    return found


def _documents_learned(subject: Subject, asked: Asked, text: Text) -> list[str]:
    """How many documents are, token by token, among those that the model's run learned from, if that is soon told."""
    try:
        own = shards_of_run(subject, asked.options.runs)
    except MissingError:
        return []
    if not own or own[0].manifest["tokenizer"] != text.shards[0].manifest["tokenizer"]:
        return []
    learned = [shard.split("train") for shard in own]
    if sum(stream.num_tokens for stream in learned) > _MOST_SEARCHED:
        return []
    measured = [shard.split(text.split) for shard in text.shards]
    lengths = {int(length) for stream in measured for length in stream.document_lengths()}
    seen = set(_documents(learned, lengths))
    found = list(_documents(measured, lengths))
    count = sum(one in seen for one in found)
    if not count:
        return []
    return [f"{count:,} of the {len(found):,} documents are among those that the model learned from"]


def _documents(streams: "Sequence[TokenStream]", lengths: Container[int]) -> Iterator[bytes]:
    """A hash of the tokens of each document of one of these lengths."""
    for stream in streams:
        starts = stream.document_starts(0, stream.num_tokens).tolist()
        for start, length in zip(starts, stream.document_lengths().tolist(), strict=True):
            if length in lengths:
                tokens = stream.read(start, start + length).astype(np.int64)
                yield hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _said(context: int, stride: int | None, last_end: bool) -> str:
    end = "" if last_end else "; without the mark of the end after the last document"
    if stride is None:
        return f"rows of {context} tokens that do not overlap{end}"
    return f"windows of {context} tokens that move on by {stride}; each token is measured once{end}"


def _warnings(rows: int | None, text: Text, tokenizer: Any) -> list[str]:
    from llmkit.data.prepare import occurrences

    found = []
    if rows is not None:
        found.append(f"measured on {rows:,} rows at most; a run's own last evaluation takes all")
    unknown = tokenizer.unk_token_id
    counts = occurrences(text.shards, text.split)
    if unknown is not None and unknown < len(counts) and counts[unknown] > _MANY_UNKNOWN * counts.sum():
        share = counts[unknown] / counts.sum()
        found.append(
            f"{share:.0%} of the text's tokens are unknown to the tokenizer ({tokenizer.unk_token}): the figures "
            "say little"
        )
    return found
