"""Hostile inputs: none runs code, blocks the program, or takes more memory than its size explains."""

from __future__ import annotations

import ast
import io
import os
import pickle
import shutil
import signal
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prcl_fast.config import load_config
from prcl_fast.data.sources.images import read_image, read_mask
from prcl_fast.data.sources.splits import read_split
from prcl_fast.errors import InputError
from prcl_fast.files.torch_file import check_torch_file
from prcl_fast.models.weights import read_file
from support.commands import prcl
from support.paths import PACKAGE, TESTS

CORPUS = TESTS / "fuzz" / "corpus" / "data"

# These run code from a file; of pickle, only its exceptions may be used.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "runpy.run_path"}


def loaders_of_code(source: str) -> list[str]:
    """The calls and names in a module that can run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found.append(f"from {node.module}")
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in MODULES:
            found += [] if node.attr.endswith("Error") else [ast.unparse(node)]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            name in BUILTINS | CALLS
            or (name.endswith("torch.load") and words.get("weights_only") != "True")
            or (name == "yaml.load" and words.get("Loader") not in ("_Loader", "yaml.SafeLoader"))
            or words.get("allow_pickle", "False") != "False"
            or words.get("shell", "False") != "False"
        ):
            found.append(ast.unparse(node))
    return found


def test_nothing_in_the_package_runs_code_from_a_file() -> None:
    files = sorted(PACKAGE.glob("**/*.py"))
    assert len(files) > 50
    found = {file.relative_to(PACKAGE).as_posix(): loaders_of_code(file.read_text()) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("torch.load(path)", "torch.load(path, weights_only=False)", "yaml.load(text, Loader=yaml.Loader)"),
        *("yaml.load(text)", "yaml.unsafe_load(text)", "pickle.loads(data)", "from pickle import loads"),
        *("np.load(path, allow_pickle=True)", "eval(text)", "exec(text)", "os.system(text)"),
        "subprocess.run(text, shell=True)",
    ],
)
def test_a_call_that_runs_code_is_found(source: str) -> None:
    assert loaders_of_code(source)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a small data set as the working directory."""
    shutil.copytree(CORPUS, tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


@pytest.fixture
def awake() -> Iterator[None]:
    """Ends a test that blocks."""

    def wake(*_: object) -> None:
        raise AssertionError("still waiting after 20 seconds")

    former = signal.signal(signal.SIGALRM, wake)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


def bomb(first: str, line: str) -> str:
    """Nine lines, each of which names the one above it ten times."""
    return first + "".join(line.format(n=n, below=", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 10))


VALID = "output: out\ndata: {kind: synthetic}\nmethod: {name: supervised}\n"
HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "a thousand million laughs": (bomb("a0: &a0 [x, x]\n", "a{n}: &a{n} [{below}]\n"), "aliases written out"),
    "laughs in merge keys": (bomb("a0: &a0 {x: 1}\n", "a{n}: &a{n} {{<<: [{below}]}}\n"), "written out"),
    "part of itself": ("data: &a [*a]", "alias to what it is part of"),
    "merged into itself": ("data: &a {<<: *a}", "alias to what it is part of"),
    "deep lists": ("data: " + "[" * 100_000, "nested more than 20 deep"),
    "deep mappings": ("data: " + "{a: " * 100_000, "nested more than 20 deep"),
    "deep blocks": ("- " * 100_000, "nested more than 20 deep"),
    "long": ("# " + "x" * 2**20, "at most 1048576"),
    "many values": ("data: [" + "a, " * 300_000 + "]", "more than 10000 keys and values"),
    "long number": ("seed: " + "9" * 5000, "cannot be read as int"),
    "long hexadecimal number": ("seed: 0x" + "f" * 5000, "beyond 64 bits"),
    "no date": ("seed: 2020-13-45", "cannot be read as timestamp"),
    "no integer": ("seed: !!int x", "cannot be read as int"),
    "binary": ("seed: !!binary aGVsbG8=", "seed: input should be a valid integer"),
    "set": ("seed: !!set {a, b}", "seed: input should be a valid integer"),
    "key of two parts": ("? [a, b]\n: c", "a key must be one word or number"),
    "number as key": (VALID + "1.5: c", "key 1.5 is not a name"),
    "nothing as key": (VALID.replace("synthetic}", "synthetic, ~: c}"), "data: key None is not a name"),
    "line break in a key": ('"a\\nb": c', "line break or control character"),
    "NUL": ("output: a\0b", "special characters are not allowed"),
    "escaped NUL": ('output: "a\\0b"', "line break or control character"),
    "half of a surrogate pair": ('output: "\\ud800"', "line break or control character"),
    "tab": ("data:\n\tkind: voc", "cannot start any token"),
    "UTF-16": ("seed: 1".encode("utf-16"), "not UTF-8"),
    "code": ('seed: !!python/object/apply:os.system ["true"]', "could not determine a constructor"),
    "not a number": (VALID + "optim: {lr: .nan}", "finite number"),
    "long value": ("seed: " + "x" * 10_000, "..."),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_configuration_is_one_short_line(tmp_path: Path, awake: None, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        load_config(path)
    line = str(caught.value)
    assert message in line
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < 1000


def test_aliases_and_merge_keys_of_usual_size_are_read(data: Path) -> None:
    text = (data / "config.yaml").read_text()
    text = text.replace("crop: [64, 64]", "crop: &size [48, 48]")
    text = text.replace("eval: {mode: whole", "eval: {<<: {flip: true}, window: *size, mode: whole")
    (data / "config.yaml").write_text(text)
    config = load_config(data / "config.yaml")
    assert config.eval.window == [48, 48]
    assert config.eval.flip


def test_an_override_cannot_nest_without_end(data: Path) -> None:
    with pytest.raises(InputError, match="too long"):
        load_config(data / "config.yaml", [".".join(["a"] * 5000) + "=1"])


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        former = os.getcwd()
        os.chdir(path.parent)  # a socket's name is short
        server.bind(path.name)
        os.chdir(former)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": _socket,
}
PLACES = {
    "config.yaml": ["data", "check", "config.yaml"],
    "splits/val.txt": ["data", "check", "config.yaml"],
    "JPEGImages/labeled_0000.jpg": ["data", "check", "config.yaml"],
    "SegmentationClass/labeled_0000.png": ["data", "check", "config.yaml"],
    "names.txt": ["data", "check", "config.yaml", "data.classes=names.txt"],
    "weights.pth": ["train", "config.yaml", "model.weights=weights.pth"],
    "run.pt": ["eval", "run.pt"],
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("place", PLACES)
def test_a_special_file_is_named_and_not_opened(
    data: Path, awake: None, capsys: pytest.CaptureFixture[str], place: str, kind: str
) -> None:
    if (place, kind) == ("run.pt", "a folder"):
        pytest.skip("a folder is a run there")
    (data / place).unlink(missing_ok=True)
    SPECIAL[kind](data / place)
    assert prcl(*PLACES[place]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("prcl: ")
    assert Path(place).name in said[-1]
    assert not (data / "out").exists()


def test_a_split_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "labeled.txt"
    path.write_text("a\n" + "x" * 4097 + "\n")
    with pytest.raises(InputError, match=r"labeled\.txt:2: 4097 characters"):
        read_split(path)
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(InputError, match=r"labeled\.txt: 67108865 bytes"):
        read_split(path)


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\x0b", "\x1b", "\0"])
def test_a_control_character_in_a_split_is_shown_in_one_line(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "labeled.txt"
    path.write_text(f"a{separator}b\n", newline="")
    with pytest.raises(InputError, match="a control character") as caught:
        read_split(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["data.images", "data.labels"])
@pytest.mark.parametrize("place", ["../{name}.png", "..", "/etc", "a/../../b", "C:\\x", "\\\\host\\x"])
def test_folders_of_images_and_labels_stay_in_the_data_set(
    data: Path, capsys: pytest.CaptureFixture[str], key: str, place: str
) -> None:
    folders = ["data.kind=folder", "data.images=JPEGImages", "data.labels=SegmentationClass"]
    assert prcl("data", "check", "config.yaml", *folders, f"{key}='{place}'") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert key in line
    assert "leaves the data set" in line


@pytest.mark.parametrize("name", ["many.webp", "many.tif", "many.png"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)) for value in (10, 100, 200)]
    lossless = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
    assert read_image(tmp_path / name).tolist() == np.full((8, 8, 3), 10).tolist()


def test_an_image_that_claims_more_pixels_than_the_bound_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("L", (10_000, 9_000)).save(path)
    with pytest.raises(InputError, match="more than the bound"):
        read_mask(path)


def archive(change: Callable[[zipfile.ZipFile, str, bytes], None]) -> bytes:
    """A file of `torch.save` whose entries `change` writes anew."""
    saved, target = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(1000)}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(target, "w") as made:
        for info in source.infolist():
            change(made, info.filename, source.read(info))
    return target.getvalue()


def _as_it_is(made: zipfile.ZipFile, name: str, data: bytes) -> None:
    made.writestr(name, data)


def _compressed(made: zipfile.ZipFile, name: str, data: bytes) -> None:
    made.writestr(name, data + bytes(10**6 if "data/" in name else 0), zipfile.ZIP_DEFLATED)


def _twice(made: zipfile.ZipFile, name: str, data: bytes) -> None:
    made.writestr(name, data)
    if name.endswith("data.pkl"):
        with pytest.warns(UserWarning, match="Duplicate"):
            made.writestr(name, data)


def _claiming(content: bytes) -> bytes:
    """The directory entry of the tensor with 1 TB for 4,000 bytes, in both of its sizes."""
    start = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    return content[: start + 20] + b"\xf0\xff\xff\xff" * 2 + content[start + 28 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: archive(_compressed), "is compressed"),
        (lambda: archive(_twice), "is there twice"),
        (lambda: _claiming(archive(_as_it_is)), "claims 4294967280 bytes"),
        (lambda: b"PK\x03\x04" + archive(_as_it_is), "does not begin at the first byte"),
        (lambda: archive(_as_it_is)[:-30], "not a readable weights file"),
    ],
)
def test_an_archive_that_unpacks_to_more_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[], bytes], message: str
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content())
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(InputError, match=message) as caught:
        read_file(path)
    assert "weights.pth" in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_saved_by_pytorch_is_accepted(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.arange(9)}, path, _use_new_zipfile_serialization=zipped)
    check_torch_file(path)
    assert torch.equal(read_file(path)["weight"], torch.arange(9))


class Intruder:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("intruded",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_of_tensors_is_not_run(data: Path, zipped: bool) -> None:
    content = pickle.dumps({"weight": Intruder()}, protocol=2)
    if zipped:
        content = archive(
            lambda made, name, entry: made.writestr(name, content if name.endswith(".pkl") else entry)
        )
    for name in ("weights.pth", "run.pt"):
        Path(name).write_bytes(content)
    assert prcl("train", "config.yaml", "model.weights=weights.pth") == 2
    assert prcl("eval", "run.pt") == 2
    assert not (data / "intruded").exists()


def test_no_command_uses_the_network(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: object, **named: object) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    assert prcl("data", "check", "config.yaml") == 0
    assert prcl("train", "config.yaml") == 0
    assert prcl("eval", "out") == 0
    assert asked == []
