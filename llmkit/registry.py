"""Names to code, lazily: `clm -> llmkit.objectives.clm:CausalLM`; a wrong name gets the nearest as answer."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from llmkit.errors import UsageError

OBJECTIVES: Mapping[str, str] = {
    "clm": "llmkit.objectives.clm:CausalLM",
}


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most likely meant, or None when nothing is close."""
    matches = get_close_matches(word.lower(), {c.lower(): c for c in choices}, n=1, cutoff=0.6)
    return next((c for c in choices if matches and c.lower() == matches[0]), None)


def load(registry: Mapping[str, str], name: str, kind: str) -> Any:
    """Import what `name` stands for.

    Raises:
        UsageError: `name` is not registered; the message lists the known names and the nearest one.
    """
    if name not in registry:
        guess = nearest(name, list(registry))
        raise UsageError(
            f"unknown {kind} {name!r}; known: {', '.join(sorted(registry))}",
            hint=f"did you mean {guess!r}?" if guess else "",
        )
    module, attribute = registry[name].split(":")
    return getattr(import_module(module), attribute)
