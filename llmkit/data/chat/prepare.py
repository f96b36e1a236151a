"""The tokenizer of a model that learns to converse: with the template, and the tokens, that a recipe gives it.

What is saved with the model says all that serving needs to know: variables of the template (`template_options`) become
its defaults, written at its head.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.data.chat.choose import chosen_template, tokens_to_add

Option = bool | int | float | str


def prepare_tokenizer(
    tokenizer: Any, setting: str | None, base: Path, options: Mapping[str, Option] | None = None
) -> tuple[tuple[str, ...], bool]:
    """Give a tokenizer the chat template that a recipe asks for, and the special tokens that this needs.

    Args:
        tokenizer: One of transformers'; changed in place. Without a template afterwards where that is asked for.
        setting: The recipe's `chat_template`; see `chosen_template`.
        base: The folder that a relative file is looked for in.
        options: Variables of the template.

    Returns:
        The tokens that are new, and whether anything about the tokenizer is.

    Raises:
        UsageError: The tokenizer has no template of its own, and the recipe names none.
        MissingError: There is no such file.
        RecipeError: The file is not valid Jinja.
    """
    before = tokenizer.chat_template
    template = chosen_template(tokenizer, setting, base)
    added = () if template is None else tuple(tokens_to_add(tokenizer, template))
    if added:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(added)}, replace_extra_special_tokens=False
        )
    tokenizer.chat_template = None if template is None else with_defaults(template, options or {})
    return added, bool(added) or tokenizer.chat_template != before


def with_defaults(template: str, options: Mapping[str, Option]) -> str:
    """The template with values for variables that are not given to it when it is rendered."""
    if not options:
        return template
    head = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in sorted(options.items())
    )
    return (
        head + ("\n" if template.startswith("\n") else "") + template
    )  # a line end behind a block is dropped


def _literal(value: Option) -> str:
    return str(value) if isinstance(value, bool) else json.dumps(value)
