"""Word vectors from files (word2vec's text and binary forms, GloVe, fastText's .vec), for the tokens that are words.

Files are read line by line and only the vectors of a tokenizer's own words are kept; one of millions of words takes no
more memory than the embeddings that it fills.

- Text: a word and its numbers a line, between blanks; word2vec and fastText begin with a line of two counts.
- Binary (`.bin`): the two counts as text, then for each word its UTF-8, a blank, and float32 numbers.

Shape suffixes: V vocabulary, M tokens that found a vector, D width of the vectors.

**Source**: the forms of Mikolov et al., "Efficient Estimation of Word Representations in Vector Space", 2013
(word2vec), Pennington et al., "GloVe", 2014, and Bojanowski et al., "Enriching Word Vectors with Subword Information",
2017 (fastText), as their programs write them.
"""

import gzip
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from llmkit.data.tokenizers.patterns import byte_values
from llmkit.errors import DataError, MissingError

Floats = npt.NDArray[np.float32]

_FASTTEXT_MODEL = (793712314).to_bytes(4, "little")
_GZIP = b"\x1f\x8b"
_LONGEST_WORD = 4096
_WORD_BEGINS = ("▁", "Ġ", " ")
"""What stands for the blank before a word in the pieces of SentencePiece and of byte-level models."""


@dataclass(frozen=True)
class Vectors:
    """The vectors that a tokenizer's words found in a file.

    Attributes:
        ids_M: Tokens, ascending.
        values_MD: Their vectors.
        num_lower: How many of the tokens found theirs only without capitals.
        num_tokens: Entries of the tokenizer.
        num_words: Words in the file.
    """

    ids_M: npt.NDArray[np.int64]
    values_MD: Floats
    num_lower: int
    num_tokens: int
    num_words: int

    def describe(self, counts_V: npt.NDArray[np.integer] | None = None) -> str:
        """How much of the vocabulary, and of the text where it was counted, begins with a vector.

        Args:
            counts_V: How often each token stands in the training text.
        """
        share = len(self.ids_M) / self.num_tokens
        text = (
            f"{len(self.ids_M):,} of {self.num_tokens:,} tokens ({share:.1%}) are words of the vectors' file"
        )
        if counts_V is not None and counts_V.sum():
            text += f", {counts_V[self.ids_M].sum() / counts_V.sum():.1%} of the training text"
        return f"{text}; {self.num_lower:,} of them only in small letters" if self.num_lower else text


def read_vectors(path: Path, tokenizer: Any) -> Vectors:
    """The vectors of the tokens that are words of the file.

    A token is a word by itself or with a mark of the blank before it; both forms get the word's vector. A piece that
    goes on a word (`##ing`) is none. A token whose word the file does not have gets the vector of the word in small
    letters. Of a word that comes twice the first vector counts.

    Args:
        path: The file.
        tokenizer: One with a `backend_tokenizer`.

    Raises:
        MissingError: There is no such file.
        DataError: It is no file of word vectors, a line is damaged (the message names it by its number), or no token
            is a word of it.
    """
    exact, lower = _words(tokenizer)
    found: dict[int, Floats] = {}
    found_lower: dict[int, Floats] = {}
    num_words = 0
    for word, values in _entries(path, exact.keys() | lower.keys()):
        num_words += 1
        if values is None:
            continue
        for number in exact.get(word, ()):
            found.setdefault(number, values)
        for number in lower.get(word, ()):
            found_lower.setdefault(number, values)
    added = {number: values for number, values in found_lower.items() if number not in found}
    found |= added
    ids = sorted(found)
    if not ids:
        raise DataError(
            f"{path}: none of its {num_words:,} words is a token",
            hint="vectors of the text's language, and a tokenizer whose entries are words",
        )
    values_MD = np.stack([found[number] for number in ids])
    return Vectors(np.array(ids, dtype=np.int64), values_MD, len(added), len(tokenizer), num_words)


def width_of(path: Path) -> int:
    """The numbers that each vector of a file has; only its beginning is read.

    Raises:
        MissingError: There is no such file.
        DataError: It is no file of word vectors.
    """
    with _opened(path) as file:
        width, _ = _head(path, file)
    return width


def hash_of(path: Path) -> str:
    """SHA-256 of the file, which says whether it is still the one that a run began with.

    Raises:
        MissingError: There is no such file.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _missing(path, error) from error


def _words(tokenizer: Any) -> tuple[Mapping[str, list[int]], Mapping[str, list[int]]]:
    """Word -> the tokens that spell it; and in small letters, those that have capitals."""
    backend, special = tokenizer.backend_tokenizer, set(tokenizer.all_special_ids)
    within = getattr(backend.model, "continuing_subword_prefix", None)
    exact: dict[str, list[int]] = {}
    lower: dict[str, list[int]] = {}
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if number in special or (within and token.startswith(within)):
            continue
        word = _word(token)
        if word and not any(letter.isspace() for letter in word):
            exact.setdefault(word, []).append(number)
            if word.lower() != word:
                lower.setdefault(word.lower(), []).append(number)
    return exact, lower


def _word(token: str) -> str:
    """What a token spells, without the mark of a blank before it; empty where that is no whole text."""
    values = byte_values()
    text = token
    if all(
        letter in values for letter in token
    ):  # a byte-level model's spelling, or plain text that looks like it
        try:
            text = bytes(values[letter] for letter in token).decode()
        except UnicodeDecodeError:
            text = token
    return text[1:] if text.startswith(_WORD_BEGINS) else text


# --- the file ---


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == _GZIP
            plain.seek(0)
            if packed:
                with gzip.open(plain) as unpacked:
                    yield cast("IO[bytes]", unpacked)
            else:
                yield plain
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file ends early or is damaged ({error})") from error
    except OSError as error:
        raise _missing(path, error) from error


def _missing(path: Path, error: OSError) -> MissingError:
    return MissingError(
        f"model.embeddings: {path} cannot be read ({error.strerror or error})",
        hint="give the path of a .vec, .txt or .bin file, from the folder where the command runs",
    )


def _head(path: Path, file: IO[bytes]) -> tuple[int, int | None]:
    """The width, and how many words a line of counts promises; the file then stands behind that line, if it has one."""
    first = file.readline(1 << 20)
    if first.startswith(_FASTTEXT_MODEL):
        raise DataError(
            f"{path} is a fastText model, not its vectors", hint="give the .vec file that comes with it"
        )
    parts = first.split()
    if len(parts) == 2 and all(part.isdigit() for part in parts) and int(parts[1]) > 0:
        return int(parts[1]), int(parts[0])
    if _is_binary(path):
        raise DataError(f"{path} does not begin with a line of two counts, as word2vec's binary form does")
    file.seek(0)
    width = _trailing_numbers(parts)
    if width < 1:
        raise DataError(
            f"{path}: line 1 is no word with its numbers, nor word2vec's two counts: {first[:60]!r}",
            hint="word vectors are text (.vec, .txt) or word2vec's binary form (.bin), also .gz",
        )
    return width, None


def _is_binary(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".bin")


def _trailing_numbers(parts: list[bytes]) -> int:
    """How many of a line's words at its end are numbers; the first is the word itself, whatever it is."""
    count = 0
    for part in reversed(parts[1:]):
        try:
            float(part)
        except ValueError:
            break
        count += 1
    return count


def _entries(path: Path, wanted: set[str]) -> Iterator[tuple[str, Floats | None]]:
    """Each word of the file in order, and its vector where it is wanted."""
    with _opened(path) as file:
        width, promised = _head(path, file)
        read = _binary_entries if _is_binary(path) else _text_entries
        count = 0
        for entry in read(path, file, width, promised, wanted):
            count += 1
            yield entry
    if promised is not None and count != promised:
        raise DataError(f"{path} ends after {count:,} words, and its first line promises {promised:,}")


def _text_entries(
    path: Path, file: IO[bytes], width: int, promised: int | None, wanted: set[str]
) -> Iterator[tuple[str, Floats | None]]:
    for number, line in enumerate(file, 1 if promised is None else 2):
        # A word may hold blanks (GloVe has such), its numbers none: so they are taken from the end.
        parts = line.rstrip().rsplit(b" ", width)
        if len(parts) != width + 1 or not parts[0]:
            start, count = line[:40].decode(errors="replace").rstrip(), max(0, len(line.split()) - 1)
            expected = f"the {width} that {'its first line promises' if promised else 'its first word has'}"
            raise _damaged(path, number, f"{count} numbers, not {expected}: {start!r}")
        word = _decoded(path, number, parts[0])
        yield word, _numbers(path, number, parts[1:]) if word in wanted else None


def _decoded(path: Path, number: int, raw: bytes, unit: str = "line") -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, number, f"a word that is not UTF-8: {raw[:60]!r}", unit) from error


def _numbers(path: Path, number: int, parts: list[bytes]) -> Floats:
    try:
        values = np.array([float(part) for part in parts], dtype=np.float32)
    except ValueError as error:
        raise _damaged(path, number, str(error)) from error
    if not np.isfinite(values).all():
        raise _damaged(path, number, "a number that is not finite")
    return values


def _binary_entries(
    path: Path, file: IO[bytes], width: int, promised: int | None, wanted: set[str]
) -> Iterator[tuple[str, Floats | None]]:
    assert promised is not None
    for number in range(1, promised + 1):
        word = _decoded(path, number, _binary_word(path, file, number), "word")
        raw = file.read(4 * width)
        if len(raw) != 4 * width:
            raise DataError(f"{path} ends within the vector of word {number:,} of {promised:,}")
        if word not in wanted:
            yield word, None
            continue
        values = np.frombuffer(raw, dtype="<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise _damaged(path, number, "a number that is not finite", "word")
        yield word, values


def _binary_word(path: Path, file: IO[bytes], number: int) -> bytes:
    """The bytes before the next blank; a line break before them belongs to the vector before."""
    letters = bytearray()
    while (letter := file.read(1)) != b" ":
        if not letter or len(letters) > _LONGEST_WORD:
            raise DataError(f"{path} ends or is damaged where word {number:,} should be")
        letters += letter
    return bytes(letters.lstrip(b"\n"))


def _damaged(path: Path, number: int, what: str, unit: str = "line") -> DataError:
    return DataError(
        f"pretrain.model.embeddings: {path}: {unit} {number:,} is damaged: {what}",
        hint="give the file as word2vec, GloVe or fastText write it",
    )
