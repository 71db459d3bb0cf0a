"""Pickles of training scripts: values beside the weights are left out, other classes refused, and nothing is run."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import os
import pathlib
import pickle
import types
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastvit.checkpoints import CheckpointError, inspect, load_pretrained
from fastvit.checkpoints.files import read_checkpoint
from tests.checkpoints.conftest import Calls, refusal

WEIGHT = torch.arange(6.0).reshape(2, 3)


class Mode(enum.Enum):
    FAST = "fast"


@dataclasses.dataclass
class Settings:
    rate: float = 0.1


Size = collections.namedtuple("Size", "height width")  # noqa: PYI024


class Options(dict):  # type: ignore[type-arg]
    """A dictionary with attributes, as many libraries have one for their options."""


class Rows(list):  # type: ignore[type-arg]
    pass


class Schedule:
    """A class of a script's own, which takes note of every use of its code."""

    used: list[str] = []
    step: int

    def __new__(cls, *arguments: object) -> Schedule:
        cls.used.append("new")
        return super().__new__(cls)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.used.append("setstate")


VALUES: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=1e-3, out=pathlib.PosixPath("/x"), mode=Mode.FAST),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "paths": [pathlib.Path("/x"), pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c:/a")],
    "numpy_scalars": [np.float64(71.2), np.float32(3), np.int64(2), np.bool_(True), np.str_("a")],
    "numpy_dtypes": [np.dtype("f4"), np.float32, np.int8],
    "numpy_array": np.arange(3.0),
    "numpy_random": np.random.get_state(),
    "random_state": np.random.RandomState(0),
    "generator": np.random.default_rng(0),
    "defaultdict": collections.defaultdict(list, {1: [2]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "collections": [collections.Counter("aa"), collections.UserDict(a=1), collections.ChainMap({1: 2})],
    "times": [datetime.datetime(2024, 1, 2), datetime.timedelta(1), datetime.timezone.utc, datetime.date(2024, 1, 2)],
    "numbers": [decimal.Decimal("1.5"), uuid.UUID(int=3), 1j, 2**70, slice(1, 2), range(3), frozenset([1])],
    "types": [int, dict, str],
    "version": torch.__version__,
    "options": {Mode.FAST: [Mode.FAST], "settings": Settings(), "size": Size(1, 2)},
    "bytes": [b"a", bytearray(b"b"), io.BytesIO(b"c")],
}


def saved(tmp_path: Path, beside: Any, new_format: bool = True) -> Path:
    torch.save({"w": WEIGHT, "beside": beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    return tmp_path / "w.pth"


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("case", VALUES)
def test_values_beside_the_weights(tmp_path: Path, case: str, new_format: bool) -> None:
    found = read_checkpoint(saved(tmp_path, VALUES[case], new_format))
    assert found.state["w"].equal(WEIGHT)


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """A zip archive of torch's with another pickle."""
    contents = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(contents, "w") as out:
        for name in archive.namelist():
            data = archive.read(name)
            out.writestr(name, change(data) if name.endswith("data.pkl") else data)
    path.write_bytes(contents.getvalue())
    return path


def renamed(path: Path, old: bytes, new: bytes) -> Path:
    """The same with other names of classes."""

    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return rewritten(path, change)


@pytest.mark.parametrize(
    ("value", "old", "new"),
    [
        (np.float64(1), b"numpy._core.multiarray", b"numpy.core.multiarray"),  # NumPy before and after version 2
        (np.float64(1), b"numpy.core.multiarray", b"numpy._core.multiarray"),
        (pathlib.PosixPath("a"), b"cpathlib\n", b"cpathlib._local\n"),  # Python 3.13
        (pathlib.PosixPath("a"), b"PosixPath\n", b"WindowsPath\n"),
        (pathlib.PosixPath("a"), b"cpathlib\nPosixPath\n", b"comegaconf.dictconfig\nDictConfig\n"),
    ],
)
def test_names_of_other_versions_and_systems(tmp_path: Path, value: Any, old: bytes, new: bytes) -> None:
    path = saved(tmp_path, value)
    with zipfile.ZipFile(path) as archive:
        if old not in archive.read("w/data.pkl"):
            old, new = new, old
    assert read_checkpoint(renamed(path, old, new)).state["w"].equal(WEIGHT)


@pytest.mark.parametrize("new_format", [True, False])
def test_another_class_is_refused_by_name_and_left_out_when_allowed(tmp_path: Path, new_format: bool) -> None:
    schedule = Schedule()
    schedule.step = 3
    path = saved(tmp_path, [schedule, Options(a=[1]), Rows([2])], new_format)
    Schedule.used.clear()
    first = refusal(path)
    names = [f"{__name__}.{name}" for name in ("Schedule", "Options", "Rows")]
    assert "pickled code or objects" in first and "--allow" in first and names[0] in first
    if new_format:  # all of them at once
        assert all(name in first for name in names)
    assert names[2] in refusal(path, allow=names[:2])
    assert read_checkpoint(path, allow=names).state["w"].equal(WEIGHT)
    assert Schedule.used == [], "code of the class was run"
    torch.load(path, weights_only=False)  # the test can fail
    assert Schedule.used == ["new", "setstate"]
    with pytest.raises(TypeError, match="allow: 'a.b'; accepted is a list of names"):
        read_checkpoint(path, allow="a.b")


def test_weights_inside_a_dictionary_of_a_class_are_read(tmp_path: Path) -> None:
    torch.save(Options(model=collections.defaultdict(dict, {"w": WEIGHT})), tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth", allow=[f"{__name__}.Options"]).state["model.w"].equal(WEIGHT)


def test_what_a_program_allows_torch_to_load_is_its_own(tmp_path: Path) -> None:
    path = saved(tmp_path, Schedule())
    for allowed in ([Schedule], [argparse.Namespace, (Schedule, f"{__name__}.Schedule")]):
        with torch.serialization.safe_globals(allowed):
            before = set(torch.serialization.get_safe_globals())
            assert read_checkpoint(path).state["w"].equal(WEIGHT)
            read_checkpoint(saved(tmp_path, [Schedule(), argparse.Namespace()]))
            assert set(torch.serialization.get_safe_globals()) == before
    before = set(torch.serialization.get_safe_globals())
    refusal(path)
    read_checkpoint(path, allow=[f"{__name__}.Schedule"])
    assert set(torch.serialization.get_safe_globals()) == before


# Every callable through which a pickle could run something, alone and inside what is allowed; each leaves a mark.


def _hostile(mark: str) -> dict[str, Any]:
    touch = f"open({mark!r}, 'w').close()"
    return {
        "eval": Calls(eval, touch),
        "exec": Calls(exec, touch),
        "system": Calls(os.system, f"touch {mark}"),
        "partial": Calls(functools.partial, Calls(eval, touch)),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "touch": Calls(Path.touch, Path(mark)),
        "bytes": Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(eval, touch))),
        "reconstructor": Calls(copyreg._reconstructor, dict, object, Calls(eval, touch)),  # type: ignore[attr-defined]
        "in_namespace": argparse.Namespace(a=Calls(eval, touch)),
        "in_defaultdict": Calls(collections.defaultdict, Calls(eval, touch)),
        "as_state": Calls(argparse.Namespace, state={"a": Calls(eval, touch)}),
        "in_numpy": np.array([Calls(eval, touch)], dtype=object),
    }


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("case", _hostile("x"))
def test_nothing_in_a_pickle_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, new_format: bool, forced: bool
) -> None:
    """Refused, and inert even where somebody allows all of it."""
    if forced:  # what a user may have set for other programs is no wish of theirs here
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "mark"
    path = saved(tmp_path, _hostile(str(mark))[case], new_format)
    message = refusal(path)
    assert "not loaded" in message
    dangerous = ["builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "functools.partial"]
    dangerous += ["posix.system", "pathlib.Path.touch", "torch.storage._load_from_bytes", "copyreg._reconstructor"]
    with contextlib.suppress(CheckpointError):
        read_checkpoint(path, allow=dangerous)
    assert not mark.exists(), "code in the file was run"
    if case not in ("partial", "getattr"):  # which alone run nothing: the file would have done it
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert mark.exists()


def test_a_stand_in_can_not_be_used_for_anything(tmp_path: Path) -> None:
    """Calls of an instance, of a class's methods and changes of the class itself are not taken."""
    header = b"\x80\x02"
    for pickled in (
        b"cargparse\nNamespace\n)\x81(X\x01\x00\x00\x00atR.",  # an instance is called
        b"cargparse\nNamespace\nN}X\x08\x00\x00\x00__call__K\x01s\x86b.",  # attributes of the class are set
        b"cargparse\nNamespace.__init__\n)R.",  # an attribute of a class
        b"cbuiltins\nlist\n)R(X\x01\x00\x00\x00ae.",  # filled
    ):
        path = rewritten(saved(tmp_path, None), lambda data, pickled=pickled: header + pickled)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    assert "__call__" not in vars(argparse.Namespace)


def test_an_instance_that_hides_its_methods(tmp_path: Path) -> None:
    """torch lets a pickle put anything into an OrderedDict's and a parameter's attributes."""
    state = Calls(collections.OrderedDict, [("w", WEIGHT)], state={"items": 3, "keys": 3})
    hooks: Any = collections.OrderedDict()
    weight = Calls(torch._utils._rebuild_parameter_with_state, WEIGHT, True, hooks, {"detach": 3, "cpu": 3})
    torch.save({"model": state, "p": weight}, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth").state
    assert found["model.w"].equal(WEIGHT) and Tensor.equal(found["p"], WEIGHT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of TorchScript
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_state_dict_is_named_in_words(tmp_path: Path) -> None:
    torch.save({"model": nn.Sequential(nn.Linear(2, 2))}, tmp_path / "module.pth")
    for arguments in ({}, {"allow": ["torch.nn.modules.linear.Linear"]}):
        message = refusal(tmp_path / "module.pth", **arguments)
        assert "a whole pickled model (torch.nn.modules" in message and "save its state_dict() instead" in message
    classes = saved(tmp_path, functools.partial(nn.GELU))
    assert "objects (functools.partial, torch.nn.modules.activation.GELU)" in refusal(classes)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)), tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt")
    torch.save({"w": WEIGHT, "a": argparse.Namespace()}, tmp_path / "other.pth", pickle_protocol=4)
    assert "another protocol than torch.save's own" in refusal(tmp_path / "other.pth")
    path = renamed(saved(tmp_path, Schedule()), f"c{__name__}\n".encode(), b"ctorchao.dtypes\n")
    assert "quantised weights (torchao.dtypes.Schedule)" in refusal(path)
    path = renamed(saved(tmp_path, Schedule()), f"c{__name__}\n".encode(), b"ctorch.distributed.tensor\n")
    assert "shards of a distributed model (torch.distributed.tensor.Schedule)" in refusal(path)


def test_models_beside_options(tmp_path: Path, timm_vit: Any) -> None:
    """From end to end, by the two ways in."""
    state = timm_vit().state_dict()
    torch.save({"model": state, "args": argparse.Namespace(schedule=Schedule())}, tmp_path / "w.pth")
    allow = [f"{Schedule.__module__}.Schedule"]
    assert load_pretrained(tmp_path / "w.pth", allow=allow).head.weight.equal(state["head.weight"])
    assert inspect(tmp_path / "w.pth", allow=allow).loads
    with pytest.raises(CheckpointError, match="Schedule"):
        load_pretrained(tmp_path / "w.pth")
