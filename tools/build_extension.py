"""Build the C++/CUDA extension: fastvit/cuda/_fastvit_cuda.so, from csrc/ by nvcc and a C++ compiler.

    python tools/build_extension.py                              in place, as `make extension` does
    python tools/build_extension.py --host FILE [--no-launch]    over emulated kernels: for tests of the binding

setup.py uses it too, so nothing but the standard library is imported; torch's headers are found without torch.

FASTVIT_BUILD_CUDA    auto (default): build where everything that it takes is here; 0: don't; 1: fail if it isn't
FASTVIT_CUDA_ARCHS    GPU architectures, such as 80;90a; default: DEFAULT_ARCHITECTURES, as far as nvcc knows them
CUDA_HOME             whose nvcc; where it has none, or is not set: that on PATH, else that of /usr/local/cuda
CXX                   which C++ compiler; default: that on PATH
MAX_JOBS              how many compilers run at once; default: one a core
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
WORK = ROOT / "build" / "extension"
PACKAGE = Path("fastvit") / "cuda"
BUILT = "library.so"  # as ninja leaves it
LIBRARY = "_fastvit_cuda.so"
INFO = "_fastvit_cuda.json"  # beside the library: what it was built from and for, or why it was not
USUAL_CUDA_HOME = Path("/usr/local/cuda")

VARIABLE = "FASTVIT_BUILD_CUDA"
MODES = ("auto", "0", "1")
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
OLDEST_ARCHITECTURE = 80
ONLY_SM90A = "_sm90a.cu"  # the end of the name of a file that is compiled for that architecture alone

# The oldest torch whose stable ABI the library speaks: 2.11.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", TARGET_VERSION)
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all")
HOST_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")


class BuildError(RuntimeError):
    """The extension can't be built, or what was asked for can't be understood; the message is for the user."""


@dataclass(frozen=True)
class Toolchain:
    """What builds; paths are absolute. Without nvcc, the library over emulated kernels alone."""

    cxx: str
    ninja: tuple[str, ...]
    torch: Path  # the folder of the package
    nvcc: str = ""
    includes: tuple[str, ...] = ()  # of CUDA
    libraries: tuple[str, ...] = ()  # folders with libcudart_static.a
    targets: tuple[int, ...] = ()  # architectures that nvcc compiles for
    versions: tuple[str, ...] = ()


@dataclass
class Library:
    """A library to be built: what each object is compiled from, and how."""

    name: str
    toolchain: Toolchain
    sources: Path
    texts: Sequence[Path]  # all that is compiled into it, headers too
    about: str = "the C++/CUDA extension"
    objects: list[tuple[str, Path, Sequence[str]]] = field(default_factory=list)  # the rule, the source, more flags
    rules: dict[str, Sequence[str]] = field(default_factory=dict)  # compiler and flags
    link: Sequence[str] = ()
    info: dict[str, object] = field(default_factory=dict)  # what the file beside the library says of it


def build_mode(environment: Mapping[str, str] = os.environ, variable: str = VARIABLE) -> str:
    """The value of that variable.

    Raises:
        BuildError: it is none of :data:`MODES`.
    """
    mode = environment.get(variable) or "auto"
    if mode not in MODES:
        raise BuildError(f"{variable}={mode!r}: accepted are {', '.join(MODES)}")
    return mode


def find_toolchain(*, cuda: bool = True) -> tuple[Toolchain | None, list[str]]:
    """The tools, or None and a phrase for each one that is missing; without `cuda`, none of CUDA is looked for."""
    cxx, ninja, torch = _cxx(), _ninja(), _torch()
    found = {
        "C++ compiler (c++, g++, clang++ or $CXX)": cxx,
        "ninja (pip install ninja)": ninja,
        "torch with its headers (pip isolates builds from it unless it is given --no-build-isolation)": torch,
    }
    nvcc = _nvcc() if cuda else None
    includes, libraries = _toolkit(nvcc) if nvcc else ((), ())
    if cuda:
        found["nvcc (of the CUDA toolkit, in $CUDA_HOME, on PATH or in /usr/local/cuda)"] = nvcc
        if nvcc:
            found["cuda_runtime_api.h and libcudart_static.a (of the CUDA toolkit)"] = includes and libraries
    missing = [what for what, it in found.items() if not it]
    if missing or cxx is None or torch is None:
        return None, missing
    versions = [_output([cxx, "--version"]).partition("\n")[0], _torch_version(torch)]
    if nvcc is None:
        return Toolchain(cxx, ninja, torch, versions=tuple(versions)), []
    versions.append(_output([nvcc, "--version"]).strip().rpartition("\n")[2])
    targets = sorted({int(number) for number in re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"]))})
    return Toolchain(cxx, ninja, torch, nvcc, includes, libraries, tuple(targets), tuple(versions)), []


def plan(environment: Mapping[str, str] = os.environ) -> tuple[Toolchain | None, str]:
    """The tools to build with, or None and the reason why nothing is to be built.

    Raises:
        BuildError: a variable has no meaning, or FASTVIT_BUILD_CUDA=1 and something is missing.
    """
    toolchain, reason = plan_by(VARIABLE, environment)
    if toolchain:
        architectures(environment.get("FASTVIT_CUDA_ARCHS", ""), toolchain.targets)
    return toolchain, reason


def plan_by(variable: str, environment: Mapping[str, str], *, cuda: bool = True) -> tuple[Toolchain | None, str]:
    """The same as this variable has it, and nothing but the tools is looked at."""
    mode = build_mode(environment, variable)
    if mode == "0":
        return None, f"it was left out: {variable}=0"
    toolchain, missing = find_toolchain(cuda=cuda)
    if toolchain is None and mode == "1":
        raise BuildError(f"{variable}=1, but there is no {'; no '.join(missing)}")
    if toolchain is None:
        return None, f"where FastViT was installed there was no {'; no '.join(missing)}"
    return toolchain, ""


def architectures(text: str, targets: Sequence[int]) -> list[str]:
    """The architectures that FASTVIT_CUDA_ARCHS names, in order: "80;90a" → ["80", "90a"]; "" → the default.

    Raises:
        BuildError: one is not of the form 80 or 90a, or nvcc, which compiles for `targets`, does not know it.
    """
    accepted = [number for number in targets if number >= OLDEST_ARCHITECTURE]
    names = re.split(r"[;,\s]+", text.strip())
    if names == [""]:
        names = [name for name in DEFAULT_ARCHITECTURES if _number(name) in accepted]
    for name in names:
        if not re.fullmatch(r"\d+[af]?", name) or _number(name) not in accepted:
            raise BuildError(
                f"FASTVIT_CUDA_ARCHS={text!r}: {name!r} is not an architecture of this nvcc and this library; accepted "
                f"are {', '.join(map(str, accepted))}, separated by semicolons, with an 'a' behind it where features "
                "of that architecture alone are wanted: 90a for H100 and H200"
            )
    return sorted(set(names), key=lambda name: (_number(name), name))


def cuda_library(toolchain: Toolchain, names: Sequence[str], sources: Path = SOURCES) -> Library:
    """The extension, for the architectures `names`."""
    library = Library("cuda", toolchain, sources, texts(sources))
    general = [number for number in names if number.isdigit()]
    codes = [f"arch=compute_{name},code=sm_{name}" for name in names]
    if general:  # later architectures compile this at run time
        codes.append(f"arch=compute_{general[-1]},code=compute_{general[-1]}")
    defines = ["-DFASTVIT_HAS_SM90A"] if "90a" in names else []
    includes = [f"-isystem{path}" for path in (*toolchain.includes, headers(toolchain))]
    units = _kernels(sources, with_sm90a="90a" in names)
    threads = max(1, min(len(codes), _jobs() // max(1, len(units))))
    library.rules = {
        "nvcc": [toolchain.nvcc, "-ccbin", toolchain.cxx, *NVCC_FLAGS, *defines, f"--threads={threads}"],
        "cxx": [toolchain.cxx, *CXX_FLAGS, "-DUSE_CUDA", *defines, *includes],
    }
    for unit in units:
        own = ["arch=compute_90a,code=sm_90a"] if unit.name.endswith(ONLY_SM90A) else codes
        library.objects.append(("nvcc", unit, [word for code in own for word in ("-gencode", code)]))
    library.objects += [("cxx", unit, []) for unit in _binding(sources)]
    folders = [f"-L{path}" for path in toolchain.libraries]
    library.link = ["-Wl,--exclude-libs,ALL", *link_torch(toolchain), *folders, *"-lcudart_static -lrt -ldl".split()]
    library.info = {"architectures": list(names), "ptx": general[-1] if general else ""}
    return library


def host_library(toolchain: Toolchain, *, no_launch: bool = False, sources: Path = SOURCES) -> Library:
    """The same binding over emulated kernels, for tensors on the CPU; with `no_launch` over none, to be timed."""
    library = Library("host-no-launch" if no_launch else "host", toolchain, sources, texts(sources))
    defines = ["-DFASTVIT_HAS_SM90A", *(["-DSIMT_NO_LAUNCH"] if no_launch else [])]
    flags = [flag if flag != "-O1" or not no_launch else "-O2" for flag in HOST_FLAGS]
    library.rules = {
        "emulated": [toolchain.cxx, *flags, *defines, "-x", "c++"],
        "cxx": [toolchain.cxx, *CXX_FLAGS, *defines, "-DFASTVIT_EMULATED", f"-isystem{headers(toolchain)}"],
    }
    library.objects = [("emulated", unit, []) for unit in _kernels(sources, with_sm90a=True)]
    library.objects += [("cxx", unit, []) for unit in _binding(sources)]
    library.link = link_torch(toolchain)
    return library


def build(library: Library, target: Path, work: Path = WORK) -> bool:
    """Build `target`, and a description beside it; False if it was there already, of the same text and tools.

    Raises:
        BuildError: something does not compile. A library that was there before is left as it was.
    """
    key = _key(library)
    info = target.with_suffix(".json")
    if target.exists() and read_info(info).get("key") == key:
        return False
    folder = work_folder(library, work)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        (folder / "build.ninja").write_text(ninja_file(library), encoding="utf-8")
        command = [*library.toolchain.ninja, "-C", str(folder), f"-j{_jobs()}"]
        if subprocess.run(command, check=False).returncode:
            raise BuildError(f"{library.about} does not compile; the compiler's messages are above")
        info.unlink(missing_ok=True)
        _replace(target, (folder / BUILT).read_bytes())
        about = {"key": key, "sources": digest_of(library.sources, library.texts), **library.info}
        write_info(info, {"built": True, **about, "versions": library.toolchain.versions})
    return True


def work_folder(library: Library, work: Path = WORK) -> Path:
    """Where its objects are: those of other flags or tools have a folder of their own, so that going back to them costs
    nothing."""
    return work / f"{library.name}-{_digest(json.dumps([library.rules, library.toolchain.versions]))}"


def build_extension(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Build the library into `folder`, or write there why it is not built, and return that reason.

    Where nothing is to be built, a library that is there is left alone: it may have been built elsewhere.

    Raises:
        BuildError: as :func:`plan` and :func:`build`.
    """
    toolchain, reason = plan(environment)
    if toolchain is None:
        leave_out(folder / LIBRARY, reason)
        return reason
    names = architectures(environment.get("FASTVIT_CUDA_ARCHS", ""), toolchain.targets)
    print(f"nvcc: {toolchain.nvcc}", flush=True)
    build(cuda_library(toolchain, names), folder / LIBRARY)
    return ""


def leave_out(target: Path, reason: str) -> None:
    """Say beside it why a library is not built, unless one is there, which may come from elsewhere."""
    if not target.exists():
        write_info(target.with_suffix(".json"), {"built": False, "reason": reason})


def read_info(path: Path) -> dict[str, object]:
    """What :func:`write_info` wrote; {} if there is nothing."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def write_info(path: Path, info: Mapping[str, object]) -> None:
    """Describe the library that is beside the file, or why there is none."""
    _replace(path, (json.dumps(info, indent=2) + "\n").encode())


def texts(sources: Path) -> list[Path]:
    """Everything that is compiled into the extension, for a GPU or emulated."""
    found = (path for path in sorted(sources.rglob("*")) if path.suffix in (".h", ".cu", ".cpp"))
    return [path for path in found if path.relative_to(sources).parts[0] not in ("emulated", "cpu")]


def sources_digest(sources: Path = SOURCES) -> str:
    """Of all `texts`."""
    return digest_of(sources, texts(sources))


def digest_of(sources: Path, files: Sequence[Path]) -> str:
    """Of the names and the text of files."""
    parts = [(path.relative_to(sources).as_posix(), path.read_text(encoding="utf-8")) for path in files]
    return _digest(*(text for part in parts for text in part))


def ninja_file(library: Library) -> str:
    """The build.ninja that compiles and links a library."""
    lines = ["ninja_required_version = 1.8"]
    for name, words in library.rules.items():
        command = f"{shlex.join(words)} $flags -MD -MF $out.d -c $in -o $out"
        lines += [f"rule {name}", f"  command = {_escape(command, '$flags', '$out', '$in')}"]
        lines += ["  description = $in", "  depfile = $out.d", "  deps = gcc"]
    link = f"{shlex.join([library.toolchain.cxx, '-shared'])} $in {shlex.join(library.link)} -o $out.part"
    lines += ["rule link", f"  command = {_escape(f'{link} && mv $out.part $out', '$in', '$out')}"]
    lines += ["  description = link $out"]
    outputs = []
    for rule, source, flags in library.objects:
        name = source.relative_to(library.sources).as_posix().replace("/", ".")
        outputs.append(f"{name}.o" if f"{name}.o" not in outputs else f"{name}.{rule}.o")  # one source, several rules
        lines.append(f"build {outputs[-1]}: {rule} {_escape_path(source)}")
        if flags:
            lines.append(f"  flags = {_escape(shlex.join(flags))}")
    lines += [f"build {BUILT}: link {' '.join(outputs)}", f"default {BUILT}"]
    return "\n".join(lines) + "\n"


def _escape(text: str, *variables: str) -> str:
    """A command in a ninja file, in which these variables alone are ninja's."""
    text = text.replace("$", "$$")
    for variable in variables:
        text = text.replace("$" + variable, variable)
    return text


def _escape_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _kernels(sources: Path, *, with_sm90a: bool) -> list[Path]:
    return [path for path in sorted(sources.glob("*.cu")) if with_sm90a or not path.name.endswith(ONLY_SM90A)]


def _binding(sources: Path) -> list[Path]:
    """All but those of ops that are for the processor alone."""
    of_processor = {path.stem for path in (sources / "cpu").glob("*.cpp")}
    of_gpu = {path.stem for path in sources.glob("*.cu")}
    found = sorted((sources / "torch").glob("*.cpp"))
    return [path for path in found if path.stem in of_gpu or path.stem not in of_processor]


def headers(toolchain: Toolchain) -> str:
    """The folder of torch's headers."""
    return str(toolchain.torch / "include")


def link_torch(toolchain: Toolchain) -> list[str]:
    """The linker's options for torch, which is loaded before the library is."""
    return [f"-L{toolchain.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name) or 0)


def _jobs() -> int:
    jobs = os.environ.get("MAX_JOBS", "")
    return int(jobs) if jobs.isdigit() and int(jobs) else os.cpu_count() or 1


def _key(library: Library) -> str:
    """Of the sources, the commands and the tools."""
    commands = [library.rules, library.link, library.info, library.toolchain.versions]
    return _digest(digest_of(library.sources, library.texts), json.dumps(commands))


def _digest(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time builds in a folder."""
    import fcntl  # of systems that have nvcc

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, and leave alone the one that a process has loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _cxx() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _ninja() -> tuple[str, ...]:
    beside = Path(sys.executable).with_name("ninja")  # of an environment that is not on PATH
    found = shutil.which("ninja") or (str(beside) if beside.exists() else None)
    if found:
        return (found,)
    return (sys.executable, "-m", "ninja") if importlib.util.find_spec("ninja") else ()


def _torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return folder if folder and (folder / "include/torch/csrc/stable/library.h").exists() else None


def _torch_version(folder: Path) -> str:
    match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text(encoding="utf-8"))
    return f"torch {match[1] if match else 'unknown'}"


def _nvcc() -> str | None:
    # CUDA_HOME may be left from a toolkit that is no longer there, or name one that is not whole.
    home = os.environ.get("CUDA_HOME")
    places = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", f"{USUAL_CUDA_HOME}/bin/nvcc"]
    return next((found for place in places if (found := shutil.which(place))), None)


def _toolkit(nvcc: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Folders of CUDA's headers and libraries, as nvcc itself says: that on PATH may be a script somewhere else."""
    told = _output([nvcc, "--dryrun", "x.cu"])
    includes = re.findall(r'-I([^"\s]+)', "".join(re.findall(r"#\$ INCLUDES=(.*)", told)))
    libraries = re.findall(r'-L([^"\s]+)', "".join(re.findall(r"#\$ LIBRARIES=(.*)", told)))
    return (
        tuple(path for path in includes if (Path(path) / "cuda_runtime_api.h").exists()),
        tuple(path for path in libraries if (Path(path) / "libcudart_static.a").exists()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 1 if nothing was built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", type=Path, metavar="FILE", help="the library over emulated kernels, for the CPU")
    parser.add_argument("--no-launch", action="store_true", help="with --host: launch nothing, to time the binding")
    options = parser.parse_args(arguments)
    try:
        if options.host:
            toolchain, missing = find_toolchain(cuda=False)
            if toolchain is None:
                raise BuildError(f"there is no {'; no '.join(missing)}")
            build(host_library(toolchain, no_launch=options.no_launch), options.host.resolve())
            return 0
        reason = build_extension(ROOT / PACKAGE)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"not built: {reason}" if reason else f"built: {ROOT / PACKAGE / LIBRARY}")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
