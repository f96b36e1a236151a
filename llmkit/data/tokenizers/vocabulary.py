"""A tokenizer as objectives see it: its special tokens, and what each entry spells. Goes to loader processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from llmkit.data.tokenizers.pieces import token_bytes
from llmkit.data.tokenizers.special import STANDS_FOR
from llmkit.errors import UsageError


@dataclass(frozen=True)
class Vocabulary:
    """What an objective needs of a tokenizer.

    Attributes:
        size: Entries; ids are below it.
        roles: Special tokens by their parts, such as `eos_token`.
        special_ids: The ids of all special tokens, ascending.
        backend: The `tokenizers.Tokenizer`, which turns text into ids and back.
        name: The tokenizer's folder or name, for messages.
    """

    size: int
    roles: Mapping[str, str]
    special_ids: tuple[int, ...]
    backend: Any
    name: str

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """The vocabulary of a tokenizer from `load_tokenizer` or `open_tokenizer`.

        Raises:
            UsageError: It is written in Python, so nothing is known of its entries.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(
                f"tokenizer {tokenizer.name_or_path!r} has no tokenizer.json, which training needs to know its entries",
                hint="save it as a fast tokenizer first",
            )
        roles = {
            role: str(token)
            for role, token in tokenizer.special_tokens_map.items()
            if role.endswith("_token")
        }
        return cls(
            size=len(tokenizer),
            roles=roles,
            special_ids=tuple(sorted({*tokenizer.all_special_ids, *_marked_special(backend)})),
            # Its own: others change how theirs treats special tokens, in other threads.
            backend=Tokenizer.from_str(backend.to_str()),
            name=str(tokenizer.name_or_path),
        )

    def has(self, token: str) -> bool:
        """Whether there is such an entry."""
        return self.backend.token_to_id(token) is not None

    def id_of(self, token: str) -> int:
        """The id of an entry.

        Raises:
            UsageError: There is no such entry.
        """
        number = self.backend.token_to_id(token)
        if number is None:
            raise self._lacks(token)
        return int(number)

    def role(self, name: str) -> int:
        """The id of the token that plays a part, such as `mask_token`.

        A tokenizer that names none for `cls_token`, `sep_token` or `mask_token` may have `<|cls|>`, `<|sep|>` or
        `<|mask|>`.

        Raises:
            UsageError: No token plays it.
        """
        if name in self.roles:
            return self.id_of(self.roles[name])
        if name in STANDS_FOR:
            return self.id_of(STANDS_FOR[name])
        raise UsageError(
            f"tokenizer {self.name!r} has no {name.replace('_', ' ')}",
            hint="name one in its tokenizer_config.json",
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens that it spells are text."""
        self.backend.encode_special_tokens = (
            True  # not part of its file, so it is lost on the way to processes
        )
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """What each id spells, in UTF-8; nothing for special tokens."""
        special = set(self.special_ids)
        tokens = (self.backend.id_to_token(number) for number in range(self.size))
        return tuple(
            b"" if number in special or token is None else token_bytes(self.backend, token)
            for number, token in enumerate(tokens)
        )

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """[V]: whether an id is a special token."""
        flags = np.zeros(self.size, dtype=np.bool_)
        flags[list(self.special_ids)] = True
        return flags

    def _lacks(self, token: str) -> UsageError:
        return UsageError(
            f"tokenizer {self.name!r} has no token {token!r}, which this objective needs",
            hint="let the recipe learn its tokenizer (`tokenize`), which then gets it, or add the token to this one",
        )


def _marked_special(backend: Tokenizer) -> set[int]:
    """What the rules call special, whether the tokenizer's configuration gives it a part or not."""
    return {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
