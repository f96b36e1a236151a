"""`task: retrieval`: whether a model finds the passages that questions ask for, and what a reader makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.evaluate.measurement import Items, Measurement
from llmkit.metrics.inputs import Floats, Integers
from llmkit.metrics.written import WrittenRows, written_rows
from llmkit.recipe.evaluation import Retrieval
from llmkit.recipe.labelled import Labelled
from llmkit.run.folders import CACHE
from llmkit.run.measure import generation
from llmkit.run.measure.asked import Asked, Subject

if TYPE_CHECKING:
    from llmkit.evaluate.answering import Written
    from llmkit.evaluate.passages import Collection
    from llmkit.evaluate.retrieval import Encoder, Manner

_MOST_ERRORS = 50
_LONGEST_TEXT = 2000
_SHOWN_PASSAGES = 10
_GAIN_AT = 10


@dataclass(frozen=True)
class _Found:
    """What a search found. Shape suffixes: Q queries, K found passages.

    Attributes:
        ids_QK: Passages, the nearest first.
        cosines_QK: How near they are.
        ranks: By query the ranks of what is right.
        was_kept: Whether the passages' vectors were there already.
        num_cut: Passages that were cut.
        alike: Which texts all have the same vector, though they are not the same.
    """

    ids_QK: Integers
    cosines_QK: Floats
    ranks: Sequence[Integers]
    was_kept: bool
    num_cut: int
    alike: Sequence[str]


@dataclass(frozen=True)
class _Read:
    """What a reader made of the passages.

    Attributes:
        written: Its answers.
        counted: Their figures.
        settings: How it was asked.
        num_shortened: Questions for which not all passages fitted.
    """

    written: "Sequence[Written]"
    counted: WrittenRows
    settings: Mapping[str, Any]
    num_shortened: int


def measure(subject: Subject, asked: Asked) -> Measurement:
    """Search the passages for each question, and compare with what is right to find.

    Raises:
        UsageError: Nothing says what is asked or searched, or the model makes no vectors.
        DataError: A row cannot be used, or there is none.
        MissingError: There is no model, or a package is missing.
    """
    from llmkit.evaluate.retrieval import Encoder

    settings = asked.section.retrieval
    _check_prompt(settings)
    collection, address = _collection(asked)
    manner = _manner(subject, settings)
    encoder = Encoder(
        subject.place,
        manner,
        device=asked.device,
        bf16=subject.precision == "bf16",
        trusted=subject.trust_remote_code,
    )
    found = _search(encoder, collection, asked)
    read = _read(collection, found, asked) if settings.reader is not None else None
    columns = _columns(found.ranks, settings)
    items = _items(collection, columns, read)
    figures = _figures(columns, read)
    return Measurement(
        subject=subject.word,
        model=str(subject.place),
        task="retrieval",
        data=address,
        figures=figures,
        shown=tuple(figures),
        best="mrr" if read is None else "f1",
        items=items,
        tables=_tables(collection, found, read),
        settings=_said(subject, manner, collection, settings, read),
        predictions=_predictions(collection, found, read, max(settings.top)),
        warnings=_warnings(collection, found, manner, asked, read),
    )


def _check_prompt(settings: Retrieval) -> None:
    if settings.reader is None:
        return
    for name in ("{passages}", "{question}"):
        if name not in settings.prompt:
            raise UsageError(
                f"eval.retrieval.prompt does not say where the {name[1:-1]} go: {settings.prompt!r}",
                hint=f"put {name} where they belong",
            )


def _collection(asked: Asked) -> "tuple[Collection, str]":
    """Questions and passages, and the address of both."""
    import hashlib

    from llmkit.data.loader import evenly_spaced
    from llmkit.data.records.found import fingerprint
    from llmkit.evaluate.passages import read_collection

    data, cache = (
        generation.data_of(asked, "`question` and `positive` or `answers`"),
        asked.options.runs / CACHE,
    )
    if data is None:
        raise UsageError(
            "nothing says which questions to ask",
            hint="--data FILE, with rows of `question` and `positive` or `answers`",
        )
    corpus = None
    if asked.section.retrieval.corpus is not None:
        corpus = Labelled(name="corpus", files=asked.section.retrieval.corpus)
    collection = read_collection(data, corpus, asked.base, cache=cache)
    chosen = evenly_spaced(len(collection.queries), asked.section.rows).tolist()
    collection = replace(collection, queries=[collection.queries[number] for number in chosen])
    parts = [fingerprint(one, asked.base, cache=cache) for one in (data, corpus) if one is not None]
    return collection, parts[0] if corpus is None else hashlib.sha256("".join(parts).encode()).hexdigest()


def _manner(subject: Subject, settings: Retrieval) -> "Manner":
    """How vectors are made: as the model's folder says, and above that the recipe."""
    from llmkit.evaluate.retrieval import manner_of

    pooling = None if settings.pooling == "auto" else settings.pooling
    manner = manner_of(subject.place, pooling=pooling, trusted=subject.trust_remote_code)
    if settings.query_prefix is not None:
        manner = replace(manner, query_prefix=settings.query_prefix)
    if settings.passage_prefix is not None:
        manner = replace(manner, passage_prefix=settings.passage_prefix)
    return manner


def _search(encoder: "Encoder", collection: "Collection", asked: Asked) -> _Found:
    from llmkit.evaluate.retrieval import DEPTH, all_equal, search

    manner, settings = encoder.manner, asked.section.retrieval
    told = generation.Told(asked, len(collection.passages) + len(collection.queries), unit="text")
    cache = asked.options.runs / CACHE
    passages_MD, was_kept = encoder.kept_vectors(collection.passages, manner.passage_prefix, cache, told=told)
    num_cut = encoder.num_cut
    questions = [query.question for query in collection.queries]
    queries_QD = encoder.vectors(questions, manner.query_prefix, told=told)
    depth = max(DEPTH, *settings.top)
    ids_QK, cosines_QK = search(queries_QD, passages_MD, index=settings.index, depth=depth)
    made = {"passages": (collection.passages, passages_MD), "questions": (questions, queries_QD)}
    alike = [name for name, (texts, vectors) in made.items() if len(set(texts)) > 1 and all_equal(vectors)]
    return _Found(ids_QK, cosines_QK, _ranks(collection, ids_QK, cosines_QK), was_kept, num_cut, alike)


def _ranks(collection: "Collection", ids_QK: Integers, cosines_QK: Floats) -> list[Integers]:
    """By query the ranks of its passages; where answers tell what is right, of the first passage that holds one."""
    from llmkit.evaluate.passages import holds
    from llmkit.evaluate.retrieval import first_rank, ranks_of

    if collection.right == "named":
        return [
            ranks_of(ids_K, cosines_K, query.relevant)
            for ids_K, cosines_K, query in zip(ids_QK, cosines_QK, collection.queries, strict=True)
        ]

    def right(number: int, answers: Sequence[str]) -> bool:
        return any(holds(collection.passages[number], answer) for answer in answers)

    return [
        first_rank(ids_K, cosines_K, partial(right, answers=query.answers))
        for ids_K, cosines_K, query in zip(ids_QK, cosines_QK, collection.queries, strict=True)
    ]


def _columns(ranks: Sequence[Integers], settings: Retrieval) -> dict[str, Floats]:
    """What each query contributes to each figure, [Q]."""
    import numpy as np

    from llmkit.metrics.retrieval import retrieval_metrics

    rows = [retrieval_metrics([own], sorted({*settings.top, _GAIN_AT})) for own in ranks]
    names = [*(f"recall_at_{k}" for k in sorted(settings.top)), "mrr", f"ndcg_at_{_GAIN_AT}"]
    return {name: np.array([row[name] for row in rows]) for name in names}


def _figures(columns: Mapping[str, Floats], read: _Read | None) -> dict[str, float]:
    figures = {name: float(values_Q.mean()) for name, values_Q in columns.items()}
    return figures | (read.counted.all_figures() if read is not None else {})


def _items(collection: "Collection", columns: Mapping[str, Floats], read: _Read | None) -> Items:
    def figures(rows: Integers) -> Mapping[str, float]:
        found = {name: float(values_Q[rows].mean()) for name, values_Q in columns.items()}
        return found | (read.counted.figures(rows) if read is not None else {})

    right = None if read is None or read.counted.right_N is None else read.counted.right_N.tolist()
    return Items(generation.distinct_keys([query.key for query in collection.queries]), figures, right)


# --- the reader -----------------------------------------------------------------------------------------------


def _read(collection: "Collection", found: _Found, asked: Asked) -> _Read:
    """Let a model answer from the passages that were found."""
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.prompts import Prompt
    from llmkit.run.evaluate import find_subject

    reader = find_subject(str(asked.section.retrieval.reader), asked.options, asked.reporter)
    generation.check_writes(reader)
    tokenizer = load_tokenizer(str(reader.place))
    room = _room(reader, asked)
    prompts: list[Prompt] = []
    num_shortened = 0
    for ids_K, query in zip(found.ids_QK, collection.queries, strict=True):
        passages = [
            collection.passages[number] for number in ids_K[: asked.section.retrieval.passages].tolist()
        ]
        text, left_out = _fitting(asked.section.retrieval.prompt, passages, query.question, tokenizer, room)
        num_shortened += left_out > 0
        prompts.append(Prompt(query.place, text, (), query.answers))
    written, how = generation.write(reader, asked, prompts)
    references = [query.answers for query in collection.queries]
    counted = written_rows(
        [one.text for one in written],
        references if all(references) else None,
        language=asked.language,
        bleu_tokenizer=asked.section.generation.bleu_tokenizer,
    )
    return _Read(written, counted, {"reader": str(reader.place), **how, **counted.settings}, num_shortened)


def _room(reader: Subject, asked: Asked) -> int:
    """Tokens that a prompt may have, so that nothing of it has to be cut."""
    from llmkit.models.build import kind_of
    from llmkit.models.tasks import longest_input

    longest = longest_input(str(reader.place), trusted=reader.trust_remote_code) or 1 << 30
    if kind_of(str(reader.place)) == "seq2seq":
        return longest
    return max(1, longest - asked.section.generation.max_new_tokens)


def _fitting(
    prompt: str, passages: Sequence[str], question: str, tokenizer: Any, room: int
) -> tuple[str, int]:
    """The prompt with as many passages, the nearest first, as fit; and how many were left out."""
    for kept in range(len(passages), 0, -1):
        text = _filled(prompt, "\n\n".join(passages[:kept]), question)
        if len(tokenizer(text, verbose=False)["input_ids"]) <= room:
            break
    return text, len(passages) - kept


def _filled(prompt: str, passages: str, question: str) -> str:
    """The prompt with both in their places; what they say themselves is no place."""
    parts = prompt.split("{question}")
    return question.join(part.replace("{passages}", passages) for part in parts)


# --- what is told ---------------------------------------------------------------------------------------------


def _said(
    subject: Subject, manner: "Manner", collection: "Collection", settings: Retrieval, read: _Read | None
) -> dict[str, Any]:
    from dataclasses import asdict

    from llmkit.evaluate.retrieval import DEPTH

    said = {
        **asdict(manner),
        "precision": subject.precision,
        "index": settings.index,
        "depth": max(DEPTH, *settings.top),
        "right": collection.right,
        "num_passages": len(collection.passages),
        "num_queries": len(collection.queries),
    }
    if read is None:
        return said
    return {**said, "passages": settings.passages, "prompt": settings.prompt, **read.settings}


def _one(collection: "Collection", found: _Found, row: int, top: int) -> dict[str, Any]:
    """A question, and what was found for it."""
    from llmkit.evaluate.retrieval import NOT_FOUND

    query, rank = collection.queries[row], int(found.ranks[row][0])
    ids, cosines = found.ids_QK[row, :top].tolist(), found.cosines_QK[row, :top].tolist()
    return {
        "place": query.place,
        "input": query.question,
        "target": [collection.names[number] for number in query.relevant] or list(query.answers),
        "found": [
            {"passage": collection.names[number], "score": round(cosine, 6)}
            for number, cosine in zip(ids, cosines, strict=True)
        ],
        "rank": None if rank == NOT_FOUND else rank,
    }


def _predictions(
    collection: "Collection", found: _Found, read: _Read | None, top: int
) -> list[dict[str, Any]]:
    lines = []
    for row, query in enumerate(collection.queries):
        line = _one(collection, found, row, top)
        line |= {"prediction": line["found"][0]["passage"], "score": line["found"][0]["score"]}
        if read is not None:
            line |= {"prediction": read.written[row].text, "answers": list(query.answers)}
            line["scores"] = {name: float(values_N[row]) for name, values_N in read.counted.means.items()}
            line["score"] = line["scores"].get("f1")
        lines.append(line)
    return lines


def _tables(collection: "Collection", found: _Found, read: _Read | None) -> dict[str, Any]:
    """The questions whose passages were found last."""
    worst = sorted(range(len(found.ranks)), key=lambda row: (-int(found.ranks[row][0]), row))
    lines = []
    for row in [row for row in worst if found.ranks[row][0] > 1][:_MOST_ERRORS]:
        query, nearest = collection.queries[row], int(found.ids_QK[row, 0])
        target = collection.passages[query.relevant[0]] if query.relevant else query.answers[0]
        lines.append(
            {
                "place": query.place,
                "text": query.question,
                "target": target[:_LONGEST_TEXT],
                "prediction": collection.passages[nearest][:_LONGEST_TEXT],
                "score": float(found.cosines_QK[row, 0]),
            }
        )
    tables: dict[str, Any] = {
        "errors": lines,
        "retrieved": [
            _one(collection, found, row, 3) for row in range(min(_SHOWN_PASSAGES, len(found.ranks)))
        ],
    }
    return tables if read is None else {**tables, "written": generation.lengths_of(read.written)}


def _warnings(
    collection: "Collection", found: _Found, manner: "Manner", asked: Asked, read: _Read | None
) -> list[str]:
    from llmkit.evaluate.retrieval import NOT_FOUND

    said = []
    if not manner.known:
        said.append(
            "nothing says how this model's vectors are made: taken as the mean of its tokens' vectors "
            "(eval.retrieval.pooling, query_prefix, passage_prefix)"
        )
    said += [f"all {name} have the same vector: the model tells none from another" for name in found.alike]
    if found.num_cut:
        said.append(
            f"{found.num_cut:,} of {len(collection.passages):,} passages are longer than {manner.max_length} tokens: "
            "their ends were not read"
        )
    lost = sum(int(own[0]) == NOT_FOUND for own in found.ranks)
    if lost and collection.right == "answers":
        said.append(f"{lost:,} questions found no passage that holds an answer; they count as not found")
    if len(collection.passages) <= max(asked.section.retrieval.top):
        said.append(
            f"there are {len(collection.passages):,} passages: recall_at_{max(asked.section.retrieval.top)} is 1 "
            "whatever the model finds"
        )
    if read is not None:
        said += generation.warnings_of(read.written, asked.section.generation)
        said += (
            [f"{read.num_shortened:,} questions had less room than passages"] if read.num_shortened else []
        )
    return said
