"""The optional packages of the cleaning steps: import one, or say how to get it."""

from importlib import import_module
from typing import Any

from llmkit.errors import MissingError

INSTALL = "pip install 'llmkit[clean]'"


def need(module: str, setting: str) -> Any:
    """Import an optional module.

    Args:
        module: The module's full name.
        setting: The recipe's setting that asks for it, for the message.

    Raises:
        MissingError: It is not installed; the hint is the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingError(
            f"`{setting}` needs the package {module.partition('.')[0]!r}", hint=INSTALL
        ) from error
