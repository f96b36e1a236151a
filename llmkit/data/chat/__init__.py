"""Conversations as token ids, with what is learned of them."""

from llmkit.data.chat.choose import NO_TEMPLATE, chosen_template, tokens_to_add
from llmkit.data.chat.conversation import (
    Chat,
    Conversations,
    Plain,
    conversations_of,
    without_earliest,
)
from llmkit.data.chat.masks import Encoded, NotExactError
from llmkit.data.chat.prepare import prepare_tokenizer
from llmkit.data.chat.template import Message, Messages, Template, Tools
from llmkit.data.chat.tokens import MaskedPiece, masked_pieces, padding_id, unshifted

__all__ = [
    "NO_TEMPLATE",
    "Chat",
    "Conversations",
    "Encoded",
    "MaskedPiece",
    "Message",
    "Messages",
    "NotExactError",
    "Plain",
    "Template",
    "Tools",
    "chosen_template",
    "conversations_of",
    "masked_pieces",
    "padding_id",
    "prepare_tokenizer",
    "tokens_to_add",
    "unshifted",
    "without_earliest",
]
