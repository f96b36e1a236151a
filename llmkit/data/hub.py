"""Data sets by name, streamed with `datasets`; we check each row, for `datasets` lets anything pass."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.data.files import hash_of, resolve
from llmkit.data.places import Fault, Faults, FileFault
from llmkit.data.remote import without_secrets
from llmkit.data.tables import checked_text, pick
from llmkit.errors import DataError, MissingError
from llmkit.hub import network_errors


@dataclass(frozen=True)
class Shard:
    """One of the pieces that a data set comes in.

    Attributes:
        dataset: The recipe's `dataset`.
        base: The recipe's folder.
        commit: The commit on the Hub; empty for a folder.
        index: Which piece.
        count: Of how many.
    """

    dataset: str
    base: Path
    commit: str
    index: int
    count: int


def dataset_shards(dataset: str, split: str, base: Path) -> tuple[str, int]:
    """The data set's commit on the Hub (empty for a folder), and how many pieces of its own it comes in.

    Raises:
        MissingError: The data set cannot be reached.
        DataError: There is no such split or configuration.
    """
    name = _name_and_config(dataset)[0]
    commit = "" if _folder(name, base) is not None else _commit(name)
    return commit, max(int(_open(dataset, split, base, commit).num_shards), 1)


def dataset_rows(shard: Shard, split: str, column: str, faults: Faults) -> Iterator[tuple[int, str]]:
    """The number of each row, from 0 in its shard, and its text.

    Raises:
        MissingError: The data set cannot be reached.
        DataError: There is no such split, configuration or column, or a row holds no text.
    """
    import datasets

    try:
        rows = _open(shard.dataset, split, shard.base, shard.commit)
        if shard.count > 1:
            rows = rows.shard(num_shards=shard.count, index=shard.index)
        for number, row in enumerate(rows):
            try:
                text = checked_text(pick(row, column), column)
            except Fault as fault:
                faults.row(number, fault)
            else:
                yield number, text
    except network_errors() as error:
        raise _out_of_reach(shard.dataset, error) from error
    except DataError:
        raise
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise FileFault(
            f"data set {shard.dataset!r} cannot be read: {_first_line(error)}",
            reason="data set cannot be read",
        ) from error


def dataset_fingerprint(dataset: str, split: str, base: Path) -> list[str]:
    """What decides the data set's content: its commit on the Hub, or the bytes of its files here.

    Raises:
        MissingError: The Hub cannot be asked.
    """
    name, config = _name_and_config(dataset)
    folder = _folder(name, base)
    if folder is not None:
        return ["folder", config, split, *(hash_of(path) for path in resolve([str(folder)], base))]
    return ["hub", name, config, split, _commit(name)]


def _open(dataset: str, split: str, base: Path, commit: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    name, config = _name_and_config(dataset)
    folder = _folder(name, base)
    revision = {"revision": commit} if commit else {}
    try:
        # Scripts of data sets, which `trust_remote_code` was for, are no longer run at all.
        builder = datasets.load_dataset_builder(str(folder or name), config or None, **revision)
        _check_files(dataset, folder, builder.config.data_files or {})
        return builder.as_streaming_dataset(split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _out_of_reach(dataset, error) from error
    except (ValueError, RuntimeError) as error:  # no such split or configuration; a loading script
        raise DataError(f"data set {dataset!r}, split {split!r}: {_first_line(error)}") from error


def _check_files(dataset: str, folder: Path | None, files: Mapping[str, Sequence[str]]) -> None:
    """What a data set says of itself (in its README) may name any file: only its own are read.

    Raises:
        DataError: It names one elsewhere, such as a file of this machine.
    """
    home: tuple[str, ...] = (f"hf://datasets/{_name_and_config(dataset)[0]}@",)
    if folder is not None:
        home = (os.path.abspath(folder) + os.sep, os.path.realpath(folder) + os.sep)
    for name in (str(name) for group in files.values() for name in group):
        place = name if "://" in name else os.path.abspath(name)
        if not place.startswith(home) or ".." in place.split("/"):
            raise DataError(
                f"data set {dataset!r} sends to {without_secrets(name)}, which is not a file of its own",
                hint="if that is the text you want, name it yourself: `files: ...`",
            )


def _commit(name: str) -> str:
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(name, timeout=20).sha
    except ValueError as error:
        raise DataError(f"no data set can be called {name!r}: {_first_line(error)}") from error
    except network_errors() as error:
        raise _out_of_reach(name, error) from error
    return str(commit)


def _name_and_config(dataset: str) -> tuple[str, str]:
    name, _, config = dataset.partition(":")
    return name, config


def _folder(name: str, base: Path) -> Path | None:
    for root in (Path.cwd(), base):
        folder = root / Path(name).expanduser()
        if folder.is_dir():
            return folder
    return None


def _out_of_reach(dataset: str, error: Exception) -> MissingError:
    return MissingError(
        f"data set {dataset!r} is neither a folder here nor to be had from the Hub ({_first_line(error)})",
        hint=f"where there is network: hf download --repo-type dataset {dataset.partition(':')[0]}",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
