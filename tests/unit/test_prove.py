"""The proofs before training find what they are for, in architectures that have it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from llmkit.data.loader import MicroBatches
from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.errors import DataError, RunError, UsageError
from llmkit.models import attention
from llmkit.models.attention import use_attention
from llmkit.objectives.base import NOT_LEARNED, LossModule
from llmkit.objectives.clm import CausalLM
from llmkit.registry import goal_of
from llmkit.train import prove
from llmkit.train.prove import (
    first_rows,
    prove_end_of_text,
    prove_isolation,
    prove_isolation_of,
    prove_saving,
    prove_targets,
    self_check,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def model_of(model_type, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL, **fields)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["sdpa", "compiled", "eager"])
def test_isolation_holds_where_positions_decide_it_and_not_without(name):
    model = model_of("llama", intermediate_size=64)
    use_attention(model, name, isolate=True)
    prove_isolation(model)
    if name != "eager":
        use_attention(model, name, isolate=False)
        with pytest.raises(UsageError, match="does not keep documents"):
            prove_isolation(model)


def test_an_architecture_without_restarting_positions_is_refused():
    model = model_of("opt", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    use_attention(model, "sdpa", isolate=True)
    with pytest.raises(UsageError, match="opt does not keep documents"):
        prove_isolation(model)


def core_of(model):
    return LossModule(model, CausalLM(), bf16=False)


# The run's own rows.

TOKENIZER = SimpleNamespace(eos_token="<end>", eos_token_id=0, pad_token_id=1, bos_token_id=None)


def row_of(*lengths, length=65, end=0, vocab=50):
    """A row of documents that end by `end`; the last one goes on."""
    ids = 2 + (np.arange(length) * 7 + sum(lengths)) % (vocab - 2)
    positions, start = np.arange(length), 0
    for size in lengths:
        start += size
        ids[start - 1] = end
        positions[start:] = np.arange(length - start)
    return {"ids": ids, "positions": positions, "seed": np.asarray(0)}


def plain(row):
    return {name: value for name, value in row.items() if name != "positions"}


class MasksPadding(CausalLM):
    """The field's common mistake: what looks like padding is not learned."""

    def encode(self, row):
        example = super().encode(row)
        return {**example, "targets": np.where(example["targets"] == 1, NOT_LEARNED, example["targets"])}


def test_rows_without_a_target_are_refused():
    examples = [CausalLM().encode({"ids": np.arange(9), "positions": np.zeros(9, np.int64)})]
    with pytest.raises(DataError, match="1 rows have 8 positions and not one target"):
        prove_targets(examples)
    assert prove_targets([*examples, CausalLM().encode({"ids": np.arange(9)})]) == (
        "50.0% of the positions are learned"
    )


@pytest.mark.parametrize("isolate", [True, False])
def test_document_ends_are_learned(isolate):
    rows = [row_of(10, 1, 20), row_of()]
    examples = [CausalLM().encode(row if isolate else plain(row)) for row in rows]
    # The document of one token is an end that nothing comes before.
    assert prove_end_of_text(rows, examples, TOKENIZER) == "the end of 2 of 2 documents is learned"


def test_documents_that_do_not_end_by_the_tokenizers_token_are_refused():
    rows = [row_of(10, 20, end=5)]
    with pytest.raises(DataError, match=r"2 documents end in the first 1 rows, none by .*'<end>', id 0"):
        prove_end_of_text(rows, [CausalLM().encode(row) for row in rows], TOKENIZER)


def test_an_end_that_is_taken_for_padding_is_refused_and_the_reason_named():
    rows = [row_of(10, 20, end=1)]
    examples = [MasksPadding().encode(row) for row in rows]
    same = SimpleNamespace(eos_token="<end>", eos_token_id=1, pad_token_id=1, bos_token_id=None)
    with pytest.raises(DataError, match="nowhere a target") as caught:
        prove_end_of_text(rows, examples, same)
    assert "pad_token is the same token" in caught.value.hint
    other = SimpleNamespace(eos_token="<end>", eos_token_id=1, pad_token_id=7, bos_token_id=None)
    with pytest.raises(DataError) as caught:
        prove_end_of_text(rows, examples, other)
    assert "the objective leaves it out" in caught.value.hint


def test_where_no_document_ends_that_is_said():
    rows = [row_of(), row_of(1)]
    said = prove_end_of_text(rows, [CausalLM().encode(row) for row in rows], TOKENIZER)
    assert "no document ends in the first 2 rows" in said


class OneStream:
    """Documents of 7 tokens."""

    name, num_tokens = "numbers", 400

    def read(self, start, stop):
        return np.arange(start, stop).astype(np.uint16)

    def document_starts(self, start, stop):
        return np.array([at for at in range(start, stop) if at % 7 == 0], np.int64)


def test_the_first_rows_are_those_of_the_first_step():
    rows, order = Rows([OneStream()], 16), RowOrder([24], None, 3)
    of_step = MicroBatches(rows, order, rows_per_step=6, micro_batch_size=2, isolate=True).of_step(0)
    wanted = [row for _, micro in of_step for row in micro]
    found = first_rows(rows, order, 6)
    assert len(found) == len(wanted) == 6
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys() >= {"ids", "positions", "seed"}
        assert all(np.array_equal(one[name], other[name]) for name in one)


def packed(*rows):
    return [CausalLM().encode(row) for row in rows or (row_of(10, 1, 20), row_of(30, 3))]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sdpa", "compiled", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_real_rows_are_kept_apart_in_the_runs_own_pass(model_type, name, bf16):
    fields = {"llama": {"attention_dropout": 0.2}, "mixtral": {"num_local_experts": 4}, "gpt2": {}}
    intermediate = {} if model_type == "gpt2" else {"intermediate_size": 64, "num_key_value_heads": 2}
    core = LossModule(
        model_of(model_type, **intermediate, **fields[model_type]), CausalLM(), bf16=bf16
    ).train()
    use_attention(core.model, name, isolate=True)
    assert prove_isolation_of(core, core, packed()) == "documents in a row do not see each other"
    assert core.training
    assert all(weight.grad is None for weight in core.parameters())
    if name != "eager":
        use_attention(core.model, name, isolate=False)
        with pytest.raises(UsageError, match=r"in the run's own rows.* by [\d.e+-]+ of itself"):
            prove_isolation_of(core, core, packed())


def test_a_leak_that_made_up_tokens_do_not_show_is_found_in_real_rows(monkeypatch):
    """A kernel that keeps two documents apart, and takes all further ones for the second."""
    found = attention._documents

    def two_at_most(position_ids):
        spans = list(found(position_ids))
        for row in range(len(position_ids)):
            mine = [(start, stop) for at, start, stop in spans if at == row]
            yield row, *mine[0]
            if len(mine) > 1:
                yield row, mine[1][0], mine[-1][1]

    monkeypatch.setattr(attention, "_documents", two_at_most)
    core = LossModule(model_of("llama", intermediate_size=64), CausalLM(), bf16=False)
    use_attention(core.model, "sdpa", isolate=True)
    prove_isolation(core.model)
    prove_isolation_of(core, core, packed(row_of(20)))
    with pytest.raises(UsageError, match="llama does not keep documents in a row apart"):
        prove_isolation_of(core, core, packed(row_of(10, 12, 20)))


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_what_one_token_of_a_neighbour_does_is_found_where_there_are_no_experts(model_type, monkeypatch):
    """A kernel by which the second document of many also sees the last token of the first: under 5 % of the whole."""
    found = attention._documents

    def one_token_more(position_ids):
        spans = list(found(position_ids))
        for at, (row, start, stop) in enumerate(spans):
            before, first = at > 0 and spans[at - 1][1] == 0, start == 0
            yield row, start - before, stop - first

    monkeypatch.setattr(attention, "_documents", one_token_more)
    fields = {"num_local_experts": 4, "num_key_value_heads": 2} if model_type == "mixtral" else {}
    core = LossModule(model_of(model_type, intermediate_size=64, **fields), CausalLM(), bf16=False)
    use_attention(core.model, "sdpa", isolate=True)
    examples = packed(row_of(*[5] * 96, length=481))
    if model_type == "mixtral":  # there as much may be rounding
        assert prove_isolation_of(core, core, examples) == "documents in a row do not see each other"
        return
    with pytest.raises(UsageError, match="in the run's own rows"):
        prove_isolation_of(core, core, examples)


def test_rows_of_one_document_cannot_show_isolation():
    core = LossModule(model_of("llama", intermediate_size=64), CausalLM(), bf16=False)
    assert "isolation was not seen" in prove_isolation_of(core, core, packed(row_of()))


def test_a_compiled_module_is_checked_as_it_is_and_not_compiled_again():
    core = LossModule(model_of("llama", intermediate_size=64), CausalLM(), bf16=False).train()
    use_attention(core.model, "compiled", isolate=True)
    core.compile(dynamic=False, backend="eager")  # what is looked at are its guards
    examples = packed(row_of(10, 1, 20), row_of(30, 3), row_of(5))
    batch = core.objective.collate(examples)
    core(batch).total.backward()
    core.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        prove_isolation_of(core, core, examples, compiled_rows=3)


# Save -> load -> the same.


def assert_nothing_left(folder):
    assert not list(folder.iterdir())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_models_come_back_from_disk_as_they_were(model_type, tied, tmp_path):
    fields = {
        "llama": {"intermediate_size": 64},
        "gpt2": {},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    }
    model = model_of(model_type, tie_word_embeddings=tied, **fields[model_type]).train()
    use_attention(model, "sdpa", isolate=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert "the logits are the same" in prove_saving(core_of(model), tmp_path)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tying_as_in_t5_is_no_obstacle(tied, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    config = AutoConfig.for_model("t5", **sizes, tie_word_embeddings=tied, decoder_start_token_id=0)
    assert "the logits are the same" in prove_saving(
        core_of(AutoModelForSeq2SeqLM.from_config(config)), tmp_path
    )


class Scaled(LlamaForCausalLM):
    """With a buffer that counts: saved or, by `_persistent`, forgotten."""

    _persistent = True

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.rand(()), persistent=self._persistent)

    def forward(self, *args, **kwargs):
        made = super().forward(*args, **kwargs)
        made.logits = made.logits * self.scale
        return made


class Forgetful(Scaled):
    _persistent = False


class NotWritten(LlamaForCausalLM):
    _keys_to_ignore_on_save = ["model.norm.weight"]


class NotContiguous(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = torch.nn.Parameter(torch.randn(32, 50).T)


def small(kind):
    torch.manual_seed(0)
    return kind(AutoConfig.for_model("llama", **SMALL, intermediate_size=64))


@pytest.mark.parametrize("kind", [Scaled, NotContiguous])
def test_a_buffer_and_a_transposed_weight_are_no_obstacle(kind, tmp_path):
    assert "the logits are the same" in prove_saving(core_of(small(kind)), tmp_path)


@pytest.mark.parametrize(
    ("kind", "said", "error"),
    [
        (Forgetful, r"a checkpoint, read back, computes other logits \(by", RunError),
        (NotWritten, r"the export, read back: missing keys .*model\.norm\.weight", UsageError),
    ],
)
def test_what_does_not_come_back_is_named(kind, said, error, tmp_path):
    with pytest.raises(error, match=said):
        prove_saving(core_of(small(kind)), tmp_path)
    assert_nothing_left(tmp_path)


def test_a_checkpoint_that_loses_a_tensor_is_refused(tmp_path, monkeypatch):
    """Norms are ones in every new model: without other values there, the loss of one would not show."""
    load = prove.Checkpoints.load

    def load_but_one(self, path, model, optimizer):
        kept = model.model.norm.weight.detach().clone()
        load(self, path, model, optimizer)
        with torch.no_grad():
            model.model.norm.weight.copy_(kept)

    monkeypatch.setattr(prove.Checkpoints, "load", load_but_one)
    with pytest.raises(RunError, match=r"has other values in model\.norm\.weight"):
        prove_saving(core_of(small(LlamaForCausalLM)), tmp_path)


def test_all_of_it_together(tmp_path):
    model = model_of("llama", intermediate_size=64).train()
    use_attention(model, "sdpa", isolate=True)
    core = LossModule(model, CausalLM(), bf16=False)
    rows = [row_of(10, 1, 20), row_of(30, 3)]
    options = {"tokenizer": TOKENIZER, "compiled_rows": None, "goal": goal_of("clm")}
    found = self_check(core, core, rows, isolate=True, folder=tmp_path, **options)
    assert [text.split(" of ")[0] for text in found] == [
        "96.1%",
        "the end",
        "documents in a row do not see each other",
        "saved and read back, all 21 tensors and the logits are the same",
    ]
    assert len(self_check(core, core, rows, isolate=False, folder=None, **options)) == 2
    use_attention(model, "sdpa", isolate=False)
    with pytest.raises(UsageError):
        self_check(core, core, rows, isolate=True, folder=None, **options)
