"""`llmkit compress`: a chain of steps, each an artefact, measured before and after."""

from llmkit.run.compression.verb import compress, outline_compression

__all__ = ["compress", "outline_compression"]
