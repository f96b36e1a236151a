"""Text in, rows of tokens out: sources, split, tokenizers, shards, order, rows, loader (no torch here)."""
