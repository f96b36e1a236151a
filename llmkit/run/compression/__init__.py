"""`llmkit compress`: a chain of steps, each an artefact, measured before and after."""

from llmkit.run.compression.verb import compress

__all__ = ["compress"]
