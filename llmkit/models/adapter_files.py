"""Adapters on disk, in PEFT's own form: `adapter_config.json` and `adapter_model.safetensors`."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llmkit.durable import foreign_write, hash_file, write_folder
from llmkit.errors import CorruptError, MissingError, UsageError

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What PEFT writes before the names of parameters: its own wrapper's."""


def import_peft() -> Any:
    """The package peft, which only adapters need.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingError("adapters need the package peft", hint='pip install "llmkit[adapters]"') from error
    return peft


def adapter_tensors(model: PreTrainedModel, name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's tensors as they lie in the model, by the names that PEFT saves them under."""
    found = import_peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {_PREFIX + key: tensor.detach() for key, tensor in found.items()}


def save_adapter(
    folder: Path,
    model: PreTrainedModel,
    *,
    name: str = "default",
    facts: Mapping[str, object],
    companions: Sequence[Callable[[Path], object]] = (),
) -> None:
    """Write an adapter in PEFT's own form, published whole or not at all.

    Args:
        folder: Where; an older one is replaced when the new one is complete.
        model: Holds the adapter.
        name: Which of its adapters.
        facts: Entries of the manifest.
        companions: Each writes its files, such as the tokenizer's, into the folder it is given.
    """
    # Copies: the embedding and a tied output layer are one, and safetensors takes no tensor twice.
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in adapter_tensors(model, name).items()}
    config: Any = model.peft_config[name]
    with write_folder(folder, facts=facts) as temporary:
        with foreign_write(temporary):
            config.save_pretrained(str(temporary))
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        for write in companions:
            write(temporary)


def hash_adapter(folder: Path) -> str:
    """A hash of an adapter's two files, wherever they lie.

    Raises:
        MissingError: There is none.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingError(
                f"{folder}: no adapter here ({name} is missing)", hint="give a folder in PEFT's form"
            )
    return hashlib.sha256(
        "".join(hash_file(folder / name) for name in (CONFIG, WEIGHTS)).encode()
    ).hexdigest()


def read_config(folder: Path) -> "LoraConfig":
    """An adapter's configuration.

    Raises:
        MissingError: There is none.
        UsageError: It is not LoRA's, or begins from a base that it changes itself.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MissingError(
            f"{folder}: no adapter here ({CONFIG} is missing)", hint="give a folder in PEFT's form"
        )
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else None
        raise UsageError(
            f"{path}: an adapter of type {kind!r}", hint="llmkit reads LORA, with or without DoRA and rsLoRA"
        )
    start = fields.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        raise UsageError(
            f"{path}: begins by {start!r}, which changes the base itself, so its matrices mean nothing beside another",
            hint="have PEFT save it with `path_initial_model_for_weight_conversion`, as a plain LoRA",
        )
    config: LoraConfig = import_peft().LoraConfig.from_peft_type(**fields)
    config.init_lora_weights = True  # what it begins with is overwritten
    return config


def fill_adapter(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Give an adapter the tensors of a folder: all of them, each of the right shape."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise MissingError(
            f"{folder}: {WEIGHTS} is missing" + (", and adapter_model.bin is a pickle" if pickled else ""),
            hint="have PEFT save it with `safe_serialization=True`",
        )
    saved, places = load_file(path), adapter_tensors(model, name)
    if saved.keys() != places.keys():
        missing, more = sorted(places.keys() - saved.keys()), sorted(saved.keys() - places.keys())
        raise not_of_this_model(folder, model, f"missing {missing[:3]}, not wanted {more[:3]}")
    for key, place in places.items():
        if saved[key].shape != place.shape:
            raise not_of_this_model(
                folder, model, f"{key} is {list(saved[key].shape)}, wanted {list(place.shape)}"
            )
        place.copy_(saved[key])


def not_of_this_model(folder: Path, model: PreTrainedModel, why: str) -> UsageError:
    """The error of an adapter that was made for another model, to be raised."""
    return UsageError(
        f"{folder}: the adapter does not belong to this {type(model).__name__}, or has other targets: {why}",
        hint="`base_model_name_or_path` in its adapter_config.json says what it was made for",
    )
