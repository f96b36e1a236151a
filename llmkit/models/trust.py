"""What a model of others may bring along: weights as safetensors, and no code unless the recipe says so."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from llmkit.errors import UsageError
from llmkit.hub import local_only

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_trust(name: str, *, trusted: bool) -> None:
    """Refuse, before anything is loaded, a model that brings code or weights that could run code.

    Args:
        name: A folder, or a name on the Hub.
        trusted: The recipe says `trust_remote_code: true`.

    Raises:
        UsageError: Names what it brings, and what would work.
        OSError: There is no such model.
    """
    local = local_only(name)
    fields, _ = PretrainedConfig.get_config_dict(name, local_files_only=local)
    check_code(name, fields, trusted=trusted)
    if Path(name).exists():
        _check_files(Path(name))
    _check_index(name, local=local)


def check_code(name: str, fields: Mapping[str, Any], *, trusted: bool) -> None:
    """Refuse a configuration that names code to run.

    transformers knows some such models by itself and would then leave the code out without a word: that may not be
    the model that was meant.

    Raises:
        UsageError: It names code, and the recipe does not say that it is trusted.
    """
    if trusted:
        return
    if fields.get("auto_map"):
        classes = fields["auto_map"]
        listed = ", ".join(sorted(map(str, classes.values() if isinstance(classes, Mapping) else classes)))
        raise UsageError(
            f"{name}: config.json names Python code that comes with the model (`auto_map`: {listed})",
            hint="read that code, then set `pretrain.model.trust_remote_code: true`; or, where transformers knows the "
            "model type itself, take `auto_map` out of config.json",
        )
    for key, value in _settings(fields):
        # Such a kernel is compiled code, which transformers would fetch and run.
        if key.endswith("_implementation") and "/" in str(value):
            raise UsageError(
                f"{name}: config.json names a kernel to fetch from the Hub and run (`{key}`: {value})",
                hint=f"take `{key}` out of config.json: the recipe's machine.attention says what is used",
            )


def _settings(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a configuration and of those inside it."""
    for key, value in fields.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _settings(value)


def _check_files(folder: Path) -> None:
    if any(folder.glob("*.safetensors")) or (folder / _INDEX).is_file():
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UsageError(
            f"{folder}: the weights are in {pickles[0]}, a pickle, which can run code when it is read; "
            "llmkit reads safetensors only",
            hint=f"where you trust its author, convert it: {conversion(folder)}",
        )


def conversion(folder: Path) -> str:
    """The command that makes a folder of safetensors from one of pickles."""
    code = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r}, "
        f"trust_remote_code=False).save_pretrained({f'{folder}-safetensors'!r})"
    )
    return shlex.join(["python", "-c", code])


def _check_index(name: str, *, local: bool) -> None:
    """An index lists the files that hold the tensors: each a safetensors file beside it."""
    found = cached_file(
        name,
        _INDEX,
        local_files_only=local,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if found is None:
        return
    try:
        files = {str(file) for file in json.loads(Path(found).read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{name}: {_INDEX} is no index of tensors ({error})") from error
    for file in sorted(files):
        if PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise UsageError(
                f"{name}: {_INDEX} sends to {file!r}, which is no safetensors file of this model",
                hint="download the model again, from its author",
            )
