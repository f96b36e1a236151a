"""A recipe's corpus: its sources, prepared if the recipe says so, divided into training and held-out documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.data import sources as text
from llmkit.data.order import common_weights
from llmkit.data.pipeline import Engine, Progress
from llmkit.data.places import Tally
from llmkit.data.sample import Sample, choose_sample
from llmkit.data.shards import TokenShards, build_shards
from llmkit.data.split import UndividedError, find_threshold
from llmkit.data.texts import SourceTexts, Texts
from llmkit.errors import RecipeError, UsageError
from llmkit.hardware import usable_cores
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.schema import Machine, Recipe, Source
from llmkit.report.console import Reporter

if TYPE_CHECKING:
    from llmkit.data.prepared import Prepared

_HELD_OUT = 0.01
_UNPACKED = 3


@dataclass(frozen=True)
class Corpus:
    """Where a recipe's text is, what is done to it, and how it is divided.

    Attributes:
        sources: The text.
        preparation: What is done to it first.
        held_out: Share of documents kept out of training.
        base: The recipe's folder.
        cache: Where shards are kept.
        engine: What prepares and encodes.
        fresh: Make everything anew, also what is there already.
        reporter: Told what happens, if anybody.
    """

    sources: Sequence[Source]
    preparation: Prepare
    held_out: float
    base: Path
    cache: Path
    engine: Engine
    reporter: Reporter | None = None
    fresh: bool = False

    @property
    def weights(self) -> list[float] | None:
        """The sources' weights, or None where they count by size."""
        return common_weights([source.weight for source in self.sources])

    def sizes(self) -> list[tuple[str, int]]:
        """Each source's name and the bytes of its files as they lie on the disk; 0 where it is not known."""
        sizes = [text.num_bytes(source, self.base, cache=self.cache) for source in self.sources]
        return list(zip(self._names, sizes, strict=True))

    def expected_bytes(self) -> int:
        """A guess at the bytes of the text itself: compressed files and parquet hold a few times their size."""
        return sum(
            size * (_UNPACKED if any(map(_is_packed, source.files or ())) else 1)
            for source, (_, size) in zip(self.sources, self.sizes(), strict=True)
        )

    @cached_property
    def prepared(self) -> "Prepared | None":
        """The prepared text, made where it is not there yet; None if the recipe asks for no preparation."""
        if all(block is None for _, block in self.preparation):
            return None
        from llmkit.data.prepared import prepare_texts

        return prepare_texts(
            self._read,
            self.preparation,
            base=self.base,
            cache=self.cache,
            engine=self.engine,
            tell=self._tell,
            fresh=self.fresh,
        )

    @cached_property
    def texts(self) -> Sequence[Texts]:
        """The texts that are learnt from, one entry a source."""
        return self._read if self.prepared is None else self.prepared.texts

    @cached_property
    def held_out_below(self) -> int:
        """The split hash below which a document is held out (`split.find_threshold`).

        It reads documents until one of each side was seen, about 1/`held_out` of them.
        """
        tallies = [Tally() for _ in self.texts]
        every = (
            document
            for texts, tally in zip(self.texts, tallies, strict=True)
            for number in range(len(texts.sizes))
            for document in texts.read(number, tally)
        )
        try:
            return find_threshold(every, self.held_out)
        except UndividedError:
            # It read to the end: a source without any text is the better explanation.
            for texts, tally in zip(self.texts, tallies, strict=True):
                texts.check(tally)
            raise

    def shards(self, tokenizer: Any) -> list[TokenShards]:
        """The shards, one of them a source; made where they are not there yet."""
        return build_shards(
            self.texts,
            tokenizer,
            held_out=self.held_out,
            held_out_below=self.held_out_below,
            cache=self.cache,
            engine=self.engine,
            progress=self._tell("encode"),
            fresh=self.fresh,
        )

    def sample(self, limit: int) -> Sample:
        """What a tokenizer learns from, and what it is measured on."""
        return choose_sample(
            self.texts,
            limit=limit,
            held_out_below=self.held_out_below,
            cache=self.cache,
            engine=self.engine,
            progress=self._tell("sample"),
        )

    @cached_property
    def _names(self) -> list[str]:
        return text.source_names(self.sources, self.base, cache=self.cache)

    @cached_property
    def _read(self) -> list[SourceTexts]:
        return [
            SourceTexts.of(source, name=name, base=self.base, cache=self.cache, size=size)
            for source, (name, size) in zip(self.sources, self.sizes(), strict=True)
        ]

    def _tell(self, stage: str) -> Progress | None:
        reporter = self.reporter
        if reporter is None:
            return None
        return lambda done, total: reporter.progress(stage, done, total or None, unit="bytes")


def corpora_of(
    recipe: Recipe, *, base: Path, cache: Path, reporter: Reporter | None = None, fresh: bool = False
) -> tuple[Corpus, Corpus]:
    """The text that a recipe trains its model on, and its tokenizer: each by default what the other section names.

    They are one and the same object where the sections do not name different text.

    Raises:
        UsageError: The recipe names none.
    """
    tokenize, pretrain = recipe.tokenize, recipe.pretrain
    named = [section.data for section in (pretrain, tokenize) if section is not None and section.data]
    if not named:
        raise UsageError("the recipe names no text", hint="add `data: {files: ...}` to `pretrain`")
    held_out = tokenize.held_out if tokenize else None
    if held_out is None:
        held_out = pretrain.held_out if pretrain else _HELD_OUT
    preparation = tokenize.prepare if tokenize else Prepare()
    engine = engine_of(recipe.machine)
    for_model, *other = (
        Corpus(data, preparation, held_out, base, cache, engine, reporter, fresh) for data in named
    )
    return for_model, other[0] if other and other[0].sources != for_model.sources else for_model


def engine_of(machine: Machine) -> Engine:
    """What the recipe's machine section chooses to do the work with.

    Raises:
        RecipeError: Slurm is asked for and no partition is named.
    """
    workers = usable_cores() if machine.workers == "auto" else machine.workers
    if machine.engine == "here":
        return Engine(workers)
    from llmkit.data.cluster import Cluster

    asked = machine.slurm
    if machine.engine == "slurm" and not asked.partition:
        raise RecipeError(
            "`machine.engine: slurm` needs to know the partition",
            hint="machine.slurm.partition=NAME; `sinfo` lists them",
        )
    cluster = Cluster(
        partition=asked.partition,
        time=asked.time,
        cpus=asked.cpus,
        memory_gb=max(1, asked.memory // 10**9),
        max_array=asked.max_array,
        arguments=tuple(sorted(asked.arguments.items())),
        setup=asked.setup,
    )
    return Engine(workers, machine.engine, cluster)


def _is_packed(pattern: str) -> bool:
    return pattern.endswith((".gz", ".zst", ".parquet"))
