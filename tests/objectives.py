"""What every objective is tested with: a tiny model of its kind, a small vocabulary, rows of real text.

Whatever is registered is in: an objective gets here by its line in `llmkit.registry`.
"""

import inspect
import json
import textwrap
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from llmkit import registry
from llmkit.data.loader import seeded_rows
from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.data.seeds import row_seed
from llmkit.data.tokenizers import learn, open_tokenizer
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.objectives.base import Objective
from llmkit.plan import layout_of
from llmkit.recipe.objectives import tokens_for
from llmkit.recipe.schema import Model, Pretrain, Tokenize, Train

CONTEXT = 32
VOCAB_SIZE = 500
"""Room for the 256 bytes and every objective's special tokens."""

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "causal": {"model_type": "llama", **_SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "masked": {"model_type": "bert", **_SMALL},
    "pairs": {"model_type": "bert", **_SMALL},
    "detector": {"model_type": "electra", **_SMALL, "embedding_size": 32},
    "seq2seq": {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""A configuration for each kind of model."""
BART = {
    "model_type": "bart",
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
}


def changes(objective: str) -> dict[str, Any]:
    """What makes `training.recipe` one of an objective, in its dotted keys."""
    if objective not in registry.OBJECTIVES:
        return {}  # of another process alone
    return {
        "tokenize__vocab_size": VOCAB_SIZE,
        "pretrain__objective": objective,
        "pretrain__model__config": TINY[registry.goal_of(objective).model],
    }


def section(objective: str, context: int = CONTEXT, **settings: Any) -> Pretrain:
    """A `pretrain` section that learns an objective."""
    config = TINY[registry.goal_of(objective).model]
    return Pretrain(
        objective=objective,
        model=Model(config=config, context=context),
        train=Train.model_validate({"length": "1 steps"}),
        **settings,
    )


@cache
def tokenizer(objective: str, algorithm: str = "bpe", size: int = VOCAB_SIZE) -> Any:
    """One that a recipe would learn for an objective, from a module's source."""
    texts = [inspect.getsource(module) for module in (json, textwrap)]
    spec = Tokenize(algorithm=algorithm, vocab_size=size, special_tokens=tokens_for(objective, algorithm, []))
    with TemporaryDirectory() as folder:
        learn(texts, [], spec, Path(folder))
        return open_tokenizer(folder)


def vocabulary(objective: str, algorithm: str = "bpe", size: int = VOCAB_SIZE) -> Vocabulary:
    """That tokenizer as the objective sees it."""
    return Vocabulary.of(tokenizer(objective, algorithm, size))


def make(objective: str, context: int = CONTEXT, **settings: Any) -> Objective:
    """The objective, of a small vocabulary."""
    build = registry.load(registry.goal_of(objective).code)
    made: Objective = build(section(objective, context, **settings), vocabulary(objective))
    return made


class Text:
    """A token stream of lines of real text, a document each."""

    name = "text"

    def __init__(self, objective: str) -> None:
        entries = tokenizer(objective)
        encode = Vocabulary.of(entries).encode
        documents = [
            [*encode(part), entries.eos_token_id]
            for module in (textwrap, json)
            for part in inspect.getsource(module).split("\n\n")
        ]
        self.ids = np.array([number for document in documents for number in document])
        self.starts = np.cumsum([0, *map(len, documents)])[:-1]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> Any:
        return self.ids[start:stop]

    def document_starts(self, start: int, stop: int) -> Any:
        return self.starts[(self.starts >= start) & (self.starts < stop)]


def rows(objective: str, count: int, context: int = CONTEXT, *, seed: int = 7) -> list[Any]:
    """The rows that a run of the objective takes first."""
    goal = registry.goal_of(objective)
    layout = layout_of(section(objective, context))
    all_rows = Rows([Text(objective)], layout.stride, overlap=layout.overlap)
    places = RowOrder(all_rows.sizes, None, seed).locate(np.arange(count))
    seeds = [row_seed(seed, at) for at in range(count)]
    return seeded_rows(all_rows, *places, seeds, isolate=goal.positions, other=goal.other)
