"""Nothing of llmkit changes the disk but the door (`llmkit/durable`), and a list of places that say why they may."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmkit

ROOT = Path(llmkit.__file__).parent

FILLS = "fills a folder of `write_folder`, which brings it to the disk and publishes it"
LOG = "appends lines for people; nothing reads them back"
PRIVATE = "a private folder or file that is gone when the process is"
TRIAL = "runs of `verify-resume`, in a scratch folder of the door: what a kill leaves, the next one sweeps"

ALLOWED = {
    # Fills what the door publishes.
    "compress/export.py _moving.write shutil.move": FILLS,
    "compress/export.py _write_sixteen model.save_pretrained": FILLS,
    "data/npy.py NpyWriter.__init__ path.open": FILLS,
    "data/prepare.py _take shutil.copyfile": FILLS,
    "data/prepare.py publish_tokenizer shutil.copyfile": FILLS,
    "data/prepared.py _Builder._build np.save": FILLS,
    "data/prepared.py _Builder._build write_text": FILLS,
    "data/prepared.py _Builder._strip np.save": FILLS,
    "data/sample.py SampleWork._fill mkdir": FILLS,
    "data/texts.py TextWriter.__init__ open": FILLS,
    "data/tokenizers/load.py save_tokenizer tokenizer.save_pretrained": FILLS,
    "data/tokenizers/load.py save_tokenizer path.write_text": FILLS,
    "data/tokenizers/special.py write_tokenizer tokenizer.save": FILLS,
    "data/tokenizers/special.py write_tokenizer write_text": FILLS,
    "models/save.py save_model model.save_pretrained": FILLS,
    "compress/packed.py write_packed model.save_pretrained": FILLS,
    "compress/packed.py write_packed write_text": FILLS,
    "run/compression/artefacts.py copy_companions mkdir": FILLS,
    "run/compression/artefacts.py copy_companions shutil.copyfile": FILLS,
    "run/compression/artefacts.py save_like save_pretrained": FILLS,
    "models/adapter_files.py save_adapter config.save_pretrained": FILLS,
    "models/adapter_files.py save_adapter save_file": FILLS,
    "train/checkpoint.py Checkpoints.write save_file": FILLS,
    "train/sharded.py _PieceWriter._write_part save_file": FILLS,
    "train/own.py OwnWriter._write save_file": FILLS,
    # Never read by a later run.
    "launch/local.py run_local_workers logs.mkdir": LOG,
    "launch/local.py _start log.open": LOG,
    "run/sweep.py _Sweep._start open": LOG,
    "data/cluster.py _Worker.__init__ open": LOG,
    "launch/hub.py Hub.run mkdir": LOG,
    "launch/local.py run_alone tempfile.TemporaryDirectory": PRIVATE,
    "compress/export.py apply tempfile.TemporaryDirectory": PRIVATE,
    "compress/export.py _made save_pretrained": PRIVATE,
    "compress/onnx_export.py _quantise left.unlink": PRIVATE,
    "data/tables.py _seekable tempfile.TemporaryFile": PRIVATE,
    "data/files.py spool_stdin text.open": "standard input, into a scratch folder; moved to a folder of the door",
    "data/files.py spool_stdin text.rename": FILLS,
    "data/cluster.py _Worker.__init__ path.open": "work for a process that is started at once and reads it then",
    "run/verify.py _Trial.keep unlink": TRIAL,
    "run/verify.py _Trial.keep path.rename": TRIAL,
    "run/verify.py _Trial._run symlink_to": TRIAL,
    "run/verify.py _Trial._run open": TRIAL,
    "run/verify.py _copy shutil.copytree": TRIAL,
    # What is not a run's.
    "cli/output.py close_quietly os.open": "the null device",
}
"""File, function and call -> why it may. Whoever adds one shows that a kill, a full disk and a power cut do no harm."""

WRITING_METHODS = {
    *("write_text", "write_bytes", "unlink", "rename", "rmdir", "mkdir", "touch", "chmod", "symlink_to"),
    *(
        "hardlink_to",
        "tofile",
        "save_pretrained",
        "save_file",
        "save_to_disk",
        "to_parquet",
        "to_csv",
        "to_json",
    ),
    *(
        "to_pickle",
        "save_model",
        "savetxt",
        "savez",
        "savez_compressed",
        "open_memmap",
        "extractall",
        "truncate",
    ),
}
WRITING_FUNCTIONS = {
    "os": {
        *(
            "remove",
            "unlink",
            "rename",
            "renames",
            "replace",
            "rmdir",
            "removedirs",
            "mkdir",
            "makedirs",
            "open",
        ),
        *("link", "symlink", "truncate", "chmod", "mkfifo", "fsync", "fdatasync"),
    },
    "shutil": {
        "rmtree",
        "move",
        "copy",
        "copy2",
        "copyfile",
        "copytree",
        "copymode",
        "make_archive",
        "chown",
    },
    "tempfile": {"TemporaryDirectory", "TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile"}
    | {"mkdtemp", "mkstemp"},
    "np": {"save"},
    "torch": {"save"},
    "json": {"dump"},
    "pickle": {"dump"},
    "yaml": {"dump"},
}
NAMES = {"save_file", "rmtree", "copyfile", "copytree", "mkdtemp", "mkstemp", "NamedTemporaryFile"}
SAVED_BY_NAME = ("tokenizer", "model", "image", "figure")
"""What has a method `save` that writes a file of its own."""


def changes(source: str) -> Iterator[tuple[str, str, int]]:
    """Function, call and line of each place that creates, writes, renames or removes files."""
    yield from _below(ast.parse(source), ())


def _below(node: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        inside = (*inside, node.name)
    if isinstance(node, ast.Call) and _writes(node):
        yield ".".join(inside), _name(node.func), node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _below(child, inside)


def _name(function: ast.expr) -> str:
    if not isinstance(function, ast.Attribute):
        return ast.unparse(function)
    owner = function.value
    return f"{owner.id}.{function.attr}" if isinstance(owner, ast.Name) else function.attr


def _writes(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in NAMES or (function.id == "open" and _mode_writes(call, 1))
    if not isinstance(function, ast.Attribute):
        return False
    owner, attribute = ast.unparse(function.value), function.attr
    if (owner, attribute) == ("np", "memmap"):
        modes = [*call.args[2:3], *(word.value for word in call.keywords if word.arg == "mode")]
        return not any(isinstance(mode, ast.Constant) and mode.value in ("r", "c") for mode in modes)
    if owner in WRITING_FUNCTIONS:
        return attribute in WRITING_FUNCTIONS[owner]
    if attribute == "open":
        # `Path.open` has its mode first, others (`gzip.open`, file systems) second. A class's own `open` reads.
        return not owner[0].isupper() and (_mode_writes(call, 0) or _mode_writes(call, 1))
    if attribute == "replace":  # of a path; that of a text has two arguments
        return len(call.args) == 1 and not call.keywords
    if attribute == "save":
        return owner.split(".")[-1] in SAVED_BY_NAME
    return attribute in WRITING_METHODS


def _mode_writes(call: ast.Call, place: int) -> bool:
    given = [word.value for word in call.keywords if word.arg == "mode"] or call.args[place : place + 1]
    if not given:
        return False
    mode = given[0]
    if isinstance(mode, ast.Constant):
        return isinstance(mode.value, str) and len(mode.value) < 5 and bool(set(mode.value) & set("wax+"))
    return isinstance(mode, ast.IfExp)


def found_in(root: Path) -> dict[str, int]:
    """Every place outside the door -> its line."""
    return {
        f"{path.relative_to(root).as_posix()} {function} {call}": line
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0] != "durable"
        for function, call, line in changes(path.read_text())
    }


def test_nothing_but_the_door_changes_the_disk():
    new = {place: line for place, line in found_in(ROOT).items() if place not in ALLOWED}
    assert not new, (
        "these write, rename or remove files themselves: use llmkit.durable, or add them to ALLOWED with the reason:\n"
        + "\n".join(f"  {place} (line {line})" for place, line in new.items())
    )


def test_the_list_holds_nothing_that_is_gone():
    assert sorted(set(ALLOWED) - set(found_in(ROOT))) == []


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('x')",
        "path.open('r+b')",
        "gzip.open(path, 'wt')",
        "(folder / 'x').write_text('')",
        "path.replace(other)",
        "path.rename(other)",
        "os.replace(a, b)",
        "shutil.rmtree(path)",
        "np.save(path, array)",
        "np.memmap(path, dtype)",
        "save_file(tensors, path)",
        "torch.save(state, path)",
        "model.save_pretrained(path)",
        "tokenizer.save(path)",
        "json.dump(value, file)",
        "array.tofile(path)",
        "path.parent.mkdir(parents=True)",
        "path.unlink(missing_ok=True)",
    ],
)
def test_the_check_sees(line):
    assert [name for name, _, _ in changes(f"def f():\n    {line}\n")] == ["f"]


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        "open(path, 'rb')",
        "path.open('rb', buffering=0)",
        "text.replace('w', 'x')",
        "replace(plan, attention=name)",
        "dataclasses.replace(plan, attention=name)",
        "TokenShards.open(folder)",
        "np.load(path, mmap_mode='r')",
        "np.memmap(path, dtype, mode='r')",
        "json.dumps(value)",
        "checkpoints.save(model, optimizer, state)",
    ],
)
def test_the_check_leaves_readers_alone(line):
    assert list(changes(line)) == []
