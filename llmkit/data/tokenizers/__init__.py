"""Tokenizers: learn one by any of five algorithms, load any by name or folder, encode documents.

What is learnt is an ordinary tokenizer: plain `AutoTokenizer.from_pretrained(folder)` loads it and gives the
same ids (it takes special tokens that a text spells for special tokens, though, unless it is called with
`split_special_tokens=True`; llmkit never does).
"""

from llmkit.data.tokenizers.encoding import BATCH_CHARS, encode_documents, token_dtype
from llmkit.data.tokenizers.learn import (
    MAX_SAMPLE_BYTES,
    learn,
    refuse_impossible,
)
from llmkit.data.tokenizers.load import (
    LightTokenizer,
    end_texts,
    eos_id,
    fingerprint,
    frame_texts,
    load_tokenizer,
    open_tokenizer,
    save_tokenizer,
    special_ids,
)
from llmkit.data.tokenizers.pieces import Piece, pieces
from llmkit.data.tokenizers.special import END_OF_TEXT, PAD

__all__ = [
    "BATCH_CHARS",
    "END_OF_TEXT",
    "MAX_SAMPLE_BYTES",
    "PAD",
    "LightTokenizer",
    "Piece",
    "encode_documents",
    "end_texts",
    "eos_id",
    "fingerprint",
    "frame_texts",
    "learn",
    "load_tokenizer",
    "open_tokenizer",
    "pieces",
    "refuse_impossible",
    "save_tokenizer",
    "special_ids",
    "token_dtype",
]
