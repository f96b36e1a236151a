"""llmkit: a language model's whole life from one recipe file."""

from llmkit.register import register_on_import

__version__ = "0.1.0"

register_on_import()
