"""How much of a model learns: adapters, what is frozen, what thaws when, and how rates fall with depth.

Blocks of a section that starts from a trained model, and the rules between them. Layers are counted as everywhere in
llmkit: 0 is the embeddings, 1 the layer next to them, the last one stands below the head.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Literal, Self

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from llmkit.recipe.block import Block
from llmkit.recipe.units import Amount, Count, Grammar, Part, Whole, unit_error

HEAD = "head"
"""In a pattern of `freeze`: all of the model outside its body."""

PATTERN = r"[^ |]"
THAW = Grammar(
    "an interval in steps", ("steps", "percent", "tokens", "epochs"), ("100 steps", "10%", "0.5 epochs")
)
Pattern = Annotated[str, Field(pattern=PATTERN)]
Thaw = Annotated[
    Amount,
    PlainValidator(THAW.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(THAW.json_schema()),
]
LayerDecay = Annotated[float, Field(gt=0, le=1)]
"""The learning rate of a layer as a share of that of the layer above it."""

DEFAULT_BITS = 4
"""Of the base under `qlora`."""


class Adapter(Block):
    """Small matrices that learn in place of the model, which stays as it is."""

    method: Literal["lora", "rslora", "dora", "qlora"] = "lora"
    """`lora` adds a product of two thin matrices to each target, `rslora` scales it by the root of the rank so that
    high ranks learn too, `dora` also learns the length of each row of the target, `qlora` is `lora` on a base that is
    held in `bits` bits, on an NVIDIA GPU with bitsandbytes."""
    rank: Count = 16
    """The width of the thin matrices."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The product is scaled by `alpha / rank`, with `rslora` by `alpha / sqrt(rank)`; by default twice the rank."""
    dropout: Part = 0.0
    """The share of a target's inputs that the product does not see in a step."""
    targets: Pattern = "auto"
    """Which layers get one: `auto`, all linear layers of the body (not the head); or patterns as in
    `train.optim.groups`: `q_proj|v_proj`, `layers.[4-7]`."""
    whole: Pattern | None = None
    """Modules that learn whole beside it, by the same patterns, and are kept with it: `embed_tokens|lm_head`. A head
    that begins at random always does."""
    bits: Literal[4, 8] | None = None
    """With `qlora`: what each number of the base is held in; by default 4."""
    start: str | None = None
    """A run with an adapter, or a folder in PEFT's form, that learning goes on from. Its rank, alpha, method and
    targets must be those of this block."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")] = "default"
    """What the adapter is called among others on the same model."""
    merge: bool = True
    """Also export the whole model with the adapter in its weights, which needs no PEFT. It is compared with the model
    under its adapter on real rows first."""
    max_kl: Annotated[float, Field(gt=0)] = 1e-3
    """With `merge`: how far the predictions of the two may lie apart: mean divergence in nats; more is an error."""

    @model_validator(mode="after")
    def _bits_are_of_qlora(self) -> Self:
        """Other methods leave the base as it is."""
        if self.bits is not None and self.method != "qlora":
            raise unit_error(
                f"`bits` belongs to `method: qlora`, and `method` is `{self.method}`",
                "leave `bits` out, or set `method: qlora`",
            )
        return self

    @property
    def scale(self) -> float:
        """What the product of the thin matrices is multiplied by."""
        return self.alpha_or_default / (self.rank**0.5 if self.method == "rslora" else self.rank)

    @property
    def alpha_or_default(self) -> float:
        """`alpha`, twice the rank where it is left out."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def base_bits(self) -> int | None:
        """The bits of each number of the base; None where it is as it was loaded."""
        return (self.bits or DEFAULT_BITS) if self.method == "qlora" else None


class Freeze(Block):
    """What of the model does not learn: from below by `layers`, by `match`, or all but some."""

    layers: Annotated[Whole, Field(ge=0)] | None = None
    """The embeddings and so many of the lowest layers, of an encoder-decoder on each side; 0: the embeddings alone."""
    match: Pattern | None = None
    """Parameters by name, as in `train.optim.groups`: `embed*|norm*`; the word `head` stands for the model's head."""
    all_but: Pattern | None = None
    """Everything but these parameters: `head` leaves only the head to learn, `head|bias` also the biases."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        """`all_but` says everything alone; without any of the three nothing is said."""
        given = [name for name in ("layers", "match", "all_but") if getattr(self, name) is not None]
        if not given:
            raise unit_error(
                "`freeze` says nothing", "write `{layers: 6}`, `{match: 'embed*'}` or `{all_but: head}`"
            )
        if "all_but" in given and len(given) > 1:
            others = " and ".join(f"`{name}`" for name in given if name != "all_but")
            raise unit_error(f"`all_but` freezes the rest already, so {others} cannot stand beside it")
        return self


class Unfreeze(Block):
    """Layers begin to learn one after the other, from the top; the head learns from the start."""

    every: Thaw = Amount(10, "percent")
    """When `layers` more begin to learn: `100 steps`, `10%` of the run, `1 epoch`. The embeddings come last."""
    layers: Count = 1
    """So many layers each time."""
    start: Annotated[Whole, Field(ge=0)] = 0
    """So many of the top layers learn from the first step, beside the head."""


def check_parts(
    adapter: Adapter | None, freeze: Freeze | None, unfreeze: Unfreeze | None
) -> Iterator[tuple[str, str, str]]:
    """What does not go together: the key (below the section), what is wrong, and what would work."""
    if adapter is None:
        return
    others = {"freeze": freeze, "unfreeze": unfreeze}
    for key in (key for key, value in others.items() if value is not None):
        yield (
            key,
            f"with an adapter the model itself does not learn, so there is nothing to {key}",
            f"leave `{key}` out; `adapter.targets` chooses the layers that get one",
        )


def quantizing_needs(device: str) -> str:
    """Why a base cannot be held in few bits here, or nothing where it can; known before anything is loaded."""
    if device != "cuda":
        return f"a base in few bits needs an NVIDIA GPU, and this run computes on {device}"
    if find_spec("bitsandbytes") is None:
        return 'a base in few bits needs bitsandbytes: pip install "llmkit[qlora]"'
    return ""
