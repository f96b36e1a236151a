"""llmkit's own models and forms of weights made known to transformers, in whichever order the two are imported.

`import llmkit` must stay light, so nothing is imported for this: a hook waits until transformers loads the tables of
its Auto classes, and adds ours right then. Where they are loaded already, ours are added at once.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS: Mapping[str, str] = {
    "llmkit.models.configs:RecurrentConfig": "llmkit.models.recurrent:RecurrentForCausalLM",
    "llmkit.models.configs:ConvolutionConfig": "llmkit.models.convolution:ConvolutionForCausalLM",
    "llmkit.models.configs:NGramConfig": "llmkit.models.ngram:NGramForCausalLM",
}
"""Configuration -> the causal language model that it describes."""

QUANTIZERS: Mapping[str, tuple[str, str]] = {
    "llmkit_lowrank": ("llmkit.models.lowrank:LowRankConfig", "llmkit.models.lowrank:LowRankQuantizer")
}
"""`quant_method` in `config.json` -> what describes such weights, and what loads them."""


def register_on_import() -> None:
    """See to it that transformers knows `MODELS` as soon as its Auto classes are used."""
    waiting = {}
    for name, register in _TABLES.items():
        loaded = sys.modules.get(name)
        if loaded is None:
            waiting[name] = register
        else:
            register(loaded)
    if waiting and not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook(waiting))


def _load(place: str) -> type:
    module, name = place.split(":")
    found: type = getattr(import_module(module), name)
    return found


def _register_configs(auto: ModuleType) -> None:
    for config in map(_load, MODELS):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]


def _register_models(auto: ModuleType) -> None:
    for config, model in MODELS.items():
        auto.AutoModelForCausalLM.register(_load(config), _load(model), exist_ok=True)


def _register_quantizers(auto: ModuleType) -> None:
    for method, (config, quantizer) in QUANTIZERS.items():
        if method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantization_config(method)(_load(config))
            auto.register_quantizer(method)(_load(quantizer))


_TABLES: Mapping[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.quantizers.auto": _register_quantizers,
}


class _Hook(MetaPathFinder):
    """Finds nothing itself: it lets the others find, and acts when a module it waits for has been run."""

    def __init__(self, waiting: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self.waiting = dict(waiting)
        self.searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting or getattr(self.searching, "name", None) == fullname:
            return None
        self.searching.name = fullname  # so that the search below does not come here again
        try:
            spec = next((s for f in sys.meta_path if (s := f.find_spec(fullname, path, target))), None)
        finally:
            self.searching.name = None
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self._act)
        return spec

    def _act(self, module: ModuleType) -> None:
        # Only now: a module that was found need not be run, as when `importlib.util.find_spec` asks for it.
        act = self.waiting.pop(module.__name__, None)
        if act is not None:
            act(module)


class _Then(Loader):
    """A loader that does something more when the module has been run."""

    def __init__(self, loader: Loader, act: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.act = act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = (
            self.loader
        )  # the module keeps no trace of this one: sources are found as usual
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.act(module)
