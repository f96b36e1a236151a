"""llmkit: a language model's whole life from one recipe file."""

__version__ = "0.1.0"
