"""A pretrained model for a task: its body as it was, and a head that fits, which is new where it has none yet."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from llmkit.errors import MissingError, UsageError
from llmkit.hub import local_only
from llmkit.models.build import AUTO_CLASSES, align, max_length, set_dropout
from llmkit.models.trust import check_trust
from llmkit.models.unpacked import check_package, is_packed, unpack, without_bars
from llmkit.recipe.architectures import in_words
from llmkit.registry import ModelKind

_POOLER = "pooler."
_ENCODER: tuple[ModelKind, ...] = ("sequence", "tokens", "answers", "encoder")
TASK_FAMILIES: Mapping[str, tuple[ModelKind, ...]] = {
    **dict.fromkeys(("bert", "roberta", "modernbert", "electra"), _ENCODER),
    **dict.fromkeys(("llama", "qwen3", "gpt2"), (*_ENCODER, "causal")),
    "t5": ("seq2seq", *_ENCODER),
    "bart": ("seq2seq", "sequence", "answers", "encoder"),
}
"""Some architectures, and the kinds of model that they make for tasks."""


def build_task_model(
    folder: str,
    kind: ModelKind,
    *,
    labels: Sequence[str] = (),
    number: bool = False,
    pad_token_id: int | None = None,
    dropout: float | None = None,
    trusted: bool = False,
    seed: int = 0,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a model for a task, on CPU in float32, in training mode.

    Args:
        folder: A model folder, or a name on the Hub.
        kind: What the task needs.
        labels: Names of classes or tags; how many they are is the width of the head.
        number: It says one number instead (regression).
        pad_token_id: What batches are filled up with, for a configuration that does not say.
        dropout: The probability of all dropout; None: as the model has it.
        trusted: Code that comes with it may run.
        seed: Decides the weights of a new head.

    Returns:
        The model, and the names of its weights that are new.

    Raises:
        MissingError: There is no such model, or the package that knows its weights in few bits is not installed.
        UsageError: It cannot be a model of this kind, or its weights are not those of its configuration.
    """
    _check_trust(folder, trusted=trusted)
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    config = _config(folder, labels, pad_token_id, dropout, number=number, trusted=trusted)
    packed = is_packed(config.to_dict())
    if packed:
        check_package()
    torch.manual_seed(seed)
    try:
        with _quiet(), without_bars() if packed else nullcontext():  # what is new is told in our own words
            model, info = AUTO_CLASSES[kind].from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                trust_remote_code=trusted,
                output_loading_info=True,
                use_safetensors=True,
                weights_only=True,
                ignore_mismatched_sizes=True,  # a head for other labels; `_new_weights` looks that it is one
                local_files_only=local_only(folder),
            )
    except OSError as error:
        raise _not_there(folder, error) from error
    except ValueError as error:
        raise _other_kind(folder, config, kind, error) from error
    new = _new_weights(folder, model, info)
    if packed:
        with without_bars():
            unpack(model)
    align(model)
    model.train()  # what is loaded comes in evaluation mode
    return model, new


def empty_task_model(
    folder: str,
    kind: ModelKind,
    *,
    labels: Sequence[str] = (),
    number: bool = False,
    trusted: bool = False,
) -> PreTrainedModel:
    """The model that `build_task_model` would load, without weights, on the meta device: to be counted.

    Raises:
        MissingError: There is no such model.
        UsageError: It cannot be a model of this kind.
    """
    _check_trust(folder, trusted=trusted)
    config = _config(folder, labels, None, None, number=number, trusted=trusted)
    try:
        with torch.device("meta"):
            return AUTO_CLASSES[kind].from_config(config, dtype=torch.float32, trust_remote_code=trusted)
    except ValueError as error:
        raise _other_kind(folder, config, kind, error) from error


def labels_of_model(folder: str, *, trusted: bool = False) -> list[str]:
    """The names of classes or tags that a model's configuration holds, in the order of their numbers.

    Raises:
        MissingError: There is no such model.
    """
    _check_trust(folder, trusted=trusted)
    known: Mapping[int, str] = _config(folder, (), None, None, trusted=trusted).id2label or {}
    return [known[number] for number in sorted(known)]


def in_order_of_model(labels: Sequence[str], folder: str, *, trusted: bool = False) -> tuple[str, ...]:
    """Labels in the order in which a model has them, where it knows just these: its head is then gone on with.

    Args:
        labels: Names of classes or tags.
        folder: A model folder, or a name on the Hub.
        trusted: Code that comes with it may run.

    Raises:
        MissingError: There is no such model.
    """
    _check_trust(folder, trusted=trusted)
    known: Mapping[int, str] = _config(folder, (), None, None, trusted=trusted).id2label or {}
    ordered = tuple(known[number] for number in sorted(known))
    return ordered if sorted(ordered) == sorted(labels) else tuple(labels)


def longest_input(folder: str, *, trusted: bool = False) -> int | None:
    """Tokens that a model reads at most; None where its configuration does not say.

    Raises:
        MissingError: There is no such model.
    """
    _check_trust(folder, trusted=trusted)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trusted, local_files_only=local_only(folder)
        )
    except (OSError, ValueError) as error:
        raise _not_there(folder, error) from error
    return max_length(config)


def _check_trust(folder: str, *, trusted: bool) -> None:
    try:
        check_trust(folder, trusted=trusted)
    except OSError as error:
        raise _not_there(folder, error) from error


def _config(
    folder: str,
    labels: Sequence[str],
    pad_token_id: int | None,
    dropout: float | None,
    *,
    number: bool = False,
    trusted: bool,
) -> PretrainedConfig:
    more: dict[str, Any] = {}
    if number:
        more = {"num_labels": 1, "problem_type": "regression"}
    elif labels:
        names = dict(enumerate(labels))
        more = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trusted, local_files_only=local_only(folder), **more
        )
    except (OSError, ValueError) as error:
        raise _not_there(folder, error) from error
    if getattr(config, "pad_token_id", None) is None and pad_token_id is not None:
        config.pad_token_id = pad_token_id
    if dropout is not None:
        set_dropout(config, dropout)
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _new_weights(folder: str, model: PreTrainedModel, info: Any) -> tuple[str, ...]:
    """The weights that were not in the files: those of a head, or the model is not what its files are of.

    Raises:
        UsageError: Weights of the body are missing, of another shape or left over.
    """
    body = model.base_model_prefix + "."
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ())]
    missing = sorted({*map(str, info.get("missing_keys", ())), *mismatched})
    is_bare = model.base_model is model  # then all of it is body

    def is_head(key: str) -> bool:
        return _POOLER in key or not (is_bare or key.startswith(body))

    wrong = [key for key in missing if not is_head(key)]
    left = [
        key for key in map(str, info.get("unexpected_keys", ())) if key.startswith(body) and not is_head(key)
    ]
    if wrong or left:
        what = "missing" if wrong else "left over"
        raise UsageError(
            f"{folder}: weights of the body are {what}: {', '.join((wrong or left)[:5])}",
            hint="the weights do not belong to this configuration",
        )
    return tuple(missing)


def _other_kind(folder: str, config: PretrainedConfig, kind: ModelKind, error: Exception) -> UsageError:
    fits = [name for name, kinds in TASK_FAMILIES.items() if kind in kinds]
    return UsageError(
        f"{folder}: {config.model_type} cannot be {in_words(kind)} ({' '.join(str(error).split())[:120]}...)",
        hint=f"choose a model of another architecture: {', '.join(fits)}",
    )


def _not_there(folder: str, error: Exception) -> MissingError:
    return MissingError(
        f"model.name: {folder!r} cannot be loaded ({str(error).splitlines()[0]})",
        hint="give a run, a folder with config.json and weights, or a Hub id while online",
    )
