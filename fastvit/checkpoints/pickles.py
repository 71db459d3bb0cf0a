"""Pickles of torch.save, read without running anything from them.

torch's own reader for weights builds tensors and plain values and refuses all other classes. Training scripts leave
more beside the weights: their options, paths, NumPy's numbers. None of it is needed, so that those classes which are
known to be values, and those which the caller names, have stand-ins: they take what the pickle gives them and keep
nothing. The classes themselves are neither imported nor called, whatever their name.
"""

from __future__ import annotations

import enum
import pickletools
import re
import sys
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, listed

LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch's magic number

# Values and options that scripts keep beside their weights.
_PLAIN = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|typing\.Any|_io\.BytesIO|pathlib(\._local)?\.\w*Path"
    r"|collections\.(defaultdict|deque|ChainMap|UserDict|UserList)"
    r"|datetime\.(datetime|date|time|timedelta|timezone)|decimal\.Decimal|fractions\.Fraction|uuid\.(UUID|SafeUUID)"
    r"|builtins\.(object|int|float|bool|str|bytes|list|dict|tuple|set|frozenset|slice|range|complex)"
    r"|copyreg\._reconstructor"
    r"|numpy\.(_core|core)\.multiarray\.(scalar|_reconstruct)|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+DType"
    r"|numpy\.(bool_?|u?int(8|16|32|64|c|p)?|u?(byte|short|long|longlong)|float(16|32|64|128)|complex(64|128|256))"
    r"|numpy\.(half|single|double|longdouble|str_|bytes_|datetime64|timedelta64)"
    r"|numpy\.random\._pickle\.__\w+_ctor|numpy\.random\._\w+\.(MT19937|PCG64|PCG64DXSM|Philox|SFC64)"
    r"|numpy\.random\.bit_generator\.(__pyx_unpickle_)?SeedSequence"
    r"|torch\.torch_version\.TorchVersion|torch\.distributed\.fsdp\.api\.\w+"
    r"|(lightning|pytorch_lightning|lightning_fabric)(\.\w+)*\.AttributeDict"
    r"|omegaconf\.(dictconfig\.DictConfig|listconfig\.ListConfig|nodes\.\w+Node|base\.\w*Metadata)"
    r"|yacs\.config\.CfgNode|easydict\.EasyDict|addict\.addict\.Dict|ml_collections(\.\w+)*\.ConfigDict"
    r"|(mmcv\.utils|mmengine\.config)\.config\.ConfigDict|transformers\.(trainer_utils|training_args)\.\w+"
)
_KINDS = (type, enum.EnumMeta)  # of dataclasses and named tuples, of enumerations
# torch keeps the classes that it may load for the whole process.
_lock = threading.Lock()


class _Ignored:
    """Stands for an object that is not needed."""

    def __new__(cls, *arguments: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _AsDict(_Ignored):
    """Stands for a dictionary with a name of its own, whose contents are read: a state_dict may be in it."""

    def __new__(cls, *arguments: object) -> Any:
        return OrderedDict()


class _AsList(_Ignored):
    """Stands for a list with a name of its own."""

    def __new__(cls, *arguments: object) -> Any:
        return []


def read_torch(path: Path, allow: Sequence[str] = ()) -> Any:
    """What torch.save wrote: tensors and plain values, on the CPU.

    Args:
        allow: full names of classes whose objects may be in it; they are left out, and nothing of theirs is run.

    Raises:
        CheckpointError: truncated, damaged, or with any other class in it, all of which are named.
    """
    names, has_module, is_whole = _scanned(path)
    stand_ins = {name: _stand_in(name) for name in names if name in allow or _is_plain(name)}
    while True:
        try:
            with _lock, torch.serialization.safe_globals([(found, name) for name, found in stand_ins.items()]):
                return torch.load(path, map_location="cpu", weights_only=True)
        # By where it breaks: RuntimeError, UnpicklingError, EOFError, KeyError …
        except Exception as error:
            name, kind = _filled(str(error))
            if name not in stand_ins or issubclass(stand_ins[name], kind):
                reason = _refusal(path, str(error), stand_ins, has_module) if is_whole else ""
                reason = reason or f"truncated or damaged ({path.stat().st_size} bytes, {type(error).__name__})"
                raise CheckpointError(f"{path}: {reason}") from error
            stand_ins[name] = _stand_in(name, kind)


def _stand_in(name: str, kind: type[_Ignored] = _Ignored) -> type[_Ignored]:
    return type(name, (kind,), {"__module__": "stand-in"})


def _is_plain(name: str) -> bool:
    """Whether a class is known to be a value, or one of options that the program itself has loaded."""
    module, _, last = name.rpartition(".")
    loaded = getattr(sys.modules.get(module), "__dict__", {}).get(last)
    # by its type and its own dictionary: asking the class itself might run something
    fields = vars(loaded).keys() & {"__dataclass_fields__", "_fields", "_member_map_"} if type(loaded) in _KINDS else ()
    return bool(fields or _PLAIN.fullmatch(name))


def _filled(message: str) -> tuple[str, type[_Ignored]]:
    """The stand-in that the pickle fills as a dictionary or a list, and what it must be to take that."""
    found = re.search(r"Can only (SETITEM|append|extend).* but got <class 'stand-in\.(.+)'>", message)
    return (found[2], _AsDict if found[1] == "SETITEM" else _AsList) if found else ("", _Ignored)


def _scanned(path: Path) -> tuple[set[str], bool, bool]:
    """The names that the pickle looks up, as Python 3 has them; whether a module is in it; whether its end is there."""
    names, has_module = set(), False
    try:
        for opcode, argument, _ in _opcodes(path):
            has_module = has_module or argument == "_parameters"
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                names.add(f"{module}.{name}")
    except Exception:  # ValueError, UnicodeDecodeError, BadZipFile …, by what is missing
        return names, has_module, False
    return names, has_module, True


def _opcodes(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Of a zip archive's one pickle, or of the first four in torch's old format, which end with the contents."""
    with path.open("rb") as file:
        if file.read(len(LEGACY_TORCH)) == LEGACY_TORCH:
            for _ in range(3):
                yield from pickletools.genops(file)
            return
    with zipfile.ZipFile(path) as archive:
        yield from pickletools.genops(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))


def _refusal(path: Path, message: str, stand_ins: Collection[str], has_module: bool) -> str:
    """Why torch did not read a pickle that is whole; "" where it is damaged."""
    try:
        names = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)).difference(stand_ins))
    except Exception:  # of the old format, and of what torch does not expect, its message names the first one
        names = []
    names = names or [name if "." in name else f"builtins.{name}" for name in re.findall(r"GLOBAL ([\w.]+)", message)]
    if "Unsupported operand" in message:
        return "pickled with another protocol than torch.save's own; save it again without pickle_protocol"
    if not names and "WeightsUnpickler" not in message:
        return ""
    which = listed(names)
    if has_module and names:
        return f"a whole pickled model ({which}), which is code and not loaded; save its state_dict() instead"
    if any(re.match(r"torchao\.|bitsandbytes\.|optimum\.|hqq\.", name) for name in names):
        return f"quantised weights ({which}), which are not loaded; dequantise the model, then save its state_dict()"
    if any(re.match(r"torch\.distributed\.(tensor|_shard)", name) for name in names):
        return f"shards of a distributed model ({which}), which are not loaded; save its full state_dict instead"
    what = f"pickled code or objects ({which})" if names else "more than tensors and plain values"
    return (
        f"it holds {what}, which are not loaded; save its state_dict alone, or leave them out, "
        "with allow=[…], on the command line --allow"
    )
