"""Questions as a chat model is asked them: by the template that it learned with."""

from collections.abc import Sequence
from typing import Any

from llmkit.data.chat import Template
from llmkit.errors import UsageError


def asked(tokenizer: Any, questions: Sequence[str], *, system: str = "") -> list[str]:
    """Each question as a conversation's first turn, up to where the assistant begins to speak.

    The ids of such a text are those that stood before an answer in training.

    Args:
        tokenizer: The model's, with a chat template.
        questions: What the user says.
        system: What the system says before, if anything.

    Raises:
        UsageError: A text spells a special token of the template, or the template takes no system's turn.
        DataError: The template refuses such a conversation.
    """
    template = Template(tokenizer)
    return [_asked(template, question, system) for question in questions]


def _asked(template: Template, question: str, system: str) -> str:
    messages = [{"role": "user", "content": question}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    spelled = template.control_token(messages)
    if spelled is not None:
        raise UsageError(
            f"the text spells the special token {spelled[1]!r}, which would be taken for the real one",
            hint="take it out; a text that is to be continued as it stands goes with --raw",
        )
    text = template.render(messages, prompt=True)
    if system and system.strip() not in text:
        raise UsageError(
            "the model's chat template leaves out what the system says", hint="leave --system out"
        )
    return text
