"""How much of a model learns in a run: an adapter put into it, what is frozen, what thaws when, and how fast.

All of it is decided before the optimizer is made and before anything wraps the model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmkit.errors import MissingError, UsageError
from llmkit.models.adapters import inject_adapter, modules_of, quantize_base
from llmkit.models.freezing import Counts, Pace, apply_freezing, describe_thawing, paces_of
from llmkit.plan import Plan
from llmkit.plan.length import resolve_every
from llmkit.recipe.parts import Adapter, quantizing_needs
from llmkit.recipe.schema import Finetune, Section

_POOLER = "pooler."


def choose_what_learns(
    model: PreTrainedModel,
    section: Finetune,
    *,
    device: torch.device,
    new: Sequence[str],
    base: str,
    seed: int,
) -> Counts:
    """Quantise the base, put the adapter in, or freeze, as the recipe says; a plain model only counts.

    Args:
        model: As it was loaded, on CPU, or without weights on the meta device, which is never quantised.
        section: The recipe's.
        device: Where the run computes.
        new: The names of weights that begin at random: modules that hold them learn whole beside an adapter.
        base: The folder or name of the model.
        seed: Decides the adapter's first weights.

    Raises:
        MissingError: A package that is needed is not installed.
        UsageError: What is asked for does not fit this model, or nothing is left to learn.
    """
    spec = section.adapter
    if spec is None:
        return apply_freezing(model, section.freeze)
    if spec.base_bits is not None and model.device.type != "meta":
        quantize_base(model, spec.base_bits, device=device)
    idle = {name for name, p in model.named_parameters() if not p.requires_grad}  # the task does not use it
    whole = modules_of([name for name in new if name not in idle])
    return inject_adapter(model, spec, seed=seed, new=whole, base=base)


def check_device(spec: Adapter | None, device: str) -> None:
    """Say before anything is loaded that a base cannot be held in few bits on this device.

    Raises:
        MissingError: It cannot.
    """
    why = quantizing_needs(device) if spec is not None and spec.base_bits is not None else ""
    if why:
        raise MissingError(f"finetune.adapter.method is qlora: {why}", hint="finetune.adapter.method=lora")


def paces(model: PreTrainedModel, section: Section, plan: Plan) -> Mapping[int, Pace]:
    """How each parameter learns by its depth; empty where all learn alike.

    Raises:
        UsageError: Layers thaw by a length that is not known in steps before training.
    """
    if not isinstance(section, Finetune):
        return {}
    every = _steps_between_layers(section, plan)
    decay = section.lr_decay if section.lr_decay is not None else 1.0
    return paces_of(model, lr_decay=decay, unfreeze=section.unfreeze, every=every)


def told(model: PreTrainedModel, section: Section, plan: Plan, counts: Counts) -> Iterator[str]:
    """What a person should know of what learns, a sentence a line; nothing where all of the model does."""
    if not isinstance(section, Finetune):
        return
    if counts.frozen:
        spec = section.adapter
        what = f"an adapter ({spec.method}, rank {spec.rank})" if spec is not None else "the model"
        yield f"{what}: {counts.trained:,} numbers learn and {counts.frozen:,} stay ({counts.share:.2%})"
    every = _steps_between_layers(section, plan)
    if section.unfreeze is not None and plan.num_steps is not None:
        for line in describe_thawing(model, section.unfreeze, every, plan.num_steps):
            yield f"unfreeze: {line}"


def _steps_between_layers(section: Finetune, plan: Plan) -> int:
    if section.unfreeze is None:
        return 0
    every = resolve_every(
        section.unfreeze.every,
        num_steps=plan.num_steps,
        tokens_per_step=plan.tokens_per_step,
        rows_per_step=plan.rows_per_step,
        num_rows_per_epoch=plan.num_rows_per_epoch,
    )
    if every is None:
        raise UsageError(
            f"finetune.unfreeze.every is {section.unfreeze.every} of a run whose length is a time",
            hint="finetune.unfreeze.every=100 steps, or a `train.length` in epochs or steps",
        )
    return every


def count_ahead(model: PreTrainedModel, section: Finetune, folder: str) -> Counts:
    """What of a model will learn, before its weights are loaded.

    Args:
        model: As it will be, without weights on the meta device; changed.
        section: The recipe's.
        folder: Where its weights are; of a name on the Hub, all of the head counts as new.
    """
    return choose_what_learns(
        model,
        section,
        device=torch.device("meta"),
        new=new_weights(model, Path(folder)),
        base=folder,
        seed=0,
    )


def new_weights(model: PreTrainedModel, folder: Path) -> list[str]:
    """The weights of a model's head that its files lack, or have in another shape."""
    if model.base_model is model:
        return []  # a bare body has no head, and what it pools is not used
    prefix = model.base_model_prefix + "."
    saved = _saved_shapes(folder)
    return [
        name
        for name, p in model.named_parameters()
        if (_POOLER in name or not name.startswith(prefix))
        and list(p.shape) != saved.get(name, saved.get(name.removeprefix(prefix)))
    ]


def _saved_shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a folder's safetensors files, from their headers; a file is not read further."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return found
