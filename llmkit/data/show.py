"""A text as the pieces a tokenizer makes of it, for `llmkit tokenize --show`."""

from llmkit.data.tokenizers.pieces import Piece, pieces

__all__ = ["Piece", "pieces"]
