"""Small runs of fine-tuning for tests: tiny saved models, a file of rows for each task, in a process or as a command.

Whatever is registered as a task, and is there, is in `TASKS`.
"""

import csv
import inspect
import io
import json
import sys
import textwrap
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from training import options
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from llmkit import registry
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter

TASKS = [name for name, goal in registry.TASKS.items() if find_spec(goal.code.split(":")[0])]
FAST = ("cls", "qa", "sft")
"""Padded rows, windows of rows and packed ones: the others' long tests are among the slow ones."""
EACH = [pytest.param(task, marks=() if task in FAST else pytest.mark.slow) for task in TASKS]
VARIANTS = {
    "kto": ("dpo", {"dpo": {"loss": "kto"}}),
    "mixup": ("cls", {"loss": {"mixup": 0.5}}),
    "decoder": ("seq2seq", {"seq2seq": {"max_target": 12}}),
}
"""Losses that compute otherwise than their task does, and have other rows or models: the task, and what the recipe
says."""
EACH_LOSS = [*EACH, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)]
STEPS = 6
VOCAB_SIZE = 700
CONTEXT = 64
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILY = {"causal": "llama", "seq2seq": "t5"}
"""The family that a kind of model is of in these tests; the others are of `bert`."""

_COLOURS = ("red", "green", "blue", "white", "black")
_ANIMALS = ("cat", "dog", "bird", "horse", "fish")
_CITIES = ("Oslo", "Rome", "Paris", "Vienna", "New York")


# --- models ---------------------------------------------------------------------------------------------------


def model_of(task):
    """The folder of a tiny model that can learn the task."""
    if task == "decoder":
        return model("llama")
    return model(FAMILY.get(registry.TASKS[VARIANTS.get(task, (task,))[0]].model, "bert"))


@cache
def model(family, layers=2, dropout=0.1):
    """The folder of a tiny model with its tokenizer: `bert`, `llama`, `gpt2` or `t5`; the same bits each time.

    The tokenizer of `bert` frames texts by `[CLS]` and `[SEP]`, that of `t5` ends them by `</s>`, those of the decoders
    add nothing and have a chat template.
    """
    place = TemporaryDirectory(prefix="llmkit-test-model-")
    _kept.append(place)
    tokenizer = _TOKENIZERS[family]()
    tokenizer.save_pretrained(place.name)
    torch.manual_seed(3)
    _MODELS[family](len(tokenizer), layers, dropout, tokenizer).save_pretrained(place.name)
    return place.name


def tokenizer_of(family):
    """The tokenizer of such a model."""
    return AutoTokenizer.from_pretrained(model(family))


_kept = []
"""Folders that live as long as the tests."""


def _texts():
    """What the tokenizers learn from: real text, and every word of the rows."""
    sources = [inspect.getsource(module) for module in (json, textwrap)]
    return [*sources, *(content(task) for task in registry.TASKS)]


def _bert_tokenizer():
    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(marks), show_progress=False
    )
    made.train_from_iterator(_texts(), trainer)
    ids = [(mark, made.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return BertTokenizerFast(tokenizer_object=made, model_max_length=CONTEXT)


def _bytes_tokenizer(marks, **more):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(marks),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **more)


def _decoder_tokenizer():
    made = _bytes_tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    made.chat_template = CHATML
    return made


def _t5_tokenizer():
    made = _bytes_tokenizer(
        ("<pad>", "</s>", "<unk>"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", made.eos_token_id)]
    )
    return made


_TOKENIZERS = {
    "bert": _bert_tokenizer,
    "llama": _decoder_tokenizer,
    "gpt2": _decoder_tokenizer,
    "t5": _t5_tokenizer,
}


def _bert(size, layers, dropout, tokenizer):
    return BertForMaskedLM(
        BertConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _llama(size, layers, dropout, tokenizer):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _gpt2(size, layers, dropout, tokenizer):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size,
            n_embd=32,
            n_layer=layers,
            n_head=2,
            n_positions=128,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _t5(size, layers, dropout, tokenizer):
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=size,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=layers,
            num_heads=2,
            dropout_rate=dropout,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


_MODELS = {"bert": _bert, "llama": _llama, "gpt2": _gpt2, "t5": _t5}


# --- rows -----------------------------------------------------------------------------------------------------


def rows_file(folder, task, name=None, count=64):
    """A file of the task's rows in the form that people have them in."""
    path = Path(folder) / (name or FILES[task])
    path.write_text(content(task, count), encoding="utf-8")
    return path


def content(task, count=64):
    """What is in that file."""
    return _CONTENT[task](count)


FILES = {
    "cls": "reviews.csv",
    "regression": "scores.csv",
    "tag": "words.conll",
    "qa": "questions.json",
    "seq2seq": "pairs.tsv",
    "sft": "chats.jsonl",
    "dpo": "preferences.jsonl",
    "kto": "judged.jsonl",
    "embed": "texts.jsonl",
    "mixup": "reviews.csv",
    "decoder": "pairs.tsv",
}


def _words(number):
    """A colour, an animal and a city, and a sentence of them that is long for some numbers."""
    colour, animal, city = (
        names[number // step % 5] for names, step in ((_COLOURS, 1), (_ANIMALS, 5), (_CITIES, 3))
    )
    more = " and walks on and on" * (number * 7 % 4)
    return colour, animal, city, f"the {colour} {animal} lives in {city}{more}"


def _table(header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def _lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def _cls(count):
    return _table(("text", "label"), ((_words(n)[3], _words(n)[0]) for n in range(count)))


def _regression(count):
    return _table(("text", "score"), ((_words(n)[3], n % 5 + n // 5 % 5 / 4) for n in range(count)))


def _tag(count):
    sentences = []
    for number in range(count):
        _, animal, city, sentence = _words(number)
        entities = {
            animal: "B-animal",
            city.split()[0]: "B-place",
            **dict.fromkeys(city.split()[1:], "I-place"),
        }
        sentences.append("\n".join(f"{word} {entities.get(word, 'O')}" for word in sentence.split()))
    return "\n\n".join(sentences) + "\n"


def _qa(count):
    paragraphs = []
    for number in range(count):
        _, animal, city, sentence = _words(number)
        answers = [{"text": city, "answer_start": sentence.index(city)}]
        question = {"id": f"q{number}", "question": f"where does the {animal} live?", "answers": answers}
        paragraphs.append({"context": f"{number}: {sentence}", "qas": [question]})
        answers[0]["answer_start"] += len(f"{number}: ")
    return json.dumps({"version": "1.1", "data": [{"title": "animals", "paragraphs": paragraphs}]})


def _seq2seq(count):
    return "".join(f"{_words(n)[3]}\t{_words(n)[1]} {_words(n)[0]}\n" for n in range(count))


def _chat(number):
    colour, animal, city, _ = _words(number)
    return f"which {animal} is number {number}?", f"the {colour} one from {city}"


def _sft(count):
    rows = []
    for number in range(count):
        turns = [_chat(number + extra) for extra in range(1 + number % 2)]
        pairs = [
            (role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append({"messages": [{"role": role, "content": text} for role, text in pairs]})
    return _lines(rows)


def _dpo(count):
    return _lines(
        {"prompt": _chat(n)[0], "chosen": _chat(n)[1], "rejected": f"no {_words(n)[1]} at all"}
        for n in range(count)
    )


def _kto(count):
    """Answers to prompts of their own; two of three are good."""
    return _lines(
        {
            "prompt": _chat(n)[0],
            "completion": _chat(n)[1] if n % 3 else f"no {_words(n)[1]} at all",
            "label": n % 3 > 0,
        }
        for n in range(count)
    )


def _embed(count):
    return _lines(
        {"anchor": f"number {n}: where is the {_words(n)[1]}?", "positive": f"{n}: {_words(n)[3]}"}
        for n in range(count)
    )


_CONTENT = {
    "cls": _cls,
    "regression": _regression,
    "tag": _tag,
    "qa": _qa,
    "seq2seq": _seq2seq,
    "sft": _sft,
    "dpo": _dpo,
    "kto": _kto,
    "embed": _embed,
    "mixup": _cls,
    "decoder": _seq2seq,
}


# --- runs -----------------------------------------------------------------------------------------------------


def recipe(folder, task, name=None, **changes):
    """A recipe for a run of seconds, with dropout; `changes` are dotted keys with `__` for the dots.

    The run is called as the task, or as the loss of `VARIANTS` that stands for one, unless `name` says otherwise.
    """
    real, more = VARIANTS.get(task, (task, {}))
    made = {
        "llmkit": 1,
        "name": name or task,
        "seed": 7,
        "finetune": {
            "task": real,
            **more,
            "model": {"name": model_of(task), "context": CONTEXT},
            "data": {"files": str(rows_file(folder, task))},
            "held_out": 0.25,
            "train": {"length": f"{STEPS} steps", "batch": "12 samples", "optim": {"lr": 1e-2}},
            "checkpoint": {"every": "2 steps", "keep": 10},
            "eval": {"every": "3 steps"},
        },
        "machine": {
            "device": "cpu",
            "precision": "fp32",
            "compile": False,
            "attention": "sdpa",
            "micro_batch": 2,
        },
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = made
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return made


def finetune(folder, task, name=None, *, fresh=False, **changes):
    """Fine-tune in this process; return the run folder."""
    from llmkit.run import finetune as verb

    loaded = load_recipe(recipe(folder, task, name, **changes))
    return verb(loaded, options(folder, fresh=fresh), make_reporter(quiet=True)).folder


def words(folder, task, name=None, *more, **changes):
    """What follows `llmkit` in the command of the same run, its recipe written to a file."""
    path = Path(folder) / f"{name or task}.json"
    path.write_text(json.dumps(recipe(folder, task, name, **changes)))
    return ["finetune", str(path), "--runs", str(Path(folder) / "runs"), *more]


def command(folder, task, name=None, *more, **changes):
    """The command line of the same run; `training.start` starts it."""
    return [sys.executable, "-m", "llmkit", *words(folder, task, name, *more, **changes)]


def folder_of(folder, name):
    """Where a run leaves what it makes."""
    return Path(folder) / "runs" / name / "finetune"
