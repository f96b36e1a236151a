"""What llmkit promises about trust: no code and no pickle of others runs, and no secret reaches a file."""

import ast
import base64
import io
import json
import os
import shlex
import stat
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from training import pretrain
from transformers import AutoConfig, AutoModelForCausalLM

import llmkit
from llmkit.data.hub import Shard, dataset_rows, dataset_shards
from llmkit.data.places import Faults, Place, Tally
from llmkit.data.sources import read_documents
from llmkit.data.tokenizers import load_tokenizer
from llmkit.errors import DataError, LlmkitError, RecipeError, UsageError
from llmkit.evaluate.model import load_model
from llmkit.models.build import build_model
from llmkit.models.count import shape_by_building
from llmkit.models.trust import conversion
from llmkit.recipe import load_recipe, resolved_yaml, show_yaml
from llmkit.recipe.credentials import masked
from llmkit.recipe.schema import Model, Source
from llmkit.report.environment import mask_text

CODE = Path(llmkit.__file__).parent

# --- code: no call that could run what others wrote -------------------------------------------------------------

UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "tarfile", "zipfile"}
LOADERS = {"from_pretrained", "from_config", "load_dataset"}
FORBIDDEN = {"eval", "exec", "os.system", "os.popen"}
FORBIDDEN_OF_ANYTHING = {"extractall", "unpack_archive", "read_pickle"}
ALLOWED = {
    ("evaluate/harness.py", "import yaml"),  # its errors alone: the harness itself reads its tasks' files
    # A check that work can be sent to other machines; reading it is up to datatrove, in the run's own folder.
    ("data/cluster.py", "import pickle"),
}


def dangers(code: str) -> set[str]:
    """What in a module's text could run code that others wrote."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {f"import {alias.name}" for alias in node.names if alias.name in UNPICKLERS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNPICKLERS:
            found.add(f"import from {node.module}")
        elif isinstance(node, ast.Call):
            found |= _of_call(node)
    return found


def _of_call(call: ast.Call) -> set[str]:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = ast.unparse(call.func).rpartition(".")[0]
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    wrong = set()
    if name in LOADERS and (
        "trust_remote_code" not in given
        or not (given["trust_remote_code"] == "False" or "trust" in given["trust_remote_code"])
    ):
        wrong.add(f"{name} without trust_remote_code")
    if name == "from_pretrained" and "Model" in owner and given.get("use_safetensors") != "True":
        wrong.add("weights that may be pickles")
    if (owner, name) == ("torch", "load") and given.get("weights_only") != "True":
        wrong.add("torch.load")
    if (owner, name) in (("torch", "save"), ("pickle", "load"), ("pickle", "loads")):
        wrong.add(f"{owner}.{name}")
    if given.get("allow_pickle") == "True" or given.get("safe_serialization") == "False":
        wrong.add(f"{name} with pickles")
    if given.get("shell") == "True" or ast.unparse(call.func) in FORBIDDEN or name in FORBIDDEN_OF_ANYTHING:
        wrong.add(name)
    return wrong


def test_nothing_in_the_code_unpickles_or_runs_what_others_wrote():
    found = {
        (path.relative_to(CODE).as_posix(), danger)
        for path in CODE.rglob("*.py")
        for danger in dangers(path.read_text())
    }
    assert found - ALLOWED == set()
    assert ALLOWED - found == set(), "no longer needed"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "import tarfile",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "np.load(path, allow_pickle=True)",
        "model.save_pretrained(folder, safe_serialization=False)",
        "AutoConfig.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "AutoModelForCausalLM.from_config(config)",
        "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)",
        "datasets.load_dataset(name, **words)",
        "subprocess.run(words, shell=True)",
        "os.system('ls')",
        "exec(text)",
    ],
)
def test_the_check_sees_each_of_them(code):
    assert dangers(code)


# --- models and tokenizers that bring code or pickles -----------------------------------------------------------

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EVIL = """\
from pathlib import Path
Path({ran!r}).write_text("code ran")
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class Evil(LlamaForCausalLM):
    config_class = EvilConfig
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    model.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a good model folder, to spoil."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in saved.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add_code(folder, model_type):
    """Code that says when it runs; returns where it says so."""
    ran = folder.parent / "ran"
    (folder / "evil.py").write_text(EVIL.format(ran=str(ran)))
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    configure(folder, model_type=model_type, auto_map=names)
    return ran


def build(folder, **settings):
    spec = Model(name=str(folder), context=16, **settings)
    return build_model(spec, "causal", vocab_size=64, special_ids={}, seed=0)


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_that_comes_with_a_model_is_refused_unless_the_recipe_trusts_it(folder, model_type, monkeypatch):
    ran = add_code(folder, model_type)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for load in (build, load_model, lambda f: shape_by_building(Model(name=str(f)), "causal", 64)):
        with pytest.raises(UsageError, match=r"Python code that comes with the model.*evil\.Evil") as caught:
            load(folder)
        assert "trust_remote_code: true" in caught.value.hint
    assert not ran.exists()
    assert build(folder, trust_remote_code=True).num_parameters() > 0
    assert ran.exists(), "the test can fail: this code runs where it is trusted"
    trusted = Model(name=str(folder), trust_remote_code=True)
    assert shape_by_building(trusted, "causal", 64).hidden_size == 16


def test_a_yes_on_stdin_runs_nothing(folder, llmkit):
    ran = add_code(folder, "evil")
    done = llmkit("generate", str(folder), "hello", cwd=folder.parent, text="y\n" * 9)
    assert done.returncode == 2, done.stderr
    assert "auto_map" in done.stderr
    assert not ran.exists()


def test_a_yes_on_stdin_would_run_code_if_nothing_were_said(folder, monkeypatch):
    """Why the argument is always given: this is what transformers does without it."""
    ran = add_code(folder, "evil")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    AutoConfig.from_pretrained(folder)
    assert ran.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:attention"},
        {"text_config": {"attn_implementation": {"": "someone/kernel"}}},
    ],
)
def test_a_kernel_that_would_be_fetched_and_run_is_refused(folder, changes):
    assert load_model(folder).config.model_type == "llama"
    configure(folder, **changes)
    with pytest.raises(UsageError, match=r"names a kernel to fetch from the Hub.*someone/kernel"):
        load_model(folder)


def test_weights_in_a_pickle_are_refused_and_the_way_out_works(folder, saved):
    (folder / "model.safetensors").unlink()
    torch.save(saved.model.state_dict(), folder / "pytorch_model.bin")
    for load in (build, load_model):
        with pytest.raises(UsageError, match=r"pytorch_model\.bin, a pickle.*safetensors only") as caught:
            load(folder)
    assert conversion(folder) in caught.value.hint
    program, flag, code = shlex.split(conversion(folder))
    assert (program, flag) == ("python", "-c")
    exec(code, {})
    converted = load_model(Path(f"{folder}-safetensors")).state_dict()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in saved.model.state_dict().items())


@pytest.mark.parametrize("file", ["pytorch_model.bin", "../outside.safetensors", "/etc/x.safetensors"])
def test_an_index_cannot_send_to_a_pickle_or_out_of_the_folder(folder, saved, file):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    torch.save(saved.model.state_dict(), folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(saved.model.state_dict(), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"no safetensors file of this model"):
        load_model(folder)


def test_code_that_comes_with_a_tokenizer_is_refused(tmp_path, monkeypatch):
    made = pretrain(tmp_path) / "model"
    assert len(load_tokenizer(str(made))) == 400
    config = json.loads((made / "tokenizer_config.json").read_text())
    ran = tmp_path / "ran"
    (made / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).write_text('x')\nEvil = None\n"
    )
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(DataError, match="llmkit runs no code that comes with a tokenizer"):
        load_tokenizer(str(made))
    assert not ran.exists()


# --- recipes that are meant to hurt -----------------------------------------------------------------------------

LAUGHS = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
LAUGHS += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
ATTACKS = {
    "nested lists": ("llmkit: 1\nname: " + "[" * 5000, "nested more than 32 levels deep"),
    "nested mappings": ("llmkit: 1\nname: " + "{a: " * 5000, "nested more than 32 levels deep"),
    "nested keys": ("? " * 5000, "nested more than 32 levels deep"),
    "billion laughs": ("\n".join(LAUGHS), "counting what aliases stand for"),
    "too large": ("#" * 10_000_000, "bytes are no recipe"),
    "misspelt keys": (
        "llmkit: 1\n" + "".join(f"pretrain_data_{i}: 1\n" for i in range(4500)),
        "is not a key",
    ),
    "twice the same": ("llmkit: 1\n" + "seed: 1\n" * 4500, "is here a second time"),
    "tags": ("llmkit: 1\nprompts: [" + "!x a, " * 4500 + "]\n", "have no meaning"),
    "not set": ("llmkit: 1\nprompts: [" + "'${env:NOT_SET_1}', " * 4500 + "]\n", "is not set"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_recipe_cannot_keep_the_reader_busy(tmp_path, attack):
    """Processor time, not the clock: most take a hundredth of a second; the worst took minutes before."""
    text, said = ATTACKS[attack]
    (tmp_path / "r.yaml").write_text(text)
    load_recipe({"llmkit": 1})
    before = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml", env=dict(os.environ))
    assert time.process_time() - before < 3
    assert any(said in problem for problem in caught.value.problems)
    assert len(caught.value.problems) <= 101


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "a/..", "a/b/c", "..", ".hidden", "/tmp/x", "a\\b", "x" * 100]
)
def test_a_name_cannot_lead_out_of_the_folder_of_runs(name):
    with pytest.raises(RecipeError) as caught:
        load_recipe({"llmkit": 1, "name": name})
    assert "`name`" in caught.value.problems[0]


# --- inputs that are meant to hurt ------------------------------------------------------------------------------


def everything_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def rows_of(base, dataset, column="text"):
    commit, count = dataset_shards(dataset, "train", base)
    faults = Faults(Place(dataset), Tally())
    return [
        row
        for i in range(count)
        for row in dataset_rows(Shard(dataset, base, commit, i, count), "train", column, faults)
    ]


def test_the_names_in_an_archive_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set/a.tar", "w") as archive:
        for name in ("../../escaped.txt", "/tmp/escaped-llmkit.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"text"))
    before = everything_below(tmp_path)
    assert [text for _, text in rows_of(tmp_path, "set", "txt")] == ["text", "text"]
    assert everything_below(tmp_path) == before
    assert not (tmp_path.parent.parent / "escaped.txt").exists()
    assert not Path("/tmp/escaped-llmkit.txt").exists()


@pytest.mark.parametrize("place", ["../secret.jsonl", "{here}/secret.jsonl", "a.jsonl"])
def test_a_data_set_reads_its_own_files_only(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.jsonl").write_text('{"text": "mine"}\n')
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.jsonl").write_text('{"text": "ours"}\n')
    says = f"---\nconfigs:\n- config_name: default\n  data_files: {place.format(here=tmp_path)}\n---\n"
    (tmp_path / "set/README.md").write_text(says)
    if place == "a.jsonl":
        assert [text for _, text in rows_of(tmp_path, "set")] == ["ours"]
        return
    with pytest.raises(DataError, match="not a file of its own"):
        rows_of(tmp_path, "set")


def test_a_data_set_that_is_a_program_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(LlmkitError, match="scripts are no longer supported"):
        rows_of(tmp_path, "set")
    assert not (tmp_path / "ran").exists()


def test_the_addresses_in_a_web_archive_are_no_paths(tmp_path, monkeypatch):
    pytest.importorskip("fastwarc")
    monkeypatch.chdir(tmp_path)
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\ntext"
    head = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: ../../escaped\r\n"
        "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    (tmp_path / "a.warc").write_bytes(head.encode() + body + b"\r\n\r\n")
    before = everything_below(tmp_path)
    assert [document.text for document in read_documents(Source(files="a.warc"), base=tmp_path)] == ["text"]
    assert everything_below(tmp_path) == before
    assert not (tmp_path.parent.parent / "escaped").exists()


# --- secrets ----------------------------------------------------------------------------------------------------

PLANTED = {
    "HF_TOKEN": "plantedhubtoken1",
    "DATA_PASSWORD": "plantedpassword2",
    "DOWNLOAD": "plantedsignature3",  # a name that does not tell; the value does
}


def with_secret(**source):
    return {"llmkit": 1, "tokenize": {"data": source}}


@pytest.mark.parametrize(
    "url",
    [
        "https://me:plantedpw@host/a.txt",
        "https://host/a.txt?X-Amz-Signature=plantedpw&x=1",
        "https://host/a.txt?x=1&access_token=plantedpw",
        "s3://key:${env:UNSET_PASSWORD:-plantedpw}@bucket/a",
    ],
)
def test_a_secret_in_a_recipe_or_a_word_is_refused_and_not_repeated(tmp_path, url, llmkit):
    for source, words in ((with_secret(files=url), ()), ("zh-tiny", [f"tokenize.data.files={url}"])):
        with pytest.raises(RecipeError, match="1 problem") as caught:
            load_recipe(source, overrides=words, env={})
        (problem,) = caught.value.problems
        assert "stands here in the open" in problem
        assert "${env:NAME}" in problem
        assert "plantedpw" not in problem + str(caught.value)


def test_a_word_with_a_secret_leaves_no_file(tmp_path, llmkit):
    done = llmkit("tokenize", "zh-tiny", "tokenize.data.files=https://me:plantedpw@host/a.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert "plantedpw" not in done.stdout + done.stderr
    assert everything_below(tmp_path) == set()


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a.txt?version=1#part",
        "https://user@host/monkey=1?keyword=animals",
        "data/hf_transformers_corpus/*.txt",
        "task-some-long-name-for-a-folder-of-text-files/a.txt",
        "def f(token, key): return 'a:b@c'",
    ],
)
def test_what_is_no_secret_is_left_alone(text):
    recipe = load_recipe(with_secret(files=text)).recipe
    assert recipe.tokenize.data[0].files == [text]
    assert masked(text) == text


def test_a_variable_whose_value_is_a_secret_stays_an_expression():
    url = "https://me:plantedpw@host/a.txt?sig=plantedsig"
    loaded = load_recipe(with_secret(files="${env:WHERE}"), env={"WHERE": url})
    assert loaded.recipe.tokenize.data[0].files == [url]
    written = resolved_yaml(loaded) + show_yaml(loaded) + loaded.text
    assert "planted" not in written
    assert "${env:WHERE}" in written
    assert "planted" not in mask_text(f"cannot read {url}")
    assert load_recipe(with_secret(files="${env:WHERE}"), env={"WHERE": "a.txt"}).expressions == {}


class Texts(BaseHTTPRequestHandler):
    """A web server with one text."""

    TEXT = "".join(f"the {n} small cats sat on mat {n * 7 % 50}\n" for n in range(800)).encode()

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.TEXT)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if not head:
            self.wfile.write(self.TEXT)

    def log_message(self, *_):
        pass


def listening(process):
    """Addresses where a process and its children listen."""
    found = set()
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for one in family:
        try:
            found |= {c.laddr.ip for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            continue
    return found


def watched(words, cwd, env, umask):
    """Run a command to its end; its exit code, words, and where it listened meanwhile."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "llmkit", *words],
        cwd=cwd, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, umask=umask,
    ) as process:  # fmt: skip
        seen, said = set(), []
        reader = threading.Thread(target=lambda: said.append(process.stdout.read()))
        reader.start()
        while process.poll() is None:
            seen |= listening(psutil.Process(process.pid))
            time.sleep(0.02)
        reader.join()
    return SimpleNamespace(code=process.returncode, said=said[0], listened=seen)


SECRET_RECIPE = """\
llmkit: 1
name: tiny
tokenize: {vocab_size: 400}
pretrain:
  model: {preset: gpt-tiny, context: 32}
  data:
    - {files: 'http://me:${env:DATA_PASSWORD}@127.0.0.1:PORT/a.txt', documents: line, name: ../../../sneaky}
    - {files: '${env:DOWNLOAD}', documents: line}
  held_out: 5%
  train: {length: 4 steps, batch: 4 samples}
  checkpoint: {every: 2 steps}
  eval: {every: 2 steps}
  prompts: ["the "]
  sampling: {max_new_tokens: 4}
eval: {}
machine: {compile: false, precision: fp32, attention: sdpa, device: cpu, micro_batch: 2}
"""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """tokenize, pretrain (two processes) and eval of text that needs a password, under umask 027."""
    folder = tmp_path_factory.mktemp("outer") / "in" / "ner"
    folder.mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Texts)
    server.asked = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    port = server.server_address[1]
    (folder / "r.yaml").write_text(SECRET_RECIPE.replace("PORT", str(port)))
    url = f"http://127.0.0.1:{port}/b.txt?sig={PLANTED['DOWNLOAD']}"
    env = {**PLANTED, "DOWNLOAD": url, "LLMKIT_RUNS": str(folder / "runs")}
    done = [
        watched(words, folder, env, 0o027)
        for words in (
            ["tokenize", "r.yaml"],
            ["pretrain", "r.yaml", "--processes", "2"],
            ["eval", "r.yaml"],
            ["recipe", "show", "r.yaml"],
        )
    ]
    server.shutdown()
    server.server_close()
    assert [one.code for one in done] == [0, 0, 0, 0], [one.said for one in done]
    return SimpleNamespace(folder=folder, done=done, asked=server.asked)


def holding(folder, secrets):
    """The files in which a secret stands, as it is or in base64."""
    forms = {form for s in secrets for form in (s.encode(), base64.b64encode(s.encode()).rstrip(b"="))}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {
        str(path.relative_to(folder)) for path in files if any(form in path.read_bytes() for form in forms)
    }


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_any_file(whole_run):
    assert any("plantedsignature3" in path for path, _ in whole_run.asked)
    assert f"Basic {base64.b64encode(b'me:plantedpassword2').decode()}" in {who for _, who in whole_run.asked}
    assert holding(whole_run.folder, PLANTED.values()) == set()
    assert not any(secret in one.said for one in whole_run.done for secret in PLANTED.values())


def test_the_search_for_secrets_finds_one(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\1plantedhubtoken1\xff")
    (tmp_path / "b").write_bytes(base64.b64encode(b"plantedpassword2"))
    (tmp_path / "c").write_text("nothing")
    assert holding(tmp_path, PLANTED.values()) == {"a.bin", "b"}


@pytest.mark.slow
def test_a_sources_name_is_no_path(whole_run):
    outer = whole_run.folder.parent.parent
    assert "../../../sneaky" in (whole_run.folder / "runs/tiny/pretrain/data.json").read_text()
    assert not list(outer.parent.rglob("*sneaky*"))
    assert {path.name for path in outer.rglob("*") if whole_run.folder not in (path, *path.parents)} == {"in"}


# --- who may read the files, and who may connect ----------------------------------------------------------------


def modes(folder):
    """The files and folders whose rights are not those of the umask, by kind of wrong: {path: mode}."""
    return {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*")}


def unlike(folder, umask):
    found = modes(folder)
    assert len(found) > 10
    return {
        name: oct(mode)
        for name, mode in found.items()
        if mode != (0o777 if (folder / name).is_dir() else 0o666) & ~umask
    }


@pytest.mark.slow
def test_every_file_has_the_rights_of_umask_027(whole_run):
    assert unlike(whole_run.folder / "runs", 0o027) == {}


def test_every_file_has_the_rights_of_umask_002(tmp_path):
    before = os.umask(0o002)
    try:
        folder = pretrain(tmp_path)
    finally:
        os.umask(before)
    assert unlike(folder.parent.parent, 0o002) == {}
    (folder / "model/model.safetensors").chmod(0o600)
    assert list(unlike(folder, 0o002).values()) == ["0o600"]


@pytest.mark.slow
def test_two_processes_on_one_machine_listen_on_loopback_only(whole_run):
    listened = whole_run.done[1].listened
    assert listened, "the processes did talk to each other"
    assert all(address in ("127.0.0.1", "::1") for address in listened)


def test_the_watch_sees_who_listens_to_the_world():
    code = "import socket; s = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen(); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "1\n"
        assert listening(psutil.Process()) >= {"0.0.0.0"}
        process.communicate("\n", timeout=60)
