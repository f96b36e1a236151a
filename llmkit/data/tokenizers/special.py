"""Special tokens, chat templates, and the files in which a tokenizer is kept."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from llmkit.data.tokenizers.algorithms import BERT_UNKNOWN, UNKNOWN
from llmkit.errors import MissingError, RecipeError
from llmkit.recipe.schema import Tokenize
from llmkit.registry import BERT_ROLES

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_BERT = {
    "pad_token": "[PAD]",
    "unk_token": BERT_UNKNOWN,
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "bos_token": "[CLS]",
    "eos_token": "[SEP]",
}


STANDS_FOR = dict(zip(("cls_token", "sep_token", "mask_token"), BERT_ROLES, strict=True))
"""What plays BERT's parts in the vocabularies of other algorithms, where an objective needs them."""


def special_roles(spec: Tokenize) -> dict[str, str]:
    """Which token plays which part, such as `eos_token`, in the order of their ids."""
    if spec.algorithm in ("wordpiece", "chars"):
        return dict(_BERT)
    roles = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PAD}
    if spec.algorithm != "bpe" and not spec.byte_fallback:
        roles["unk_token"] = UNKNOWN
    return roles | {role: token for role, token in STANDS_FOR.items() if token in spec.special_tokens}


def special_tokens(spec: Tokenize) -> list[str]:
    """All special tokens in the order of their ids: the algorithm's own, the chat template's, the recipe's."""
    chat = CHAT_TOKENS if spec.chat_template == "chatml" else ()
    return list(dict.fromkeys([*special_roles(spec).values(), *chat, *spec.special_tokens]))


def add_specials(tokenizer: Tokenizer, specials: Sequence[str]) -> None:
    """Make the special tokens of the vocabulary special, and see that text can never be taken for one of them.

    Raises:
        RecipeError: A special token could come about by text, or would not be decoded as it is written.
    """
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    for token in specials:
        if not token.strip() or _decoded(tokenizer, token) != token:
            raise RecipeError(
                f"special token {token!r} cannot be decoded as it is written",
                hint="use plain ASCII: <|name|>",
            )
        if len(tokenizer.pre_tokenizer.pre_tokenize_str(token)) < 2:
            raise RecipeError(
                f"special token {token!r} is something that text can hold as one word or sign, so text could be "
                "taken for it",
                hint="put it between signs: <|name|>",
            )


def _decoded(tokenizer: Tokenizer, token: str) -> str:
    number = tokenizer.token_to_id(token)
    return "" if number is None else tokenizer.decode([number], skip_special_tokens=False)


def chat_template(spec: Tokenize, base: Path) -> str | None:
    """The Jinja text of the recipe's chat template, if it asks for one.

    Raises:
        MissingError: Its file does not exist.
        RecipeError: It is not valid Jinja; the message names file and line.
    """
    if spec.chat_template is None:
        return None
    if spec.chat_template == "chatml":
        return CHATML
    path = base / Path(spec.chat_template).expanduser()
    if not path.is_file():
        raise MissingError(
            f"chat template {spec.chat_template!r}: no such file ({path})",
            hint="write `chat_template: chatml`, or name a file with a Jinja template",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"chat template {path} is not UTF-8 text: {error.reason}") from error
    _refuse_broken(text, path)
    return text


def _refuse_broken(text: str, path: Path) -> None:
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}` marks what the assistant says; transformers knows it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            number = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=number)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    try:
        environment.from_string(text)
    except TemplateSyntaxError as error:
        lines = text.splitlines()
        line = lines[error.lineno - 1].strip() if 0 < error.lineno <= len(lines) else ""
        raise RecipeError(
            f"{path}:{error.lineno}: the chat template is not valid Jinja: {error.message}\n    {line}"
        ) from error


def write_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    roles: Mapping[str, str],
    specials: Sequence[str],
    template: str | None,
    max_length: int | None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja for AutoTokenizer.

    Done here, since importing transformers takes seconds and learning needs nothing else of it.
    """
    config: dict[str, Any] = {
        "backend": "tokenizers",
        **roles,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    further = [token for token in specials if token not in roles.values()]
    if further:
        config["extra_special_tokens"] = further
    if max_length is not None:
        config["model_max_length"] = max_length
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
