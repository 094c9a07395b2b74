"""No file that is read runs code, no shell or port stands open: a walk over the source, and files made to run code.

What runs code by design, a SavedModel and a configuration file, is named in the README.
"""

import ast
import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest

from deit import checkpoint, errors
from deit.teachers import cache, labels
from tests import stand_ins

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SKIPPED_FOLDERS = {"runs", "build", "dist"}

UNSAFE_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "runpy"),
}
# Dotted name as called, aliases of imports resolved -> what it is.
UNSAFE_CALLS = {
    **dict.fromkeys(["eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile"], "runs a text"),
    **dict.fromkeys(["os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"], "a shell"),
    "asyncio.create_subprocess_shell": "a shell",
    **{f"yaml.{name}": "yaml that runs code" for name in ("load", "unsafe_load", "full_load")},
    **{f"yaml.{name}_all": "yaml that runs code" for name in ("load", "unsafe_load", "full_load")},
    "tempfile.mktemp": "a temporary name that another may take",
    "ssl._create_unverified_context": "an unchecked certificate",
    "tensorflow.profiler.experimental.server.start": "an open port",
}
# How a dotted name ends, whatever it is called on.
UNSAFE_ENDS = {
    "hub.load": "code from elsewhere",
    "hub.KerasLayer": "code from elsewhere",
    "tensorflow_hub.load": "code from elsewhere",
    "tensorflow_hub.KerasLayer": "code from elsewhere",
    "jit.load": "loads a program of torch",
    "saved_model.load": "loads a SavedModel",
    "saved_model.loader.load": "loads a SavedModel",
    "layers.deserialize": "loads a Keras model",
    "models.deserialize": "loads a Keras model",
    "distribute.Server": "an open port",
    "train.Server": "an open port",
}
# Last part of the name, whatever it is called on.
UNSAFE_METHODS = {
    "extractall": "unpacks an archive unseen",
    "unpack_archive": "unpacks an archive unseen",
    "load_model": "loads a Keras model",
    **dict.fromkeys(["model_from_json", "model_from_yaml", "model_from_config"], "loads a Keras model"),
    **dict.fromkeys(["deserialize_keras_object", "enable_unsafe_deserialization"], "loads a Keras model"),
    **dict.fromkeys(["DispatchServer", "WorkerServer", "add_insecure_port"], "an open port"),
    "read_pickle": "pickle",
}
# Keyword -> what it is where its value is anything but a literal False.
ONLY_FALSE = {
    "shell": "a shell",
    "allow_pickle": "allow_pickle",
    "trust_remote_code": "code from elsewhere",
    "extract": "unpacks an archive unseen",
    "untar": "unpacks an archive unseen",
}
# Keyword -> what it is where its value is a literal that counts as false.
NEVER_FALSE = {"safe_mode": "loads a Keras model", "verify": "an unchecked certificate"}
LISTENS = re.compile(r"(bind|create_server|start_server|make_server|\w*Server)$")  # "" and "::" are every interface
# What makes a file or directory -> which argument is its mode; `mode` is its name in all of them.
MODES = {
    **dict.fromkeys(["os.mkdir", "os.makedirs", "os.mkfifo", "os.mknod"], 1),
    "os.open": 2,
    **dict.fromkeys(["mkdir", "touch"], 0),  # of a path
}
LOOPBACK = r"(?:127\.0\.0\.1|localhost|\[::1\])"
PLAIN_HTTP = re.compile(rf"http://(?!{LOOPBACK})[\w\[{{]")


def aliases(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name stands for; np and tf also where a text does not import them."""
    found = {"np": "numpy", "tf": "tensorflow"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    """Return the dotted name that an expression stands for, aliases resolved."""
    first, *rest = ast.unparse(node).split(".")
    return ".".join([known.get(first, first), *rest])


def modules(node: ast.AST, known: dict[str, str]) -> list[str]:
    """Return the modules that a statement, or a call with a constant name, imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module]
    if isinstance(node, ast.Call) and dotted(node.func, known).split(".")[-1] in ("import_module", "__import__"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def violations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, what) of everything in a source that could run foreign code or let others in."""
    known = aliases(tree)
    for node in ast.walk(tree):
        for name in modules(node, known):
            if name.split(".")[0] in UNSAFE_MODULES:
                yield node.lineno, name.split(".")[0]
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield from _names(node, known)
        if isinstance(node, ast.Attribute) and node.attr == "CERT_NONE":
            yield node.lineno, "an unchecked certificate"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if PLAIN_HTTP.search(node.value):
                yield node.lineno, "plain http"
            if "0.0.0.0" in node.value or "bind_all" in node.value:
                yield node.lineno, "an open port"
        if isinstance(node, ast.FormattedValue | ast.JoinedStr | ast.BinOp):
            yield from _made_addresses(node)
        if isinstance(node, ast.Call):
            yield from _calls(node, known)


def _made_addresses(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield http:// that a text is put behind."""
    parts = [node.left] if isinstance(node, ast.BinOp) else getattr(node, "values", [])[:-1]
    if any(isinstance(part, ast.Constant) and str(part.value).endswith("http://") for part in parts):
        yield node.lineno, "plain http"


def _names(node: ast.Name | ast.Attribute, known: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield what a name stands for, called or not: it may be called under another."""
    name = dotted(node, known)
    if name in UNSAFE_CALLS:
        yield node.lineno, UNSAFE_CALLS[name]
    for end, what in {**UNSAFE_ENDS, **UNSAFE_METHODS}.items():
        if f".{name}".endswith(f".{end}"):
            yield node.lineno, what


def _calls(node: ast.Call, known: dict[str, str]) -> Iterator[tuple[int, str]]:
    called = dotted(node.func, known)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    for keyword in node.keywords:
        if keyword.arg in ONLY_FALSE and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
            yield node.lineno, ONLY_FALSE[keyword.arg]
        if keyword.arg in NEVER_FALSE and isinstance(keyword.value, ast.Constant) and not keyword.value.value:
            yield node.lineno, NEVER_FALSE[keyword.arg]
    if LISTENS.match(called.split(".")[-1]):
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        hosts = [each.elts[0] if isinstance(each, ast.Tuple) and each.elts else each for each in given]
        if any(isinstance(each, ast.Constant) and each.value in ("", "::") for each in hosts):
            yield node.lineno, "an open port"
    if called == "numpy.load" and "allow_pickle" not in keywords:
        yield node.lineno, "np.load that does not say allow_pickle=False"
    if called == "torch.load" and keywords.get("weights_only") != "True":
        yield node.lineno, "torch.load that does not say weights_only=True"
    numbers = [each for arg in [*node.args, *(k.value for k in node.keywords)] for each in _numbers(arg)]
    if called.split(".")[-1] in ("chmod", "fchmod", "lchmod") and any(number & 0o002 for number in numbers):
        yield node.lineno, "a file that all may write"
    place = MODES.get(called, MODES.get(called.split(".")[-1]))
    if place is not None:
        modes = [*node.args[place : place + 1], *(each.value for each in node.keywords if each.arg == "mode")]
        if any(number & 0o002 for mode in modes for number in _numbers(mode)):
            yield node.lineno, "a file that all may write"
    if called == "os.umask" and any(number & 0o022 != 0o022 for number in numbers):
        yield node.lineno, "a file that all may write"


def _numbers(node: ast.AST) -> Iterator[int]:
    """Yield the numbers of which a mode is made; what is masked with & is taken away, not given."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield node.value
    elif not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd)):
        for child in ast.iter_child_nodes(node):
            yield from _numbers(child)


# (file, what) -> why it may.
EXCEPTIONS = {
    ("deit/teachers/signatures.py", "loads a SavedModel"): "the one place that loads a teacher; the README warns",
    ("tests/test_bit.py", "loads a SavedModel"): "a model that the test has just saved",
    ("deit/export.py", "loads a SavedModel"): "the one that it has just written, to compare its logits",
    ("deit/export.py", "loads a Keras model"): "as above",
    ("tests/test_export.py", "loads a SavedModel"): "an export that the test has just made",
    ("tests/test_export.py", "loads a Keras model"): "as above",
    ("deit/teachers/chunks.py", "a file that all may write"): "a mode before the umask, the one that open() asks for",
    ("deit/runtime.py", "an open port"): "tries whether its port is free as TensorFlow takes it; does not listen",
    ("tests/test_runtime.py", "an open port"): "listens as TensorFlow does, to try that it is closed to others",
    ("tests/test_local.py", "an open port"): "holds a port as TensorFlow does, for the supervisor to pass over",
    ("tests/test_exposure.py", "an open port"): "an example that the search for open ports must find",
    (
        "tests/test_models.py",
        "loads a Keras model",
    ): "a model that the test has just saved: that users can is a promise",
    ("tests/test_cnn.py", "loads a Keras model"): "as above, for a backbone",
    ("tests/test_install.py", "runpy"): "runs this project's own setup.py",
    ("tests/test_data_docs.py", "runpy"): "runs this project's own scripts",
    ("tests/test_launch.py", "an open port"): "texts that a search of its own must find",
    ("tests/test_download.py", "plain http"): "an address that does not exist (.invalid)",
    ("tests/test_cache.py", "np.load that does not say allow_pickle=False"): "that NumPy's plain call opens a cache is "
    "a promise; its default refuses pickles",
    ("tests/test_cache_teacher.py", "np.load that does not say allow_pickle=False"): "as above",
    ("tests/test_peers.py", "pickle"): "writes the file with code in it that must be refused",
    ("tests/test_security.py", "allow_pickle"): "shows that the file which must not be opened so is live",
    ("tests/test_security.py", "plain http"): "snippets that the search must find",
    ("tests/test_security.py", "an open port"): "snippets that the search must find",
}


def python_files() -> Iterator[pathlib.Path]:
    for folder, names, files in os.walk(REPOSITORY):
        names[:] = [name for name in names if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        yield from (pathlib.Path(folder, file) for file in files if file.endswith(".py"))


def found_in_the_project() -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for path in python_files():
        for line, what in violations(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault((path.relative_to(REPOSITORY).as_posix(), what), []).append(line)
    return found


def test_no_source_runs_what_it_reads_or_lets_others_in():
    found = found_in_the_project()
    assert {key: lines for key, lines in found.items() if key not in EXCEPTIONS} == {}
    assert EXCEPTIONS.keys() - found.keys() == set(), "exceptions that nothing needs any more"


def test_every_folder_with_source_is_searched():
    folders = {path.relative_to(REPOSITORY).parts[0] for path in python_files()}
    assert folders >= {"deit", "configs", "tools", "tests", "launch", "main.py", "setup.py"}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import os, marshal",
        "from joblib import load",
        "import shelve",
        "import dill",
        "importlib.import_module('pickle')",
        "from importlib import import_module as i; i('pickle')",
        "__import__('cloudpickle')",
        "import runpy",
        "eval(text)",
        "e = eval",
        "list(map(exec, texts))",
        "import os as o; run = o.system",
        "unpack = archive.extractall",
        "exec(open(path).read())",
        "compile(text, path, 'exec')",
        "import builtins; builtins.exec(text)",
        "os.system(command)",
        "from os import system; system(command)",
        "os.popen(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=1)",
        "subprocess.run(command, shell=flag)",
        "subprocess.getoutput(command)",
        "archive.extractall(path)",
        "shutil.unpack_archive(path)",
        "tf.keras.utils.get_file(origin=url, extract=True)",
        "tf.keras.utils.get_file(origin=url, untar=True)",
        "get_file(origin=url, extract=flag)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml as y; y.full_load(text)",
        "yaml.unsafe_load(text)",
        "from yaml import load_all; load_all(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=1)",
        "np.load(path, allow_pickle=flag)",
        "np.load(path, allow_pickle=not safe)",
        "from numpy import load; load(path, mmap_mode='r')",
        "numpy.lib.format.read_array(file, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.jit.load(path)",
        "from torch import jit; jit.load(path)",
        "torch.hub.load(repository, name)",
        "import tensorflow_hub as hub; hub.load(address)",
        "hub.load(address)",
        "hub.KerasLayer(address)",
        "tf.saved_model.load(path)",
        "from tensorflow.saved_model import load as read; read(path)",
        "tf.compat.v1.saved_model.load(path)",
        "tf.keras.models.model_from_json(text)",
        "from keras.models import model_from_config; model_from_config(config)",
        "tf.keras.layers.deserialize(config)",
        "from keras.layers import deserialize; deserialize(config)",
        "keras.saving.deserialize_keras_object(config)",
        "tf.keras.models.load_model(path)",
        "keras.models.load_model(path, custom_objects={})",
        "from tf_keras.models import load_model; load_model(path)",
        "keras.layers.deserialize(data, safe_mode=False)",
        "keras.config.enable_unsafe_deserialization()",
        "pandas.read_pickle(path)",
        "tempfile.mktemp()",
        "os.chmod(path, 0o777)",
        "path.chmod(mode=0o666)",
        "path.chmod(path.stat().st_mode | 0o002)",
        "os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)",
        "os.open(path, flags, mode=0o777)",
        "os.mkdir(path, 0o777)",
        "os.makedirs(path, mode=0o777)",
        "path.mkdir(0o777)",
        "path.mkdir(mode=0o777, parents=True)",
        "path.touch(0o666)",
        "os.umask(0)",
        "requests.get('http://example.org/x')",
        "urlopen(f'http://{host}/x')",
        "urlopen('http://' + host)",
        "requests.get(url, verify=False)",
        "requests.get(url, verify=0)",
        "context.verify_mode = ssl.CERT_NONE",
        "server.bind(('0.0.0.0', 80))",
        "server.bind(('', 80))",
        "server.bind(address=('::', 80))",
        "socket.create_server(('', 0))",
        "http.server.HTTPServer(('', 80), Handler)",
        "ThreadingHTTPServer(('::', 80), Handler)",
        "asyncio.start_server(answer, host='', port=80)",
        "make_server('', 80, app)",
        "tf.profiler.experimental.server.start(6009)",
        "tf.distribute.Server(cluster)",
        "from tensorflow import distribute as d; d.Server(cluster)",
        "tf.compat.v1.train.Server(cluster)",
        "tf.data.experimental.service.DispatchServer()",
        "tf.data.experimental.service.WorkerServer(config)",
        "server.add_insecure_port(address)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds(code):
    assert list(violations(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "np.load(path, allow_pickle=False)",
        "torch.load(path, weights_only=True)",
        "requests.get(url, verify=bundle)",
        "tf.keras.utils.get_file(origin=url, extract=False)",
        "api.deserialize(answer)",
        "names.append(('', 0))",
        "server.bind(('127.0.0.1', 0))",
        "HTTPServer(('localhost', 0), Handler)",
        "os.open(path, 2)",
        "os.open(parts[3], flags, 0o644)",
        "os.makedirs(parts[2], exist_ok=True)",
        "os.mkdir(names[2], 0o755)",
        "path.mkdir(parents=True)",
        "yaml.safe_load(text)",
        "re.compile(text)",
        "model.compile('sgd')",
        "model.eval()",
        "network.load_weights(path)",
        "ast.literal_eval(text)",
        "subprocess.run([program, argument])",
        "subprocess.run([program], shell=False)",
        "tempfile.mkdtemp()",
        "os.chmod(path, 0o755)",
        "os.chmod(path, other.stat().st_mode & 0o777)",
        "os.umask(0o077)",
        "url.startswith(('http://', 'https://'))",
        "urlopen(f'http://127.0.0.1:{port}/x')",
        "urlopen('http://localhost:6006')",
        "urlopen('https://example.org/x')",
        "from . import pickle_free",
        "archive.extract(member, path)",
    ],
)
def test_the_search_passes_over(code):
    assert not list(violations(ast.parse(code)))


OPEN = {
    r"bind[_-]all": "TensorBoard has no password: it is looked at through an ssh tunnel",
    r"0\.0\.0\.0": "TensorFlow's servers obey everybody who reaches them",
    r"chmod\s+(-\S+\s+)*(0?[0-7]{2}[2367]|[ao]\+\S*w)": "a file that all may write",
    r"umask\s+0+(?![0-7])": "files that all may write",
    r"(curl|wget)[^|\n]*\|\s*(sudo\s+)?(ba|z)?sh\b": "runs what it downloads",
    r"http://(?!127\.0\.0\.1|localhost)[\w$]": "can be changed on the way",
    r"privileged:\s*true|--privileged|hostNetwork:\s*true": "a container that is none",
    r"StrictHostKeyChecking[= ]no|--insecure\b|curl\s+(-\S+\s+)*-k\b": "talks to whoever answers",
}


def texts() -> Iterator[pathlib.Path]:
    for name in ("launch", "tools", "docs", "configs", ".ci", "README.md", "CONTRIBUTING.md", "Makefile"):
        path = REPOSITORY / name
        found = [path] if path.is_file() else path.rglob("*")
        yield from (each for each in found if each.is_file() and each.suffix not in (".pyc", ".png"))


def opened(text: str) -> list[tuple[str, str]]:
    """Return (what was found, why it must not be)."""
    return [(match[0], why) for pattern, why in OPEN.items() for match in re.finditer(pattern, text, re.IGNORECASE)]


def test_no_script_or_document_opens_a_port_or_a_file_to_all():
    found = {path.relative_to(REPOSITORY).as_posix(): opened(path.read_text(encoding="utf-8")) for path in texts()}
    assert len(found) > 20
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "text",
    [
        "tensorboard --logdir runs --bind_all",
        "--host=0.0.0.0",
        "chmod -R 777 runs",
        "chmod a+rw runs",
        "umask 000",
        "curl -sSf https://example.org/x | sh",
        "wget -qO- https://example.org/x | sudo bash",
        "curl http://example.org/x",
        "docker run --privileged x",
        "ssh -o StrictHostKeyChecking=no host",
    ],
)
def test_the_search_of_texts_finds(text):
    assert opened(text)


def test_the_search_of_texts_passes_over_what_is_usual():
    assert not opened("chmod +x run.sh; chmod 755 run.sh; umask 077; curl https://a.b/c -o c; http://localhost:6006")


def test_the_readme_says_what_runs_code():
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert "a SavedModel is code that runs" in text
    assert "A config file is Python, so it is code that runs." in text


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def bomb(tmp_path):
    """Return (path of an .npz whose array `a` is live code, the directory that it makes)."""
    path, marker = tmp_path / "bomb.npz", tmp_path / "marker"
    np.savez(path, a=np.array([Bomb(marker)], dtype=object))
    return path, marker


def test_the_files_below_are_live(bomb):
    path, marker = bomb
    with np.load(path, allow_pickle=True) as file:
        _ = file["a"]
    assert marker.is_dir()


def opened_cache(directory):
    conditions = {"global_batch": 8, "teacher.batch": 4, "teacher.precision": "float32", "device": "CPU x"}
    found = cache.Cache(
        directory, fingerprint={"seed": 0}, conditions=conditions, layout=labels.Layout("hard", 10, 0, "float32")
    )
    found.open(reads=True, writes=True, allow_ties=False)
    return found


def test_a_report_of_a_teacher_that_holds_code_is_as_good_as_absent(bomb, tmp_path):
    path, marker = bomb
    found = opened_cache(tmp_path / "c")
    found.write_report({"split": "test"}, {"labels": np.arange(3)})
    assert found.read_report({"split": "test"}) is not None
    (report,) = (tmp_path / "c").glob("*/report.npz")
    with zipfile.ZipFile(report) as whole, zipfile.ZipFile(path) as live, zipfile.ZipFile(path, "a") as made:
        assert set(whole.namelist()) == {"key.npy", "labels.npy"}
        made.writestr("key.npy", whole.read("key.npy"))
        made.writestr("labels.npy", live.read("a.npy"))
    report.write_bytes(path.read_bytes())
    assert found.read_report({"split": "test"}) is None
    assert not marker.exists()


def test_answers_that_hold_code_are_as_good_as_absent(tmp_path):
    marker = tmp_path / "marker"
    found = opened_cache(tmp_path / "c")
    found.write(0, {"class": np.zeros([8], np.int32)}, np.ones([8], bool))
    assert found.holds(0)
    (path,) = (tmp_path / "c").glob("*/answers-*.npy")
    np.save(path, np.array([Bomb(marker)] * 32, dtype=object))
    assert not found.holds(0)
    assert not marker.exists()


def test_a_checkpoint_whose_tensors_hold_code_is_refused_though_its_manifest_fits(bomb, tmp_path):
    path, marker = bomb
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    contents = {"tensors.safetensors": path.read_bytes(), "config.json": b"{}"}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    files = {name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in contents.items()}
    manifest = {"format": 1, "step": 1, "files": files, "metrics": {}, "versions": {}, "state_sha256": ""}
    manifest["manifest_sha256"] = checkpoint.manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(folder) is None
    with pytest.raises(errors.UserError, match=r"checkpoint .*step-00000001 can't be read"):
        checkpoint.read(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["weights.h5", "weights.npz", "weights.weights.h5", "weights.keras", "weights"])
def test_weights_of_keras_that_hold_code_are_refused(bomb, tmp_path, name):
    path, marker = bomb
    target = tmp_path / name
    target.write_bytes(path.read_bytes())
    if name.endswith(".keras"):
        with zipfile.ZipFile(target, "w") as archive:
            archive.write(path, "model.weights.npz")
    with pytest.raises(errors.UserError, match=r"teacher\.weights"):
        stand_ins.build(kind="keras_application", name="MobileNet", weights=str(target), image_size=32)
    assert not marker.exists()
