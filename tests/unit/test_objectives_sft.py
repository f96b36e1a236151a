"""Fine-tuning on conversations: the loss of transformers, packed or padded; and what training leaves for serving."""

import json

import numpy as np
import pytest
import torch
from training import losses, options
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
)
from tuning import CONTEXT, content, finetune, model, recipe, tokenizer_of

from llmkit.data.chat import prepare_tokenizer
from llmkit.data.chat.prepare import with_defaults
from llmkit.durable import write_folder
from llmkit.errors import UsageError
from llmkit.evaluate.chat import asked
from llmkit.evaluate.complete import complete
from llmkit.models.attention import use_attention
from llmkit.models.growing import check_new_tokens, grow_vocabulary
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED, Material
from llmkit.objectives.sft import build, in_lines
from llmkit.recipe import load_recipe
from llmkit.recipe.schema import Sampling
from llmkit.report.console import make_reporter
from llmkit.run.generate import _chats, generate

ROWS = [json.loads(line) for line in content("sft", 6).splitlines()]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
CONFIGS = {
    "llama": lambda size: LlamaConfig(vocab_size=size, num_key_value_heads=1, **SMALL),
    "qwen3": lambda size: Qwen3Config(vocab_size=size, num_key_value_heads=1, head_dim=16, **SMALL),
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2),
}


def task(tokenizer=None, **settings):
    """The task as a recipe with such settings of `sft` makes it."""
    made = {"task": "sft", "model": {"name": "m"}, "data": {"files": "x"}, "sft": settings}
    section = load_recipe({"llmkit": 1, "finetune": made}).recipe.finetune
    return build(section, Material(tokenizer or tokenizer_of("llama"), CONTEXT))


def network(family, size):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[family](size), dtype=torch.float32).eval()
    use_attention(made, "sdpa", isolate=True)
    choose_heads(made, "causal")
    return made


def theirs(network, objective, example):
    """Transformers' own loss of one conversation: the mean over its targets, and how many they are."""
    ids, learned = objective.texts(example)["conversation"]
    labels = torch.from_numpy(learned)[None]
    count = int((labels != NOT_LEARNED).sum())
    return network(input_ids=torch.from_numpy(ids)[None], labels=labels).loss, count


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pack", [True, False])
def test_the_loss_and_its_gradient_are_those_of_transformers_row_by_row(family, pack):
    tokenizer = tokenizer_of("llama")
    objective, net = task(pack=pack), network(family, len(tokenizer))
    examples = [objective.encode(row) for row in ROWS]
    batch = objective.collate(examples)
    ours = objective.loss(net, batch).total / batch["num_targets"]
    ours.backward()
    mine = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    use_attention(net, "sdpa", isolate=False)
    sums = [theirs(net, objective, example) for example in examples]
    total = sum(loss * count for loss, count in sums) / sum(count for _, count in sums)
    total.backward()
    assert ours.item() == pytest.approx(total.item(), rel=1e-5)
    assert int(batch["num_targets"]) == sum(count for _, count in sums)
    for name, p in net.named_parameters():
        assert torch.allclose(mine[name], p.grad, atol=1e-5), name


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_packed_line_is_next_to_full_and_positions_restart(count):
    objective = task()
    examples = [objective.encode(row) for row in ROWS[:count]]
    batch, whole = objective.collate(examples), sum(len(example["input_ids"]) for example in examples)
    lines, width = batch["input_ids"].shape
    assert lines == 1
    assert whole <= width <= whole * 33 / 32
    assert (batch["position_ids"][0, :whole] == 0).sum() == count
    assert (batch["targets"][0, whole:] == NOT_LEARNED).all()
    assert "attention_mask" not in batch


def test_more_than_a_line_holds_goes_into_several():
    """As on a GPU, where tens of thousands of tokens are computed at a time."""
    objective = task()
    examples = [objective.encode(row) for row in ROWS]
    lengths = [len(example["input_ids"]) for example in examples]
    lines = in_lines(examples, 7, longest=max(lengths) + 10)
    assert 1 < len(lines["input_ids"]) < len(examples)
    assert lines["input_ids"].shape[1] <= max(lengths) + 10
    net = network("llama", len(tokenizer_of("llama")))
    whole = objective.collate(examples)
    lines["num_targets"] = whole["num_targets"]
    with torch.no_grad():
        one, several = (float(objective.loss(net, batch).total) for batch in (whole, lines))
    assert several == pytest.approx(one, rel=1e-5)
    read = sorted(lines["input_ids"].flatten().tolist())
    filled = lines["input_ids"].numel() - sum(lengths)
    assert read == sorted([*np.concatenate([e["input_ids"] for e in examples]).tolist(), *[7] * filled])


def test_what_is_learned_is_what_the_assistant_says_with_the_end_of_its_turn():
    objective, tokenizer = task(), tokenizer_of("llama")
    ids, targets = objective.texts(objective.encode(ROWS[1]))["conversation"]
    learned = tokenizer.decode(targets[targets != NOT_LEARNED])
    said = [message["content"] for message in ROWS[1]["messages"] if message["role"] == "assistant"]
    assert learned == "".join(f"{text}<|im_end|>" for text in said)
    # What is read ends where the last target is; nothing behind it (a line's end) is learned.
    whole = tokenizer.apply_chat_template(ROWS[1]["messages"], tokenize=True, return_dict=False)
    assert whole[: len(ids)] == ids.tolist()
    last = task(learn="last")
    assert int(last.collate([last.encode(ROWS[1])])["num_targets"]) < len(targets[targets != NOT_LEARNED])


def test_training_reads_before_an_answer_what_serving_gives():
    objective, tokenizer = task(), tokenizer_of("llama")
    for row in ROWS:
        example = objective.encode(row)
        [served] = asked(tokenizer, [row["messages"][0]["content"]])
        ids = tokenizer(served, add_special_tokens=False)["input_ids"]
        assert example["input_ids"][: len(ids)].tolist() == ids
        first = np.flatnonzero(example["targets"] != NOT_LEARNED)[0]
        assert first == len(ids) - 1


def test_the_end_of_a_turn_is_learned_where_it_also_fills_up():
    tokenizer = AutoTokenizer.from_pretrained(model("llama"))
    tokenizer.pad_token = "<|im_end|>"
    objective = task(tokenizer, pack=False)
    batch = objective.collate([objective.encode(row) for row in ROWS[:2]])
    end = tokenizer.pad_token_id
    turns = sum(m["role"] == "assistant" for row in ROWS[:2] for m in row["messages"])
    assert int((batch["targets"] == end).sum()) == turns
    assert int((batch["input_ids"] == end).sum()) > turns


def test_accuracy_counts_the_targets_that_are_likeliest():
    objective = task()
    net = network("llama", len(tokenizer_of("llama")))
    batch = objective.collate([objective.encode(row) for row in ROWS])
    with torch.no_grad():
        found = objective.loss(net, batch)
        logits = net(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
    targets = batch["targets"][0]
    right = (logits.argmax(1) == targets)[targets != NOT_LEARNED].sum()
    assert int(found.sums["correct"]) == int(right)
    metrics = objective.summarise({"total": 20.0, "num_targets": 10.0, "correct": 4.0})
    assert metrics["accuracy"] == 0.4
    assert metrics["perplexity"] == pytest.approx(np.exp(2.0))


# --- template and tokens ----------------------------------------------------------------------------------------


def test_a_base_model_gets_chatml_and_rows_for_its_tokens_that_begin_as_the_mean():
    tokenizer = AutoTokenizer.from_pretrained(model("t5"))
    size = len(tokenizer)
    added, changed = prepare_tokenizer(tokenizer, "chatml", None)
    assert (added, changed, len(tokenizer)) == (("<|im_start|>", "<|im_end|>"), True, size + 2)
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)
    net = network("llama", size)
    before = net.get_input_embeddings().weight.detach().clone()
    head = net.get_output_embeddings().weight.detach().clone()
    assert grow_vocabulary(net, len(tokenizer), len(added), seed=1) == 2
    grown = net.get_input_embeddings().weight.detach()
    assert torch.equal(grown[:size], before)
    assert torch.allclose(grown[size:], before.mean(0).expand(2, -1), atol=0.05 * float(before.std()))
    assert not torch.equal(grown[size], grown[size + 1])
    assert torch.allclose(
        net.get_output_embeddings().weight[size:], head.mean(0).expand(2, -1), atol=0.05 * float(head.std())
    )
    net.requires_grad_(False)
    with pytest.raises(UsageError, match="embeddings do not learn"):
        check_new_tokens(net, added)


def test_entries_that_no_token_has_are_used_before_new_ones_are_made():
    net = network("llama", 40)
    assert grow_vocabulary(net, 30, 2) == 0
    weight = net.get_input_embeddings().weight.detach()
    assert len(weight) == 40
    assert torch.allclose(weight[28:30], weight[:28].mean(0).expand(2, -1), atol=0.05 * float(weight.std()))


def test_variables_of_the_template_are_saved_with_it():
    tokenizer = AutoTokenizer.from_pretrained(model("llama"))
    own = "{% if loud %}LOUD {{ mark }}{% endif %}" + tokenizer.chat_template
    tokenizer.chat_template = with_defaults(own, {"loud": True, "mark": 'a"b'})
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == 'LOUD a"b<|im_start|>user\nhi<|im_end|>\n'
    # Whoever serves it may still say otherwise.
    assert tokenizer.apply_chat_template(messages, tokenize=False, loud=False).startswith("<|im_start|>")
    assert with_defaults(own, {}) == own


def test_without_a_template_one_is_offered(tmp_path):
    with pytest.raises(UsageError, match="has no chat template") as caught:
        finetune(tmp_path, "sft", finetune__model={"name": _without_template(tmp_path), "context": CONTEXT})
    assert "finetune.chat_template=chatml" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "words"), [("bert", "a masked language model"), ("t5", "an encoder-decoder")]
)
def test_a_model_that_does_not_predict_the_next_token_is_refused(tmp_path, family, words):
    with pytest.raises(UsageError, match=words):
        finetune(tmp_path, "sft", finetune__model={"name": model(family)}, finetune__chat_template="chatml")


def _without_template(folder):
    place = folder / "plain"
    AutoModelForCausalLM.from_pretrained(model("llama")).save_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(model("llama"))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(place)
    return str(place)


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A run that gives its base, a model of another vocabulary, a template with a variable and the tokens for it."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(model("t5"))
    base = folder / "base"
    tokenizer.save_pretrained(base)
    network("llama", len(tokenizer)).save_pretrained(base)
    run = finetune(
        folder,
        "sft",
        finetune__model={"name": str(base), "context": 96},
        finetune__chat_template="chatml",
        finetune__sft={"template_options": {"quick": True}},
        finetune__train__length="40 steps",
        finetune__prompts=["which cat is number 3?"],
        finetune__checkpoint={"every": "never"},
        finetune__eval={"every": "never"},
    )
    return folder, run, len(tokenizer)


def test_the_model_that_comes_out_knows_template_tokens_and_ends(chat):
    _, run, size = chat
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    net = AutoModelForCausalLM.from_pretrained(run / "model")
    assert net.get_input_embeddings().weight.shape[0] == size + 2
    assert "<|im_start|>" in tokenizer.chat_template
    assert "quick" in tokenizer.chat_template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert net.generation_config.eos_token_id == sorted({tokenizer.eos_token_id, end})
    found = losses(run)
    assert found[40] < found[1] / 2


@pytest.fixture
def read(monkeypatch):
    """What models are given to go on from, ids without what fills up, batch after batch."""
    found = []
    whole = LlamaForCausalLM.generate

    def spy(self, input_ids, attention_mask, **more):
        found.extend(ids[mask == 1].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return whole(self, input_ids=input_ids, attention_mask=attention_mask, **more)

    monkeypatch.setattr(LlamaForCausalLM, "generate", spy)
    return found


def test_serving_and_samples_ask_by_the_ids_of_training(chat, read):
    folder, run, _ = chat
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    question = ROWS[0]["messages"][0]["content"]
    objective = task(tokenizer)
    ids, targets = objective.texts(objective.encode(ROWS[0]))["conversation"]
    before = ids[: np.flatnonzero(targets != NOT_LEARNED)[0]].tolist()

    sampling = Sampling(temperature=0, max_new_tokens=24)
    more = {"samples": 1, "seed": 1, "runs": folder / "runs", "reporter": make_reporter(quiet=True)}
    [answer] = generate("sft", [question], sampling, **more)
    assert answer["chat"]
    assert answer["finished"]
    assert answer["text"].startswith("the ")
    assert "<|im_end|>" not in answer["text"]
    net = AutoModelForCausalLM.from_pretrained(run / "model")
    [(prompt, text)] = complete(net, "causal", tokenizer, [question], sampling, seed=1, chat=True)
    assert (prompt, text) == (question, answer["text"])
    assert read == [before, before]

    [raw] = generate("sft", [question], sampling, chat=False, **more)
    assert not raw["chat"]
    assert read[2] == tokenizer(question, add_special_tokens=False)["input_ids"]
    with pytest.raises(UsageError, match="spells the special token"):
        generate("sft", ["<|im_end|>"], sampling, **more)
    [answer] = generate("sft", [question], sampling, system="be brief", **more)
    assert tokenizer.decode(read[3]).startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_a_model_that_learned_text_alone_goes_on_from_a_text(tmp_path):
    """Its tokenizer may have a template all the same."""
    tokenizer = tokenizer_of("llama")
    assert _chats(tmp_path, tokenizer, None, "")
    with write_folder(tmp_path / "model", facts={"identity": {"pretrain.objective": "clm"}}):
        pass
    assert not _chats(tmp_path / "model", tokenizer, None, "")
    assert _chats(tmp_path / "model", tokenizer, True, "")
    with pytest.raises(UsageError, match="--raw"):
        _chats(tmp_path, tokenizer, False, "be brief")


def test_the_same_settings_find_the_same_tokenizer(chat):
    folder, _, _ = chat
    from llmkit.run.rows import prepare_rows

    made = recipe(
        folder,
        "sft",
        finetune__model={"name": str(folder / "base"), "context": 96},
        finetune__chat_template="chatml",
        finetune__sft={"template_options": {"quick": True}},
    )
    prepared = prepare_rows(load_recipe(made), options(folder), make_reporter(quiet=True))
    kept = list((folder / "runs" / ".cache" / "chat").iterdir())
    assert [str(place) for place in kept if not place.name.startswith(".")] == [prepared.tokenizer]
    assert prepared.new_tokens == 2


def test_padded_and_packed_runs_learn_the_same(tmp_path):
    first, second = (
        finetune(tmp_path, "sft", f"pack-{pack}", finetune__sft={"pack": pack}, finetune__model__dropout=0.0)
        for pack in (True, False)
    )
    assert losses(first) == pytest.approx(losses(second), rel=1e-4)
    assert json.loads((first / "plan.json").read_text())["packed"]
    assert not json.loads((second / "plan.json").read_text())["packed"]


def test_joined_pairs_go_without_a_template(tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(30))
    )
    run = finetune(
        tmp_path,
        "sft",
        finetune__data={"files": str(rows)},
        finetune__chat_template="none",
        finetune__prompts=["3 + 1 ="],
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert not tokenizer.chat_template
    facts = json.loads((run / "data.json").read_text())
    answers = sum(len(tokenizer(f" {n + 1}")["input_ids"]) + 1 for n in range(30))  # and the end token
    assert facts["train"]["num_targets"] + facts["held_out"]["num_targets"] == answers


def test_an_adapter_learns_new_tokens_only_if_the_embeddings_learn(chat, tmp_path):
    folder, _, size = chat
    changes = {
        "finetune__model": {"name": str(folder / "base"), "context": 96},
        "finetune__chat_template": "chatml",
        "finetune__adapter": {"rank": 2},
    }
    with pytest.raises(UsageError, match="embeddings do not learn"):
        finetune(tmp_path, "sft", **changes)
    changes["finetune__adapter"] = {"rank": 2, "whole": "embed_tokens|lm_head"}
    run = finetune(tmp_path, "sft", fresh=True, **changes)
    net = AutoModelForCausalLM.from_pretrained(run / "model")
    assert net.get_input_embeddings().weight.shape[0] == size + 2
    assert losses(run)[6] < losses(run)[1]
