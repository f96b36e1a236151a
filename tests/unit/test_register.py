"""llmkit's models are known to transformers in whichever order the modules are looked for and imported."""

import subprocess
import sys

import pytest

_KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("llmkit-cnn", hidden_size=8, num_hidden_layers=1, vocab_size=9)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""


@pytest.mark.parametrize(
    "before",
    [
        "import importlib.util\n"
        "assert importlib.util.find_spec('transformers.models.auto.configuration_auto')\n"
        "assert importlib.util.find_spec('transformers.models.auto.modeling_auto')",
        "",
    ],
    ids=["looked for before", "at once"],
)
def test_the_hook_waits_until_the_tables_are_run(before: str) -> None:
    code = f"import llmkit\n{before}\n{_KNOWN}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.split() == ["ConvolutionForCausalLM"], done.stderr[-2000:]


def test_it_acts_once_and_only_when_the_module_is_run(tmp_path, monkeypatch) -> None:
    import importlib.util

    from llmkit.register import _Hook

    (tmp_path / "waited_for.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    hook = _Hook({"waited_for": lambda module: seen.append(module.value)})
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "waited_for", raising=False)
    assert importlib.util.find_spec("waited_for") is not None
    assert importlib.util.find_spec("waited_for") is not None
    assert seen == []
    found = importlib.import_module("waited_for")
    assert seen == [3]
    assert type(found.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(found)
    assert seen == [3]
    monkeypatch.delitem(sys.modules, "waited_for")
