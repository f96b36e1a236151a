"""llmkit's own networks: against torch.nn's cells and convolutions by hand; documents, padding, generation, saving."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import llmkit  # noqa: F401  # makes them known to transformers
from llmkit.models.cross_entropy import linear_cross_entropy
from llmkit.models.stateful import State

VOCABULARY = 50
KINDS = {
    "rnn": {"model_type": "llmkit-recurrent", "cell": "rnn"},
    "lstm": {"model_type": "llmkit-recurrent", "cell": "lstm", "embedding_size": 8},
    "gru": {
        "model_type": "llmkit-recurrent",
        "cell": "gru",
        "embedding_size": 8,
        "tie_word_embeddings": False,
    },
    "cnn": {"model_type": "llmkit-cnn", "kernel_size": 3},
}
POSITIONS = torch.tensor(
    [[0, 1, 2, 3, *range(8)], [*range(3), *range(9)], [*range(12)], [0, 0, 0, *range(9)]]
)
DOCUMENTS = [(0, 0, 4), (0, 4, 12), (1, 0, 3), (1, 3, 12), (2, 0, 12), (3, 1, 2), (3, 2, 3), (3, 3, 12)]


def build(kind, seed=0, **more):
    fields = {**KINDS[kind], "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCABULARY, **more}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()


def ids(rows=4, length=12, seed=1):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def hidden(model, *words, **more):
    return model.model(*words, **more).last_hidden_state


# --- the numbers ---


def lstm_by_hand(layer, inputs_TE, weights):
    """One layer of an LSTM over one row (Hochreiter and Schmidhuber 1997, with torch's order of the gates)."""
    w_ih, w_hh, b_ih, b_hh = weights
    h = c = torch.zeros(layer)
    outputs = []
    for x in inputs_TE:
        i, f, g, o = (w_ih @ x + b_ih + w_hh @ h + b_hh).split(layer)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs)


def gru_by_hand(layer, inputs_TE, weights):
    """One layer of a GRU over one row (Cho et al. 2014, with the reset gate after the product, as torch has it)."""
    w_ih, w_hh, b_ih, b_hh = weights
    h = torch.zeros(layer)
    outputs = []
    for x in inputs_TE:
        xr, xz, xn = (w_ih @ x + b_ih).split(layer)
        hr, hz, hn = (w_hh @ h + b_hh).split(layer)
        z = torch.sigmoid(xz + hz)
        h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        outputs.append(h)
    return torch.stack(outputs)


def rnn_by_hand(layer, inputs_TE, weights):
    """One layer of Elman's network over one row."""
    w_ih, w_hh, b_ih, b_hh = weights
    h = torch.zeros(layer)
    outputs = []
    for x in inputs_TE:
        h = torch.tanh(w_ih @ x + b_ih + w_hh @ h + b_hh)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("kind", "one_layer"), [("rnn", rnn_by_hand), ("lstm", lstm_by_hand), ("gru", gru_by_hand)]
)
@torch.no_grad()
def test_cells_are_the_equations_of_their_papers(kind, one_layer):
    model = build(kind)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.3)
    inputs, cells = model.model.embed_tokens(ids(1)[0]), model.model.cells
    for number in range(2):
        inputs = one_layer(16, inputs, [getattr(cells, f"{name}_l{number}") for name in
                                        ("weight_ih", "weight_hh", "bias_ih", "bias_hh")])  # fmt: skip
    logits = model.lm_head(model.model.project(inputs))
    assert torch.allclose(model(ids(1)).logits[0], logits, atol=1e-5)


@torch.no_grad()
def test_gated_convolutions_are_conv1d_and_a_gate():
    model = build("cnn")
    x_1TH = model.model.embed_tokens(ids(1))
    for layer in model.model.layers:
        weight = layer.mix.weight.unflatten(1, (3, 16)).transpose(1, 2)  # [2H, K, H] -> torch's [2H, H, K]
        before = functional.pad(functional.layer_norm(x_1TH, (16,)).transpose(1, 2), (2, 0))
        a, b = functional.conv1d(before, weight, layer.mix.bias).transpose(1, 2).chunk(2, -1)
        x_1TH = x_1TH + a * torch.sigmoid(b)
    expected = functional.linear(functional.layer_norm(x_1TH, (16,)), model.model.embed_tokens.weight)
    assert torch.allclose(model(ids(1)).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_what_comes_after_it(kind):
    model, row = build(kind), ids(1)
    changed = row.clone()
    changed[0, 7] = (row[0, 7] + 1) % VOCABULARY
    a, b = hidden(model, row)[0], hidden(model, changed)[0]
    assert torch.equal(a[:7], b[:7])
    assert not torch.allclose(a[7], b[7], atol=1e-4)


def test_a_convolution_reaches_as_far_back_as_it_says():
    model, row = build("cnn"), ids(1)  # 2 layers of kernel 3: 5 positions
    changed = row.clone()
    changed[0, 2] = (row[0, 2] + 1) % VOCABULARY
    differs = (hidden(model, row) != hidden(model, changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_an_lstms_state_is_carried_through_the_row():
    model, row = build("lstm"), ids(1)
    changed = row.clone()
    changed[0, 0] = (row[0, 0] + 1) % VOCABULARY
    assert (hidden(model, row) != hidden(model, changed)).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_over_the_labels(kind):
    model, rows = build(kind), ids()
    labels = rows.masked_fill(rows % 5 == 0, -100)
    output = model(rows, labels=labels)
    total = linear_cross_entropy(
        hidden(model, rows)[:, :-1].flatten(0, 1), model.lm_head.weight, labels[:, 1:].flatten()
    )
    assert output.loss.item() == pytest.approx((total / (labels[:, 1:] != -100).sum()).item(), rel=1e-6)


# --- documents that share a row ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_in_a_row_is_as_alone(kind):
    model, rows = build(kind), ids()
    together = hidden(model, rows, position_ids=POSITIONS)
    for row, start, stop in DOCUMENTS:
        alone = hidden(model, rows[row : row + 1, start:stop])[0]
        assert torch.allclose(together[row, start:stop], alone, atol=1e-6)
    assert not torch.allclose(together, hidden(model, rows), atol=1e-3), "the positions make a difference"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_one_document_reaches_another(kind):
    model, rows = build(kind), ids()
    embedded = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: embedded.append(output.requires_grad_()) or output
    )
    hidden(model, rows, position_ids=POSITIONS)[0, 4:].square().sum().backward(inputs=embedded)
    assert embedded[0].grad[0, :4].abs().max() == 0
    assert embedded[0].grad[0, 4:].abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_packed_rows_are_those_of_the_documents(kind):
    model, rows = build(kind), ids()
    probe = torch.randn(model.lm_head.in_features, generator=torch.Generator().manual_seed(2))
    (hidden(model, rows, position_ids=POSITIONS).tanh() @ probe).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, start, stop in [*DOCUMENTS, (3, 0, 1)]:
        (hidden(model, rows[row : row + 1, start:stop]).tanh() @ probe).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(packed[name], p.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_only_count_up_change_nothing(kind):
    model, rows = build(kind), ids()
    plain = hidden(model, rows)
    assert torch.equal(hidden(model, rows, position_ids=torch.arange(12).expand(4, -1)), plain)
    assert torch.equal(hidden(model, rows, position_ids=torch.arange(12)[None]), plain)


# --- a text that goes on ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_in_pieces_is_as_whole(kind):
    model, rows = build(kind), ids()
    first = model.model(rows[:, :5], use_cache=True)
    second = hidden(model, rows[:, 5:], state=first.state)
    assert torch.allclose(torch.cat([first.last_hidden_state, second], 1), hidden(model, rows), atol=1e-6)
    assert model.model(rows).state is None


@pytest.mark.parametrize("kind", KINDS)
def test_documents_end_within_a_row_that_goes_on(kind):
    model, rows = build(kind), ids()
    first = model.model(rows[:, :3], position_ids=POSITIONS[:, :3], use_cache=True)
    second = hidden(model, rows[:, 3:], position_ids=POSITIONS[:, 3:], state=first.state)
    whole = hidden(model, rows, position_ids=POSITIONS)
    assert torch.allclose(torch.cat([first.last_hidden_state, second], 1), whole, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_as_nothing(kind):
    model, rows = build(kind), ids(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 0, 0, 0]])
    padded = model.model(rows, attention_mask=mask, use_cache=True)
    for row, (start, stop) in enumerate([(2, 6), (0, 6), (0, 3)]):
        alone = model.model(rows[row : row + 1, start:stop], use_cache=True)
        assert torch.allclose(
            padded.last_hidden_state[row, start:stop], alone.last_hidden_state[0], atol=1e-6
        )
        if row < 2:  # where a row ends with padding, a convolution's state holds that, as zeros
            for a, b in zip(padded.state.parts, alone.state.parts, strict=True):
                assert torch.allclose(a[:, row], b[:, 0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_with_and_without_the_state_is_the_same(kind, options):
    model = build(kind)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # decided enough that rounding cannot turn the choice
    prompts = torch.tensor([[1, 1, 5, 6, 7], [9, 8, 7, 6, 5]])
    given = {
        "attention_mask": (prompts != 1).long(),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 1,
    }
    cached = model.generate(prompts, **given, **options)
    assert torch.equal(cached, model.generate(prompts, use_cache=False, **given, **options))
    alone = model.generate(prompts[:1, 2:], max_new_tokens=12, do_sample=False, pad_token_id=1, **options)
    assert torch.equal(cached[0, 2:], alone[0])
    assert len(set(cached[1, 5:].tolist())) > 1


def test_generation_reads_each_token_once():
    model, lengths = build("lstm"), []
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, _: lengths.append(inputs[0].shape[1])
    )
    model.generate(ids(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert lengths == [5, 1, 1, 1]


def test_beams_take_their_states_along():
    state = State((torch.arange(6.0).reshape(1, 3, 2),))
    state.reorder_cache(torch.tensor([2, 0, 0]))
    assert state.parts[0][0].tolist() == [[4, 5], [0, 1], [0, 1]]


def test_an_answer_without_names_is_refused():
    with pytest.raises(ValueError, match="return_dict"):
        build("rnn")(ids(), return_dict=False)
    with pytest.raises(ValueError, match="there are rnn, lstm, gru"):
        build("lstm", cell="lstn")


# --- beginning, saving, loading ---


def test_weights_begin_as_stated():
    model = build("lstm", hidden_size=64)
    cells = model.model.cells
    for gate in cells.weight_hh_l1.detach().split(64):
        assert torch.allclose(gate @ gate.T, torch.eye(64), atol=1e-5)
    gates = cells.bias_ih_l0.detach().split(64)
    assert [gate.unique().tolist() for gate in gates] == [[0], [1], [0], [0]]
    assert cells.bias_hh_l0.abs().max() == 0
    assert 0 < cells.weight_ih_l0.abs().max() <= 64**-0.5
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.3, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_to_the_last_bit(kind, tmp_path):
    model = build(kind, dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict().items() >= {"dropout": 0.1, "hidden_size": 16}.items()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(model(ids()).logits, loaded(ids()).logits)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == (kind != "gru")


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind):
    model = build(kind, dropout=0.5)
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near(kind):
    model = build(kind)
    with torch.autocast("cpu", torch.bfloat16):
        rough = hidden(model, ids(), position_ids=POSITIONS)
    assert torch.allclose(rough.float(), hidden(model, ids(), position_ids=POSITIONS), atol=0.05)


LOADS = """
import sys
{imports}
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, AutoConfig.from_pretrained(sys.argv[1]).cell)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import llmkit; assert not {'torch', 'transformers'} & set(sys.modules); import transformers.modeling_utils",
        "from transformers import LlamaForCausalLM; import llmkit",
    ],
)
def test_transformers_knows_them_in_either_order_of_importing(imports, tmp_path):
    build("gru").save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOADS.format(imports=imports), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["RecurrentForCausalLM", "gru"], done.stderr


def test_torchs_cells_are_used_for_whole_rows(monkeypatch):
    """Speed: one call of torch's cells a batch, whatever its documents, and none a step."""
    calls = []
    forward = nn.LSTM.forward
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, *words: calls.append(1) or forward(self, *words))
    model = build("lstm")
    hidden(model, ids())
    hidden(model, ids(), position_ids=POSITIONS)
    assert len(calls) == 2
