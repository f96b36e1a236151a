"""Load any tokenizer by name or folder, save it, and say what identifies it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from llmkit.errors import DataError, MissingError
from llmkit.hub import local_only

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
_PLAIN_KEYS = {
    *ROLES,
    "backend",
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
    "model_max_length",
    "tokenizer_class",
    "is_local",
    "local_files_only",
}
# Any of these can change what transformers makes of tokenizer.json.
_CHANGING_FILES = ("config.json", "special_tokens_map.json", "added_tokens.json")
_TRANSFORMERS_LOOKS_CLOSER = 100_000  # entries, beyond which it may replace a pattern


class LightTokenizer:
    """What encoding needs of a tokenizer, without importing transformers (which takes seconds).

    Attributes:
        backend_tokenizer: The `tokenizers.Tokenizer`.
        name_or_path: The folder.
        special_tokens_map: Each special token by its part, such as `eos_token`; as transformers says it.
    """

    def __init__(self, backend: Tokenizer, name_or_path: str, roles: dict[str, str]) -> None:
        self.backend_tokenizer = backend
        self.name_or_path = name_or_path
        self.special_tokens_map = roles

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """All entries with their ids."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the ids."""
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a document."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a document."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills up a batch."""
        return self._id("pad_token")

    @property
    def cls_token_id(self) -> int | None:
        """The id that begins a framed text."""
        return self._id("cls_token")

    @property
    def sep_token_id(self) -> int | None:
        """The id that ends a framed text."""
        return self._id("sep_token")

    @property
    def mask_token_id(self) -> int | None:
        """The id that stands for a gap."""
        return self._id("mask_token")

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all special tokens, ascending."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return sorted(number for number, token in added.items() if token.special)

    def _id(self, role: str) -> int | None:
        token = self.special_tokens_map.get(role)
        return None if token is None else self.backend_tokenizer.token_to_id(token)


def open_tokenizer(name_or_folder: str) -> Any:
    """A tokenizer for encoding: a `LightTokenizer` where that is surely the same, else `load_tokenizer`'s.

    Raises:
        MissingError: As `load_tokenizer`.
        DataError: As `load_tokenizer`.
    """
    return _light(Path(name_or_folder).expanduser()) or load_tokenizer(name_or_folder)


def _light(folder: Path) -> LightTokenizer | None:
    """The folder's tokenizer, if it is one that transformers takes as it stands."""
    if any((folder / name).exists() for name in _CHANGING_FILES):
        return None
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        rules = (folder / "tokenizer.json").read_text(encoding="utf-8")
        content = json.loads(rules)
    except (OSError, ValueError):
        return None  # load_tokenizer says what is wrong
    if not _is_plain(config) or any(content.get(key) for key in ("truncation", "padding")):
        return None
    backend = _backend(rules)
    if backend is None or backend.post_processor is None:
        return None
    tokenizer = LightTokenizer(backend, str(folder), {role: config[role] for role in ROLES if role in config})
    specials = {backend.token_to_id(t) for t in _named(config)}
    is_known = specials <= set(tokenizer.all_special_ids)
    return tokenizer if is_known and len(tokenizer) <= _TRANSFORMERS_LOOKS_CLOSER else None


def _is_plain(config: Any) -> bool:
    if not isinstance(config, dict) or not _PLAIN_KEYS.issuperset(config):
        return False
    extra = config.get("extra_special_tokens", [])
    named = [config[role] for role in ROLES if role in config]
    strings = isinstance(extra, list) and all(isinstance(token, str) for token in [*extra, *named])
    return strings and config.get("tokenizer_class") in _PLAIN_CLASSES


def _named(config: dict[str, Any]) -> list[str]:
    return [*(config[role] for role in ROLES if role in config), *config.get("extra_special_tokens", [])]


def _backend(rules: str) -> Tokenizer | None:
    try:
        return Tokenizer.from_str(rules)
    except Exception as error:  # the library raises this class itself
        if type(error) is not Exception:
            raise
        return None


def load_tokenizer(name_or_folder: str) -> Any:
    """A tokenizer by folder or Hub name, through AutoTokenizer; never runs code that comes with it.

    Raises:
        MissingError: The folder does not exist, or the Hub cannot be reached and holds no copy here.
        DataError: What is there is no tokenizer we can load.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    folder = Path(name_or_folder).expanduser()
    is_folder = folder.is_dir()
    if not is_folder and (folder.is_absolute() or name_or_folder.startswith((".", "~")) or folder.exists()):
        raise MissingError(
            f"tokenizer {name_or_folder!r}: no such folder",
            hint="make it with `llmkit tokenize RECIPE`, or name another folder or a tokenizer on the Hub",
        )
    where = str(folder) if is_folder else name_or_folder
    local = local_only(where)
    try:
        _refuse_code(name_or_folder, get_tokenizer_config(where, local_files_only=local))
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=local)
    except ImportError as error:
        raise MissingError(f"tokenizer {name_or_folder!r} needs a package: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_loaded(name_or_folder, is_folder, error) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # some files hold a caller's wishes, such as filling each text up to 128 tokens
        backend.no_padding()
        backend.no_truncation()
    return tokenizer


def _refuse_code(name: str, config: dict[str, Any]) -> None:
    """Transformers would leave the code out without a word where it has another class for the tokenizer."""
    if config.get("auto_map"):
        raise DataError(
            f"tokenizer {name!r}: tokenizer_config.json names Python code to run (`auto_map`), "
            "and llmkit runs no code that comes with a tokenizer",
            hint="where tokenizer.json says it all, take `auto_map` out of tokenizer_config.json",
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files into an existing folder, such as one that `durable.write_folder` gave."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes())
    # transformers 5 renamed the class and still reads the old name, which other programs know.
    if config.get("tokenizer_class") == "TokenizersBackend":
        path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def frame_texts(tokenizer: Any) -> None:
    """Make a tokenizer that puts nothing around a text put `[CLS]` and `[SEP]` there, as models like BERT know it.

    That is for others who use the exported model; llmkit puts them there itself.

    Args:
        tokenizer: From `load_tokenizer`, with a `cls_token` and a `sep_token`.
    """
    backend = tokenizer.backend_tokenizer
    if backend.num_special_tokens_to_add(False) or not tokenizer.cls_token or not tokenizer.sep_token:
        return
    first, last = tokenizer.cls_token, tokenizer.sep_token
    frame = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, tokenizer.cls_token_id), (last, tokenizer.sep_token_id)],
    )
    _put_around(backend, frame)


def end_texts(tokenizer: Any) -> None:
    """Make a tokenizer that puts nothing around a text end it with its end of text, as encoder-decoders read it.

    That is for others who use the exported model; llmkit puts it there itself.

    Args:
        tokenizer: From `load_tokenizer`, with an `eos_token`.
    """
    backend = tokenizer.backend_tokenizer
    if backend.num_special_tokens_to_add(False):
        return
    end = tokenizer.eos_token
    _put_around(
        backend,
        processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        ),
    )


def _put_around(backend: Tokenizer, frame: processors.TemplateProcessing) -> None:
    kept = backend.post_processor
    backend.post_processor = frame if kept is None else processors.Sequence([kept, frame])


def eos_id(tokenizer: Any) -> int:
    """The id that ends a document; BERT's vocabularies have no end of text, and `[SEP]` stands there.

    Raises:
        DataError: The tokenizer has neither.
    """
    end = tokenizer.eos_token_id
    if end is None and tokenizer.mask_token_id is not None:  # one that fills gaps, and writes no text
        end = tokenizer.sep_token_id
    if end is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token, "
            "so a model could never learn to stop",
            hint='add `"eos_token": "..."` (a token of its vocabulary) to its tokenizer_config.json',
        )
    return int(end)


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The ids that a model's configuration may need: `bos_token_id` and so on, those there are."""
    names = [f"{part}_token_id" for part in ("bos", "eos", "pad", "cls", "sep", "mask")]
    found = {name: getattr(tokenizer, name, None) for name in names}
    return {name: number for name, number in found.items() if number is not None}


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides the tokenizer's ids: vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()} | _settings(
            tokenizer
        )
    else:
        # Truncation and padding are a caller's passing wishes, not part of the tokenizer; what is put around a text,
        # llmkit never asks it for.
        passing = dict.fromkeys(("truncation", "padding", "post_processor"))
        rules = {**json.loads(backend.to_str()), **passing}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    content = json.dumps([rules, special], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _settings(tokenizer: Any) -> dict[str, Any]:
    """What decides the ids of a tokenizer that is written in Python: its arguments and the bytes of its files."""
    folder = Path(str(tokenizer.name_or_path))
    files = [folder / name for name in sorted(tokenizer.vocab_files_names.values())]
    arguments = {
        key: value
        for key, value in tokenizer.init_kwargs.items()
        if isinstance(value, str | int | float | bool) and "/" not in str(value)
    }
    return {
        "arguments": arguments,
        "files": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
        },
    }


def _not_loaded(name: str, is_folder: bool, error: Exception) -> DataError | MissingError:
    if is_folder:
        return DataError(
            f"{name}: no tokenizer that can be loaded is in this folder ({_first_line(error)})",
            hint="it should hold tokenizer.json and tokenizer_config.json",
        )
    if isinstance(error, OSError):
        return MissingError(
            f"tokenizer {name!r} is neither a folder here nor to be had from the Hub ({_first_line(error)})",
            hint=f"where there is network: hf download {name}",
        )
    return DataError(f"tokenizer {name!r} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
