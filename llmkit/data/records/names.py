"""What columns are usually called, by task and role, the likeliest first; compared by `record.plain`."""

from collections.abc import Mapping

_FIRST = ("sentence1", "premise", "question1", "text1", "text_a", "sentence_a")
_SECOND = ("sentence2", "hypothesis", "question2", "text2", "text_b", "sentence_b", "text_pair")
_TEXT = (
    "sentence", *_FIRST, "review", "content", "comment", "utterance", "query", "question", "tweet", "message",
    "body", "document", "input", "title",
)  # fmt: skip

NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cls": {
        "text": _TEXT,
        "other": _SECOND,
        "label": (
            "label_text", "label_name", "label", "labels", "category", "categories", "class", "target", "intent",
            "sentiment", "topic", "stars", "rating", "emotion", "tag", "y",
        ),
    },
    "regression": {
        "text": _TEXT,
        "other": _SECOND,
        "label": ("score", "target", "labels", "rating", "stars", "similarity", "value", "y"),
    },
    "choice": {
        "query": ("question", "prompt", "ctx", "goal"),
        "choices": ("options", "endings", "answers"),
        "gold": ("answer", "label", "answer_index", "correct", "target"),
        "context": ("text", "prefix"),
        "continuation": ("completion", "ending", "last_word"),
    },
    "generation": {
        "prompt": ("source", "input", "question", "query", "instruction", "article", "document", "text", "src"),
        "references": (
            "reference", "target", "targets", "answers", "answer", "completion", "output", "summary", "highlights",
            "response", "tgt",
        ),
        "messages": ("conversations", "conversation", "dialog", "dialogue", "turns"),
    },
    "retrieval": {
        "question": ("query", "anchor", "prompt"),
        "positive": (
            "positives", "positive_id", "positive_ids", "relevant", "passage_id", "doc_id", "pos", "context", "passage",
        ),
        "answers": ("answer", "answer_text", "references", "target"),
    },
    "passages": {
        "text": ("passage", "content", "contents", "body", "document", "context", "paragraph", "sentence"),
        "id": ("_id", "passage_id", "doc_id", "docid", "pid"),
    },
    "tag": {"tokens": ("words", "token"), "tags": ("ner_tags", "labels", "ner", "tag", "pos_tags", "entities")},
    "qa": {
        "id": ("qid", "question_id"),
        "question": ("query",),
        "context": ("passage", "paragraph", "document", "text"),
        "answers": ("answer", "answer_text"),
        "start": ("answer_start",),
    },
    "seq2seq": {
        "source": ("src", "input", "prompt", "article", "document", "dialogue", "text", "question"),
        "target": ("tgt", "output", "completion", "highlights", "summary", "abstract", "answer", "correction", "label"),
    },
    "sft": {
        "messages": ("conversations", "conversation", "dialog", "dialogue", "turns"),
        "tools": ("functions",),
        "system": ("system_prompt",),
        "prompt": ("instruction", "question", "query", "problem", "user"),
        "input": ("context",),
        "completion": ("output", "response", "answer", "solution", "assistant"),
        "history": (),
    },
    "dpo": {
        "prompt": ("conversations", "messages", "question", "instruction", "query", "input"),
        "chosen": ("preferred", "accepted"),
        "rejected": ("dispreferred", "refused"),
        "system": ("system_prompt",),
        "completion": ("response", "output", "answer"),
        "label": ("kto_tag", "desirable", "thumbs", "thumb", "thumbs_up", "feedback", "vote", "liked"),
    },
    "embed": {
        "anchor": ("query", "question", *_FIRST, "sentence", "text"),
        "positive": ("pos", "answer", "passage", "document", *_SECOND),
        "negatives": ("negative", "neg", "hard_negative", "hard_negatives"),
        "score": ("similarity", "similarity_score", "label"),
    },
}  # fmt: skip
