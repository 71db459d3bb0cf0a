"""The build of the C++/CUDA extension: what it heeds, what it compiles and for which GPUs, and what it leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (75, 80, 86, 89, 90, 100, 120)  # of an nvcc


def toolchain(tool: Any) -> Any:
    return tool.Toolchain("/cxx", ("/ninja",), Path("/site/torch"), "/nvcc", ("/include",), ("/lib64",), TARGETS)


def commands(library: Any) -> dict[str, str]:
    """The flags of each file that is compiled by nvcc, by name."""
    rule = " ".join(library.rules["nvcc"])
    return {path.name: f"{rule} {' '.join(flags)}" for kind, path, flags in library.objects if kind == "nvcc"}


# What the variables mean


@pytest.mark.parametrize(("value", "mode"), [(None, "auto"), ("", "auto"), ("auto", "auto"), ("0", "0"), ("1", "1")])
def test_mode(tool: Any, value: str | None, mode: str) -> None:
    assert tool.build_mode({} if value is None else {"FASTVIT_BUILD_CUDA": value}) == mode


@pytest.mark.parametrize("value", ["2", "yes", "Auto"])
def test_unknown_mode(tool: Any, value: str) -> None:
    with pytest.raises(tool.BuildError, match=f"FASTVIT_BUILD_CUDA='{value}': accepted are auto, 0, 1"):
        tool.plan({"FASTVIT_BUILD_CUDA": value})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["80", "86", "89", "90a", "100", "120"]),
        ("90a", ["90a"]),
        ("120;80", ["80", "120"]),
        ("100, 90a 80;80", ["80", "90a", "100"]),
        ("90;90a", ["90", "90a"]),
        ("100f", ["100f"]),
    ],
)
def test_architectures(tool: Any, text: str, names: list[str]) -> None:
    assert tool.architectures(text, TARGETS) == names


def test_default_architectures_are_those_that_nvcc_knows(tool: Any) -> None:
    assert tool.architectures("", (80, 90)) == ["80", "90a"]


@pytest.mark.parametrize("text", ["95", "75", "sm_80", "8.0", "80;", "80;90b", "native", "compute_80"])
def test_unknown_architecture(tool: Any, text: str) -> None:
    with pytest.raises(tool.BuildError, match=re.escape(f"FASTVIT_CUDA_ARCHS={text!r}: ")) as error:
        tool.architectures(text, TARGETS)
    assert "accepted are 80, 86, 89, 90, 100, 120," in str(error.value)


# What is compiled


def test_every_file_is_compiled_for_every_architecture(tool: Any) -> None:
    library = tool.cuda_library(toolchain(tool), ["80", "90a", "100"])
    flags = commands(library)
    assert set(flags) == {path.name for path in (ROOT / "csrc").glob("*.cu")}
    for name, text in flags.items():
        codes = re.findall(r"code=(\w+)", text)
        # Code for 90a is for no other GPU, so that it is no PTX for later ones either.
        assert codes == (["sm_90a"] if name.endswith("_sm90a.cu") else ["sm_80", "sm_90a", "sm_100", "compute_100"])
        assert "-DFASTVIT_HAS_SM90A" in text
    binding = {path for kind, path, _ in library.objects if kind == "cxx"}
    of_processor = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} - set(
        Path(name).stem for name in flags
    )
    assert binding == {path for path in (ROOT / "csrc" / "torch").glob("*.cpp") if path.stem not in of_processor}
    assert library.info == {"architectures": ["80", "90a", "100"], "ptx": "100"}


def test_without_sm90a_its_file_is_left_out(tool: Any) -> None:
    library = tool.cuda_library(toolchain(tool), ["80", "90"])
    assert not [name for name in commands(library) if name.endswith("_sm90a.cu")]
    assert not [text for text in commands(library).values() if "SM90A" in text]
    assert "SM90A" not in " ".join(library.rules["cxx"])


def test_sm90a_alone_has_no_ptx(tool: Any) -> None:
    library = tool.cuda_library(toolchain(tool), ["90a"])
    assert library.info == {"architectures": ["90a"], "ptx": ""}
    assert not [text for text in commands(library).values() if "code=compute" in text]


def test_ninja_file_escapes(tool: Any, tmp_path: Path) -> None:
    sources = tmp_path / "a $folder: of mine"
    sources.mkdir()
    (sources / "x.cu").touch()
    library = tool.cuda_library(toolchain(tool), ["80"], sources)
    library.rules["nvcc"] = ["/opt/my cuda/nvcc", "-Da=$b"]
    text = tool.ninja_file(library)
    assert f"build x.cu.o: nvcc {tmp_path}/a$ $$folder$:$ of$ mine/x.cu\n" in text
    assert "  command = '/opt/my cuda/nvcc' '-Da=$$b' $flags -MD -MF $out.d -c $in -o $out\n" in text


# What it takes


@pytest.fixture
def nothing_here(tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without nvcc, ninja, compiler and torch."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(tool, "USUAL_CUDA_HOME", tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)


EVERYTHING = ("C++ compiler", "ninja (pip install ninja)", "torch with its headers", "nvcc (of the CUDA toolkit")


def test_auto_says_what_was_missing(tool: Any, nothing_here: None, tmp_path: Path) -> None:
    reason = tool.build_extension(tmp_path / "cuda", {})
    assert reason.startswith("where FastViT was installed there was no ")
    assert all(what in reason for what in EVERYTHING) and "--no-build-isolation" in reason
    assert tool.read_info(tmp_path / "cuda" / "_fastvit_cuda.json") == {"built": False, "reason": reason}


def test_one_fails_and_says_what_is_missing(tool: Any, nothing_here: None) -> None:
    with pytest.raises(tool.BuildError, match="FASTVIT_BUILD_CUDA=1, but there is no ") as error:
        tool.plan({"FASTVIT_BUILD_CUDA": "1"})
    assert all(what in str(error.value) for what in EVERYTHING)


def test_zero_leaves_it_out(tool: Any, tmp_path: Path) -> None:
    assert tool.build_extension(tmp_path, {"FASTVIT_BUILD_CUDA": "0"}) == "it was left out: FASTVIT_BUILD_CUDA=0"
    assert not tool.read_info(tmp_path / "_fastvit_cuda.json")["built"]


def test_a_library_from_elsewhere_is_kept(tool: Any, tmp_path: Path) -> None:
    library, info = tmp_path / "_fastvit_cuda.so", tmp_path / "_fastvit_cuda.json"
    library.write_bytes(b"built elsewhere")
    tool.write_info(info, {"built": True})
    tool.build_extension(tmp_path, {"FASTVIT_BUILD_CUDA": "0"})
    assert library.read_bytes() == b"built elsewhere" and tool.read_info(info) == {"built": True}


def test_nvcc_is_looked_for_in_every_place(tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, usual, on_path = tmp_path / "home", tmp_path / "usual", tmp_path / "path"
    places = [home / "bin" / "nvcc", on_path / "nvcc", usual / "bin" / "nvcc"]
    for place in places:
        place.parent.mkdir(parents=True)
        place.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.setattr(tool, "USUAL_CUDA_HOME", usual)
    for place in places:
        assert tool._nvcc() == str(place)
        place.unlink()
    assert tool._nvcc() is None
    places[2].touch(mode=0o755)
    monkeypatch.delenv("CUDA_HOME")
    assert tool._nvcc() == str(places[2])


def test_toolkit_is_where_nvcc_says_it_is(tool: Any, tmp_path: Path) -> None:
    include, libraries = tmp_path / "include", tmp_path / "lib"
    for path in (include / "cuda_runtime_api.h", libraries / "libcudart_static.a"):
        path.parent.mkdir()
        path.touch()
    script = tmp_path / "somewhere else" / "nvcc"
    script.parent.mkdir()
    script.write_text(
        f"#!/bin/sh\necho '#$ INCLUDES=\"-I{include}\"  ' >&2\n"
        f'echo \'#$ LIBRARIES=  "-L{tmp_path}/stubs" "-L{libraries}"\' >&2\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    assert tool._toolkit(str(script)) == ((str(include),), (str(libraries),))


# What is left


def test_library_is_built_whole_or_not_at_all(
    stub_tool: Any, stub_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, environment = stub_tree / "fastvit" / "cuda", {"FASTVIT_CUDA_ARCHS": "80;90a"}
    library, info = folder / "_fastvit_cuda.so", folder / "_fastvit_cuda.json"
    stub_tool.build_extension(folder, environment)
    assert f"nvcc: {stub_tool._nvcc()}\n" in capsys.readouterr().out
    described = json.loads(info.read_text(encoding="utf-8"))
    assert described["built"] and described["architectures"] == ["80", "90a"] and described["ptx"] == "80"
    assert described["sources"] == stub_tool.sources_digest()
    check_symbols(library)
    check_code(library)
    check_registration(library, stub_tree)

    # A second build asks no compiler.
    (objects,) = (stub_tree / "build" / "extension").glob("cuda-*")
    written = [path.stat().st_mtime_ns for path in (library, objects / "build.ninja")]
    stub_tool.build_extension(folder, environment)
    assert [path.stat().st_mtime_ns for path in (library, objects / "build.ninja")] == written

    # A changed file is compiled, and no other.
    kernel, other = objects / "stub_sm90a.cu.o", objects / "torch.add_position.cpp.o"
    times = kernel.stat().st_mtime_ns, other.stat().st_mtime_ns
    source = stub_tree / "csrc" / "stub_sm90a.cu"
    text = source.read_text(encoding="utf-8")
    source.write_text(text + "// more\n", encoding="utf-8")
    stub_tool.build_extension(folder, environment)
    assert kernel.stat().st_mtime_ns != times[0] and other.stat().st_mtime_ns == times[1]
    assert json.loads(info.read_text(encoding="utf-8"))["key"] != described["key"]

    # One that does not compile leaves everything as it was.
    before, contents = library.read_bytes(), sorted(path.name for path in folder.iterdir())
    source.write_text(text + "#error no\n", encoding="utf-8")
    with pytest.raises(stub_tool.BuildError, match="does not compile"):
        stub_tool.build_extension(folder, environment)
    assert library.read_bytes() == before and sorted(path.name for path in folder.iterdir()) == contents
    source.write_text(text, encoding="utf-8")

    check_wheel(stub_tree, environment)


def check_symbols(library: Path) -> None:
    """Nothing of torch but its stable ABI, and nothing of CUDA but the driver that the static runtime opens."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", "-C", library], capture_output=True, text=True, check=True)
    assert "aoti_torch_get_current_cuda_stream" in listed.stdout
    assert not re.findall(r"\b(?:at|c10|torch)::\S+", listed.stdout)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch.so" in needed and "cudart" not in needed


def check_code(library: Path) -> None:
    """Machine code for both architectures, and PTX for later ones."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return  # whose wheel has the tool that tells
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = [
        subprocess.run([cuobjdump, option, library], capture_output=True, text=True, check=True).stdout
        for option in ("-lelf", "-lptx")
    ]
    assert set(re.findall(r"\.(sm_\w+)\.", found[0])) == {"sm_80", "sm_90a"}
    assert set(re.findall(r"\.(sm_\w+)\.", found[1])) == {"sm_80"}


def check_registration(library: Path, folder: Path) -> None:
    """It loads and registers its ops; a torch without CUDA lacks one function for it, which is put in its place."""
    source, stand_in = folder / "stream.c", folder / "stream.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int i, void** s) { return 1; }\n", encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", stand_in], check=True)
    code = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print([has('fastvit::add_position_cuda', key) for key in ('CUDA', 'CPU')])"
    )
    environment = {**os.environ, "LD_PRELOAD": str(stand_in)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "[True, False]", done.stderr


def check_wheel(tree: Path, environment: dict[str, str]) -> None:
    """The wheel has the library, is bound to the platform, and to no version of Python."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    modes = {"FASTVIT_BUILD_CUDA": "1", "FASTVIT_BUILD_NATIVE": "0"}
    done = subprocess.run(
        [*command, "-w", tree / "wheels", tree],
        capture_output=True, text=True, check=False, env={**os.environ, **environment, **modes},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "wheels").glob("*.whl")
    assert re.fullmatch(r"fastvit-[^-]+-py3-none-(?!any)\w+\.whl", wheel.name)
    archive = zipfile.ZipFile(wheel)
    assert "fastvit/cuda/_fastvit_cuda.so" in archive.namelist()
    assert json.loads(archive.read("fastvit/cuda/_fastvit_cuda.json"))["architectures"] == ["80", "90a"]
