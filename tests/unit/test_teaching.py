"""A teacher that is asked once: parts are whole or absent, go on where they were, and belong to their rows."""

import numpy as np
import objectives
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from llmkit.data import taught
from llmkit.data.loader import MicroBatches
from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.data.taught import TaughtBatches, TaughtStore, made_up
from llmkit.errors import CorruptError, InterruptedRunError, RunError
from llmkit.objectives.taught import Taught
from llmkit.plan import layout_of
from llmkit.recipe.objectives import Cache, Distil
from llmkit.report.console import make_reporter
from llmkit.train import teaching
from llmkit.train.teaching import Asking, teach

STEP, MICRO, TOP_K = 4, 2, 8


class Setting:
    """An objective, its rows and a teacher of its kind."""

    def __init__(self, objective):
        build = {"clm": AutoModelForCausalLM, "mlm": AutoModelForMaskedLM}[objective]
        kind = {"clm": "causal", "mlm": "masked"}[objective]
        outputs = len(objectives.tokenizer(objective))
        base = objectives.make(objective)
        settings = Distil(teacher="t", cache=Cache(top_k=TOP_K))
        self.objective = Taught(base, settings, top_k=TOP_K, outputs=outputs)
        fields = dict(objectives.TINY[kind])
        torch.manual_seed(2)
        self.teacher = build.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields, vocab_size=outputs)
        ).eval()
        layout = layout_of(objectives.section(objective))
        rows = Rows([objectives.Text(objective)], layout.stride, overlap=layout.overlap)
        rows.sizes = [10]  # a few, so that epochs are short
        self.batches = MicroBatches(
            rows,
            RowOrder(rows.sizes, None, seed=7),
            rows_per_step=STEP,
            micro_batch_size=MICRO,
            encode=self.objective.encode,
        )
        self.outputs = outputs

    def store(self, folder, by, num_keys=10):
        return TaughtStore(folder, by, num_keys, rows_a_part=3, top_k=TOP_K, outputs=self.outputs)

    def teach(self, store, *, stop=lambda: 0, load=None, reporter=None):
        asking = Asking(store, self.objective, self.batches, bf16=False, stop=stop)
        reporter = reporter or make_reporter(quiet=True)
        teach(asking, load or (lambda: self.teacher), Accelerator(cpu=True), reporter, num_bytes=1000)


@pytest.fixture(params=["clm", "mlm"])
def setting(request):
    return Setting(request.param)


def contents(folder):
    """Every file of the parts, by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if "lock" not in p.name and p.is_file()
    }


def never():
    raise AssertionError("the teacher was loaded")


class Asked:
    """Asks to stop from the n-th time on."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return 15 if self.left < 0 else 0


@pytest.mark.parametrize("by", ["row", "position"])
def test_interrupted_it_goes_on_with_what_is_missing_and_ends_with_the_same_bytes(
    setting, tmp_path, by, monkeypatch
):
    monkeypatch.setattr(teaching, "_TOKENS", 80)  # two rows at a time
    whole, other = setting.store(tmp_path / "whole", by), setting.store(tmp_path / "other", by)
    setting.teach(whole)
    with pytest.raises(InterruptedRunError, match=r"stopped by SIGTERM .* kept"):
        setting.teach(other, stop=Asked(4))
    kept = {path.name: path.stat().st_ino for path in other.folder.glob("part-*")}
    assert 0 < len(kept) < whole.num_parts
    setting.teach(other)
    assert contents(other.folder) == contents(whole.folder)
    assert {name: other.folder.joinpath(name).stat().st_ino for name in kept} == kept
    setting.teach(setting.store(tmp_path / "whole", by), load=never)


def test_a_longer_run_adds_to_what_a_shorter_one_left_and_a_shorter_one_takes_it(setting, tmp_path):
    setting.teach(setting.store(tmp_path / "whole", "position", 14))
    setting.teach(setting.store(tmp_path / "grown", "position", 7))
    before = contents(tmp_path / "grown")
    setting.teach(setting.store(tmp_path / "grown", "position", 14))
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")
    assert before.keys() < contents(tmp_path / "grown").keys()
    setting.teach(setting.store(tmp_path / "grown", "position", 7), load=never)


def test_a_damaged_part_is_found_and_made_again(setting, tmp_path):
    store = setting.store(tmp_path / "store", "row")
    setting.teach(store)
    whole = contents(store.folder)
    path = store.part(1) / "logs.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    said = []
    reporter = make_reporter(quiet=True)
    reporter.warn = said.append
    setting.teach(setting.store(tmp_path / "store", "row"), reporter=reporter)
    assert contents(store.folder) == whole
    assert len(said) == 1
    assert "logs.npy" in said[0]


def test_what_does_not_fit_on_the_disk_is_refused_before_the_teacher_is_loaded(
    setting, tmp_path, monkeypatch
):
    class Usage:
        free = 999

    monkeypatch.setattr(teaching.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(RunError, match=r"takes about 1.0 kB, and 999 B are free"):
        setting.teach(setting.store(tmp_path / "store", "row"), load=never)


@pytest.mark.parametrize(("name", "by"), [("clm", "row"), ("clm", "position"), ("mlm", "position")])
def test_each_target_of_each_step_meets_what_the_teacher_says_of_it(tmp_path, name, by):
    """Over two epochs; where chance hides tokens, what it hid this time."""
    setting = Setting(name)
    store = setting.store(tmp_path / "store", by, 10 if by == "row" else 20)
    setting.teach(store)
    batches = TaughtBatches(setting.batches, store)
    for step in range(5):
        for _, examples in batches.of_step(step):
            for example in examples:
                plain = {name: value for name, value in example.items() if not name.startswith("taught")}
                (said,) = setting.objective.ask(setting.teacher, [plain])
                assert len(said) == (example["targets"] != -100).sum() > 0
                assert np.array_equal(example[taught.IDS], said.ids_LK)
                assert np.allclose(example[taught.LOGS], said.logs_LK, atol=1e-5)
                assert np.allclose(example[taught.REST], said.rest_L, atol=1e-4)
            batch = setting.objective.collate(examples)
            count = int(batch["num_targets"])
            lines = np.concatenate([example[taught.REST] for example in examples])
            assert np.array_equal(batch[taught.REST][:count].numpy(), lines)
            assert batch[taught.IDS].shape == (batch["targets"].numel(), TOP_K)


def test_what_was_kept_of_other_rows_is_refused():
    one = TaughtBatches.__new__(TaughtBatches)
    one._store = type("Store", (), {"by": "row", "folder": "f", "lines": lambda self, key: _lines(2)})()
    with pytest.raises(CorruptError, match="2 lines are kept of row 5, which has 3 targets"):
        one._taught({"targets": np.array([1, -100, 2, 3])}, 5)


def _lines(count):
    return taught.Lines(np.zeros((count, 2)), np.zeros((count, 2), np.float32), np.zeros(count, np.float32))


def test_lines_that_are_made_up_have_the_size_of_true_ones_and_sum_to_one():
    made = made_up({"targets": np.array([1, -100, 2])}, 4, 10)
    assert made[taught.IDS].shape == (2, 4)
    total = np.exp(made[taught.LOGS]).sum(1) + np.exp(made[taught.REST])
    assert total == pytest.approx(np.ones(2), abs=1e-6)
