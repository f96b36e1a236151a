"""Tasks of lm-evaluation-harness, asked of a model through `requests.py`: the harness's tasks, our own arithmetic.

Imported only where such a task is asked: the harness takes seconds to import, and to look through its own tasks many
more, so these are looked at only if a name is not among the user's.
"""

import contextlib
import fnmatch
import io
import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeGuard

import jinja2
import tqdm
import yaml
from datasets.exceptions import DatasetsError
from lm_eval import evaluator
from lm_eval.api.registry import aggregation_registry, metric_agg_registry, metric_registry
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedModel

from llmkit.errors import DataError, LlmkitError, MissingError, UsageError
from llmkit.evaluate.requests import Request, Scorer
from llmkit.hub import network_errors
from llmkit.registry import nearest

Told = Callable[[int], object]

_ROWS_AT_ONCE = 16
_TASK_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError),
    *(NotImplementedError, SyntaxError, TypeError, ValueError),
    *(DatasetsError, jinja2.TemplateError, yaml.YAMLError),
)
"""What the harness, and the code that task files may name, raise of a task that cannot be built or asked."""
_OURS = "llmkit.evaluate.requests"
"""Where what is raised is no task's fault."""
_ALONE = "DISABLE_MULTIPROC"
_KEY = re.compile(r"^(\w+)\s*:")


class HarnessModel(HFLM):
    """The harness's model of `transformers`; what it asks about likelihoods goes to our own scorer.

    Args:
        model: A causal or an encoder-decoder language model.
        tokenizer: Its tokenizer.
        device: `cpu`, `cuda` or `mps`.
        native: Whether our scorer answers; else the harness's own code does.
        bf16: Weights in bfloat16.
        batch_size: Rows that the harness's own code computes together: where it answers, and where text is written.
        told: Told how many requests our scorer has answered.

    Attributes:
        num_asked: Continuations that were asked for.
        num_cut: Those of them that the model does not read whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        device: str = "cpu",
        native: bool = True,
        bf16: bool = False,
        batch_size: int = _ROWS_AT_ONCE,
        told: Told = lambda _: None,
    ) -> None:
        model.eval()
        with _quiet():  # it warns of being given a model that is loaded already
            super().__init__(
                pretrained=model.to(device), tokenizer=tokenizer, batch_size=batch_size, device=device
            )
        self.num_asked, self.num_cut = 0, 0
        self._scorer: Scorer | None = None
        self._told = told
        if native:
            self._scorer = Scorer(model, tokenizer, device=device, bf16=bf16, longest=self.max_length)
        elif bf16:
            model.bfloat16()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """What the harness asks, all of it at once: context and continuation as token ids."""
        if self._scorer is None:
            found = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return list(found)
        asked = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        self.num_asked += len(requests)
        # The harness cuts the beginning of what is longer, as our scorer does; a token is only predicted.
        self.num_cut += sum(
            len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests
        )
        answers = [(answer.loglikelihood, answer.greedy) for answer in self._scorer.score(asked, self._told)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model; its own way asks the Hub, and this model is a folder."""
        return {
            "model_num_parameters": self._model.num_parameters(),
            "model_dtype": str(self._model.dtype),
            "model_revision": "",
            "model_sha": "",
        }


def find_tasks(names: Sequence[str], include: Path | None) -> tuple[TaskManager, list[str]]:
    """What knows the tasks, and their names.

    Args:
        names: Tasks, groups or tags, also as patterns.
        include: A folder with the user's task files.

    Raises:
        UsageError: There is no such task, or no such folder.
        DataError: A task file cannot be read; the message names its line.
    """
    if include is not None:
        broken = _broken_files(include)
        own = TaskManager(include_path=str(include), include_defaults=False)
        if not _unknown(names, own):
            _check_parts(names, own, broken)
            return own, _matches(names, own)
        for error in broken.values():  # what is not known may stand there
            raise error
    every = TaskManager(include_path=str(include) if include else None)
    unknown = _unknown(names, every)
    if unknown:
        guess = nearest(unknown[0], every.all_tasks)
        raise UsageError(
            f"lm-evaluation-harness has no task {unknown[0]!r}"
            + (f", and {include} holds none of that name" if include else ""),
            hint=f"did you mean {guess!r}?" if guess else "lm-eval ls tasks lists its own",
        )
    return every, _matches(names, every)


def _matches(names: Sequence[str], manager: TaskManager) -> list[str]:
    found = [task for name in names for task in sorted(fnmatch.filter(manager.all_tasks, name))]
    return list(dict.fromkeys(found))


def _unknown(names: Sequence[str], manager: TaskManager) -> list[str]:
    return [name for name in names if not fnmatch.filter(manager.all_tasks, name)]


def _check_parts(names: Sequence[str], manager: TaskManager, broken: Mapping[Path, DataError]) -> None:
    """Raise if a file is broken that these tasks stand in; of groups, whose parts may stand in any, if one is."""
    matches = _matches(names, manager)
    places = [_path_of(manager, name) for name in matches]
    plain = set(manager.all_subtasks) >= set(matches)
    for path, error in broken.items():
        if path in places or not plain:
            raise error


def _broken_files(folder: Path) -> dict[Path, DataError]:
    """The task files that the harness cannot read: it passes by them, and then knows no task of that name."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder", hint="eval.harness.include: the folder of your task files"
        )
    broken = {}
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            _check_file(path)
        except DataError as error:
            broken[path] = error
    return broken


def _check_file(path: Path) -> None:
    try:
        found = load_yaml(path, resolve_func=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
        raise DataError(f"{place}: {error.problem or error}", hint="repair the task file") from error
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path}: {_first_line(error)}", hint="repair the task file") from error
    if not isinstance(found, dict):
        raise DataError(
            f"{path}:1: a task file holds keys and values, such as `task: my_task`",
            hint="repair the task file, or take it out of the folder",
        )
    _check_metrics(path, found)


def _check_metrics(path: Path, task: Mapping[str, Any]) -> None:
    """Of a metric that it does not know, the harness says `KeyError: None`, after looking for it on the Hub."""
    given = task.get("metric_list")
    if not isinstance(given, list) or {"process_results", "class", "group"} & task.keys():
        return  # a task's own code names its metrics, and a group has none
    for one in (one for one in given if isinstance(one, dict)):
        name, way = one.get("metric"), one.get("aggregation")
        if _is_name(name) and name not in metric_registry and not one.get("hf_evaluate"):
            raise _unknown_name(path, "metric", name, metric_registry.keys())
        if _is_name(way) and way not in aggregation_registry:
            raise _unknown_name(path, "aggregation", way, aggregation_registry.keys())
        if _is_name(name) and way is None and name not in metric_agg_registry:
            raise DataError(
                f"{_line_with(path, name)}: metric {name!r} does not say how it is put together over the questions",
                hint=f"{{metric: {name}, aggregation: mean}}",
            )


def _is_name(value: object) -> TypeGuard[str]:
    return (
        isinstance(value, str) and not Path(value).is_absolute()
    )  # `!function` is read as the path of its code


def _unknown_name(path: Path, kind: str, name: str, known: Iterable[str]) -> DataError:
    guess = nearest(name, known)
    other = " (one of the library evaluate: add `hf_evaluate: true`)" if kind == "metric" else ""
    return DataError(
        f"{_line_with(path, name)}: the harness has no {kind} {name!r}",
        hint=(f"did you mean {guess!r}?" if guess else f"it has: {', '.join(sorted(known))}") + other,
    )


def _line_with(path: Path, name: str) -> str:
    """Where a file has a value; the file alone where that stands in one that it includes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = re.compile(rf":.*(?<![\w-]){re.escape(name)}(?![\w-])")
    return next((f"{path}:{number}" for number, line in enumerate(lines, 1) if found.search(line)), str(path))


def ask(
    model: HarnessModel,
    manager: TaskManager,
    names: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    resamples: int = 1000,
) -> tuple[dict[str, Any], list[str]]:
    """Ask a model tasks.

    Args:
        model: The model.
        manager: What knows the tasks.
        names: Their names.
        shots: Solved examples before each question; None: as the task says.
        limit: At most so many questions of each task.
        chat: Put questions into the chat template.
        resamples: Draws for the harness's own standard errors, of figures that need them.

    Returns:
        The harness's results, with samples, and what it warned of.

    Raises:
        DataError: A task cannot be built or asked; the message names its file and, where that can be told, its line.
        MissingError: Its data are out of reach.
    """
    with _quiet() as said:
        try:
            results = evaluator.simple_evaluate(
                model=model,
                tasks=list(names),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=resamples,
                log_samples=True,
            )
        except LlmkitError:
            raise
        except network_errors() as error:
            raise MissingError(
                f"the data of {', '.join(names)} are out of reach ({_first_line(error)})",
                hint="go online once, or give tasks on local data: eval.harness.include=FOLDER",
            ) from error
        except _TASK_ERRORS as error:
            if any(frame.f_globals.get("__name__") == _OURS for frame in _frames(error)):
                raise
            raise _of_task(error, manager, _blamed(error) or names, said) from error
    assert results is not None
    return dict(results), said


def _frames(error: BaseException) -> list[FrameType]:
    """What was running when it was raised, the innermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def _blamed(error: BaseException) -> list[str]:
    """The task that the harness was building or asking, as far as what was running shows it."""
    held = [frame.f_locals.get(name) for frame in _frames(error) for name in ("self", "task")]
    return [str(task.config.task) for task in held if isinstance(task, Task) and task.config.task][:1]


def _of_task(error: Exception, manager: TaskManager, names: Sequence[str], said: Sequence[str]) -> DataError:
    """Which task file is to blame, as far as it can be told."""
    paths = [path for name in names if (path := _path_of(manager, name)) is not None]
    place = next((where for path in paths if (where := _line_of(path, error))), "") or ", ".join(
        map(str, paths)
    )
    place, tasks = place or ", ".join(names), ", ".join(names)
    if isinstance(error, DatasetsError):
        files = [path for text in said for path in re.findall(r"'([^']+)'", text) if Path(path).is_file()]
        return DataError(
            f"{_broken_line(Path(files[0])) if files else place}: the data of {tasks} cannot be read "
            f"({_first_line(error.__cause__ or error)})",
            hint=f"repair the data, or what {place} says of them",
        )
    return DataError(
        f"{place}: the harness cannot ask {tasks} ({type(error).__name__}: {_first_line(error)})",
        hint="repair the task file",
    )


def _broken_line(path: Path) -> str:
    """Where a file of JSON lines is none."""
    for number, line in enumerate(path.read_bytes().splitlines() if path.suffix == ".jsonl" else (), 1):
        try:
            json.loads(line)
        except ValueError:
            return f"{path}:{number}"
    return str(path)


def _path_of(manager: TaskManager, name: str) -> Path | None:
    entry = manager.task_index.get(name)
    return entry.yaml_path if entry is not None else None


def _line_of(path: Path, error: Exception) -> str:
    """The line of the key that the error speaks of: by its name, by the template that is its value, or by what ran."""
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = {key[1]: number for number, line in enumerate(lines, 1) if (key := _KEY.match(line))}
    ran = [frame.f_code.co_name for frame in _frames(error)]
    if isinstance(error, DatasetsError):
        ran = ["dataset_kwargs", "dataset_path"]
    elif isinstance(error, jinja2.TemplateSyntaxError):
        ran = []  # what asked for the template may not be what has it
    if numbers := [keys[name] for name in ran if name in keys]:
        return f"{path}:{numbers[0]}"
    template = isinstance(error, jinja2.TemplateError)
    for number, line in enumerate(lines, 1):
        key = _KEY.match(line)
        broken = template and "{" in line and not _is_template(line)
        if broken or (key is not None and re.search(rf"\b{key[1]}\b", str(error)) and key[1] != "task"):
            return f"{path}:{number}"
    return ""


def _is_template(text: str) -> bool:
    try:
        jinja2.Environment(autoescape=False).parse(text)  # noqa: S701 - nothing is rendered
    except jinja2.TemplateSyntaxError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


_LOGGERS = ("lm_eval", "datasets", "transformers.tokenization_utils_base")
_NOTHING_TO_WARN_OF = ("using default", "Token indices sequence length is longer", "tokens from the left")
"""In what is said of every task file that leaves something to the harness, and of long requests: these are counted."""


class _Heard(logging.Handler):
    """Keeps what is warned of, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        if text not in self.said and not any(known in text for known in _NOTHING_TO_WARN_OF):
            self.said.append(text)


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """The harness prints, logs, draws bars, asks git for its commit and starts processes that would take our signals.

    What it warns of is kept, and standard output stays ours.
    """
    loggers, heard = [logging.getLogger(name) for name in _LOGGERS], _Heard()
    before, drawn = [(logger.level, logger.propagate) for logger in loggers], tqdm.tqdm.__init__
    commit, alone = evaluator.get_git_commit_hash, os.environ.get(_ALONE)
    for logger in loggers:
        logger.addHandler(heard)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    tqdm.tqdm.__init__ = lambda bar, *given, **more: drawn(bar, *given, **{**more, "disable": True})
    evaluator.get_git_commit_hash = lambda: None
    os.environ[_ALONE] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield heard.said
    finally:
        tqdm.tqdm.__init__ = drawn
        evaluator.get_git_commit_hash = commit
        if alone is None:
            del os.environ[_ALONE]
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(heard)
            logger.setLevel(level)
            logger.propagate = propagate


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The harness's figures as rows: `task`, `metric`, `value`, `stderr`, `num`; `filter` where that is not `none`."""
    rows = []
    for task, figures in results["results"].items():
        num = results.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in figures.items():
            metric, _, way = name.partition(",")
            if not way or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{way}")
            row = {"task": task, "metric": metric, "value": float(value), "num": num}
            row["stderr"] = float(stderr) if isinstance(stderr, int | float) else None
            rows.append(row if way == "none" else {**row, "filter": way})
    return rows
