"""Rows that a task learns from: read, recognised, checked one by one, put into one form, and divided.

Each task has one canonical row, whatever the file looked like; keys that end in `?` may be absent:

| task | row |
|---|---|
| cls | `text, other?, label` (a text, or a list of them) |
| regression | `text, other?, label` (a number) |
| tag | `tokens, tags` |
| qa | `id, question, context, answers` (`[{text, start}]`; none: it cannot be answered) |
| seq2seq | `source, target` |
| sft | `messages` (`[{role, content, ...}]`)`, tools?` |
| dpo | `prompt` (messages), `chosen, rejected` (messages after it); or `prompt, completion, label` (KTO) |
| embed | `anchor, positive, negatives?`; or `anchor, positive, score` |

and `place` beside them: where it was found, `reviews.csv:17`.
"""

from llmkit.data.records.found import Found, count_classes, fingerprint, read_rows
from llmkit.data.records.split import num_shared, split_rows

__all__ = ["Found", "count_classes", "fingerprint", "num_shared", "read_rows", "split_rows"]
