"""Which chat template a conversation is written in, and which tokens the tokenizer lacks for it."""

from pathlib import Path
from typing import Any

from llmkit.data.tokenizers.special import CHAT_TOKENS, CHATML, chat_template
from llmkit.errors import UsageError
from llmkit.recipe.schema import Tokenize

NO_TEMPLATE = "none"
"""The setting that joins prompt and answer with nothing between."""


def chosen_template(tokenizer: Any, setting: str | None, base: Path) -> str | None:
    """The template that a recipe's `chat_template` asks for.

    Args:
        tokenizer: One of transformers'.
        setting: None: the tokenizer's own. `none`: no template. `chatml`, or a file with one.
        base: The folder that a relative file is looked for in.

    Returns:
        The template; None for no template.

    Raises:
        UsageError: The tokenizer has no template of its own, and the recipe names none.
        MissingError: There is no such file.
        RecipeError: The file is not valid Jinja.
    """
    if setting == NO_TEMPLATE:
        return None
    if setting is not None:
        return chat_template(Tokenize(chat_template=setting), base)
    if isinstance(tokenizer.chat_template, dict):
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UsageError(
            f"tokenizer {tokenizer.name_or_path!r} has several chat templates ({names})",
            hint="write the one that is meant to a file, and `chat_template: FILE`",
        )
    if not tokenizer.chat_template:
        missing = tokens_to_add(tokenizer, CHATML)
        adds = f" (it adds {', '.join(missing)})" if missing else ""
        raise UsageError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template, so it does not say how a conversation is "
            "written",
            hint=f"finetune.chat_template=chatml{adds}; or a file with a template, or finetune.chat_template=none: "
            "then prompt and answer are joined, and nothing stands between them",
        )
    return str(tokenizer.chat_template)


def tokens_to_add(tokenizer: Any, template: str) -> list[str]:
    """The special tokens that ChatML needs and the tokenizer lacks; none for another template.

    A template from a file names its tokens as text, which says nothing of what is a token: they have to be the
    tokenizer's.
    """
    if template != CHATML:
        return []
    known = tokenizer.get_vocab()
    return [token for token in CHAT_TOKENS if token not in known]
