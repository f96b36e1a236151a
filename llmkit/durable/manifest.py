"""What a published folder says of itself: every file's size and hash, in a manifest that has a hash of its own."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import CorruptError

MANIFEST = "manifest.json"


def manifest_text(folder: Path, files: Collection[Path], facts: Mapping[str, object]) -> str:
    """The manifest of `files`, which lie in `folder`, with further entries."""
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": hash_file(file)}
        for file in sorted(files)
    }
    return sealed({"files": entries, **facts})


def sealed(body: Mapping[str, object]) -> str:
    """A manifest's text: its entries, and the hash of them."""
    return json.dumps({**body, "sha256": _hash_of(body)}, indent=1, ensure_ascii=False)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the folder `path`.

    Raises:
        CorruptError: It is missing or not readable.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CorruptError(f"{path}: {MANIFEST} is missing, so the folder was never completed") from None
    except (ValueError, OSError) as error:
        raise CorruptError(f"{path / MANIFEST}: not readable ({error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptError(f"{path / MANIFEST}: it does not list files")
    return manifest


def verify_folder(path: Path, *, only: Collection[str] | None = None) -> dict[str, Any]:
    """Compare every file of `path` with the manifest, and the manifest with its own hash; return it.

    Args:
        path: A published folder.
        only: Look at these files alone; by default at all.

    Raises:
        CorruptError: Names the file and the reason: missing, another size, another hash.
    """
    manifest = read_manifest(path)
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _hash_of(body):
        raise CorruptError(f"{path / MANIFEST}: its own hash does not match")
    for name, entry in manifest["files"].items():
        if only is None or name in only:
            _verify_file(path / name, entry)
    return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CorruptError(f"{path}: {size:,} bytes where the manifest says {entry['bytes']:,}")
        if hash_file(path) != entry["sha256"]:
            raise CorruptError(f"{path}: its content does not match the hash in the manifest")
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing") from None
    except (OSError, KeyError, TypeError) as error:
        raise CorruptError(f"{path}: not readable ({error})") from error
