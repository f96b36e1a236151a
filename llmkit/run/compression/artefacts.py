"""The artefacts of a chain: where they lie, what they came from, and whether they are done."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import (
    foreign_write,
    hash_file,
    make_folders,
    read_manifest,
    remove_folder,
    verify_folder,
    write_file,
    write_folder,
    write_json,
)
from llmkit.errors import CorruptError
from llmkit.recipe.compression import Step
from llmkit.run.folders import STEP

if TYPE_CHECKING:
    from llmkit.compress.given import Made

_BESIDE = ("resolved.yaml", "recipe.yaml", "plan.json", "data.json")
"""Files beside a run's model that say what it learned; an artefact's model has them beside it, too."""
_OWN = ("config.json", "manifest.json", "README.md", "report.html")
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".index.json",
    ".onnx",
    ".data",
    ".gguf",
    ".pt2",
    ".pt",
    ".h5",
    ".msgpack",
)
_SAID = ("manifest.json", "README.md", "report.html")
"""Files that say what a model is and do not change it: `llmkit eval` writes into a card."""
_VERSION = 2
"""Counts changes of methods by which the same settings make another model."""


@dataclass(frozen=True)
class Artefact:
    """A model of a chain.

    Attributes:
        word: What it is called: `1-quantize`; the first model as a person named it.
        place: The model's folder.
        address: What it is: equal for the same model made in the same way.
        step: How it was made; None: the chain begins with it.
        facts: What the method says of it.
        warnings: What a person should know.
        standard: Whether plain transformers loads it.
    """

    word: str
    place: Path
    address: str
    step: Step | None = None
    facts: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()
    standard: bool = True


def begin(word: str, place: Path) -> Artefact:
    """The model that a chain begins with.

    Its address follows from what is in its folder, the card left out. Where a manifest vouches for the weights they are
    compared with it; elsewhere their sizes and dates stand for them.

    Raises:
        CorruptError: Its weights are not those that its manifest names.
    """
    known: Mapping[str, Any] = {}
    if (place / "manifest.json").is_file():
        files = read_manifest(place)["files"]
        known = {name: entry["sha256"] for name, entry in files.items() if name.endswith(_WEIGHTS)}
        verify_folder(place, only=list(known))
    found: list[object] = [] if known else [str(place.absolute())]
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if name in _SAID or not path.is_file():
            continue
        if name.endswith(_WEIGHTS) and name not in known:
            found.append([name, path.stat().st_size, path.stat().st_mtime_ns])
        else:
            found.append([name, known.get(name) or hash_file(path)])
    return Artefact(word, place, _hash(found))


def next_address(parent: Artefact, step: Step, material: Mapping[str, Any]) -> str:
    """What a step will make of a model.

    Args:
        parent: The model.
        step: The step.
        material: What else it follows from: seed, what it looks at.
    """
    asked = {name: value for name, value in step.model_dump(mode="json").items() if value is not None}
    return _hash([_VERSION, parent.address, asked, material])


def label_of(steps: Sequence[Step]) -> str:
    """A chain's name: `prune-weights-50-wanda-int4`; with a hash where settings are unusual."""
    words, plain = zip(*map(_words, steps), strict=True)
    name = "-".join(words)
    if all(plain) and len(name) <= 40:
        return name
    dumped = [step.model_dump(mode="json") for step in steps]
    return f"{name[:40].rstrip('-')}-{_hash(dumped)[:6]}"


def _words(step: Step) -> tuple[str, bool]:
    """A step's part of the name, and whether that says all of it."""
    said: dict[str, Any] = {"method": step.method}
    word: str = step.method
    if step.method == "quantize":
        said |= {"format": step.format, "bits": step.bits if step.format != "mixed" else None}
        word = str(step.format)
    elif step.method in ("prune", "factorize"):
        said |= {"what": step.what, "share": step.share}
        word += f"-{step.what}" if step.what not in (None, "weights") else ""
        word += f"-{100 * (step.share or 0):g}".replace(".", "_")
    elif step.method == "export":
        said |= {"to": step.to}
        word = str(step.to)
    if step.solver not in (None, "auto"):
        said["solver"] = step.solver
        word += f"-{step.solver}"
    if step.by not in (None, "auto"):
        said["by"] = step.by
        word += f"-{step.by}"
    return word, Step.model_validate({k: v for k, v in said.items() if v is not None}) == step


def finished(folder: Path, address: str) -> Artefact | None:
    """The artefact in a folder, if it is the one of this address and whole."""
    try:
        known = json.loads((folder / STEP).read_bytes())
        if not isinstance(known, dict) or known.get("address") != address:
            return None
        verify_folder(folder / "model")
        step = Step.model_validate(known["step"])
        said = known["facts"], tuple(known["warnings"]), bool(known["standard"])
    except (OSError, ValueError, KeyError, CorruptError):
        return None
    return Artefact(folder.name, folder / "model", address, step, *said)


def leave(folder: Path, parent: Artefact, address: str, step: Step, made: "Made") -> Artefact:
    """Write what a step made, whole or not at all.

    Args:
        folder: The artefact's folder; an older one goes.
        parent: What it was made from.
        address: What it is.
        step: How it was made.
        made: What the method gave.
    """
    if folder.exists():
        remove_folder(folder)
    make_folders(folder)
    facts = {"parent": parent.address, "address": address}
    with write_folder(folder / "model", facts=facts) as temporary:
        copy_companions(parent.place, temporary)
        with foreign_write(temporary):
            if made.write is not None:
                made.write(temporary)
            else:
                save_like(made.model, parent.place, temporary)
    return _seal(folder, parent, address, step, made)


def _seal(folder: Path, parent: Artefact, address: str, step: Step, made: "Made") -> Artefact:
    """Say beside an artefact's model what it is; from then on it is done."""
    for name in _BESIDE:
        source = parent.place.parent / name
        if source.is_file():
            write_file(folder / name, source.read_bytes())
    known = {
        "address": address,
        "parent": {"folder": str(parent.place), "address": parent.address},
        "step": {k: v for k, v in step.model_dump(mode="json").items() if v is not None},
        "facts": dict(made.facts),
        "warnings": list(made.warnings),
        "standard": made.standard,
    }
    write_json(folder / STEP, known)
    return Artefact(
        folder.name, folder / "model", address, step, made.facts, tuple(made.warnings), made.standard
    )


def save_like(model: Any, parent: Path, folder: Path) -> None:
    """Save a model with weights of the type in which its parent's lie; the model is of that type afterwards."""
    model.to(stored_type(parent)).save_pretrained(folder)


def stored_type(place: Path) -> Any:
    """The type of most of a model's weights, as they lie on disk; float32 where that cannot be told."""
    import torch
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for path in place.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                count = 1
                for size in part.get_shape():
                    count *= size
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + count
    most = max(sizes, key=lambda kind: sizes[kind], default="F32")
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what travels with a model: tokenizer, chat template, generation settings, licence; no weights, no card."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_dir() or relative.name in _OWN or relative.name.endswith(_WEIGHTS):
            continue
        copy = target / relative
        with foreign_write(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
