"""Every example runs at a tiny size on real images, and learns the same with the one line and without it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MARK = "# <-- the one line"
TINY = ("--tiny", "--epochs", "1")
TOLERANCE = 1e-5  # of a loss in float32, over the 13 steps of TINY; with more steps rounding grows as in any training

# Example → the packages it needs.
NEEDS = {
    "timm_training": ("timm", "torchvision", "tqdm"),
    "huggingface_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning", "timm", "torchvision"),
    "mae_pretraining": ("transformers", "tqdm"),
    "torchvision_finetune": ("torchvision", "tqdm"),
}
OWN = {"mixed_sizes": ("tqdm",)}  # of FastViT's own model, without a line to put into another's
RAW = [name for name in NEEDS if name != "mae_pretraining"]  # that one takes raw uint8 without being asked


@dataclass(frozen=True)
class Run:
    """An example's end."""

    code: int
    out: str
    errors: str
    launches: int

    @property
    def loss(self) -> float:
        found = re.search(r"^loss ([\d.]+), .*\d+ images/s$", self.out, re.MULTILINE)
        assert self.code == 0 and found, self.out + self.errors
        return float(found[1])


class Runner:
    """Runs examples in a process of their own, in a folder that is not the repository."""

    def __init__(self, folder: Path) -> None:
        # Without a network, and without TF32, which a GPU has on for convolutions; results fit on a line.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NVIDIA_TF32_OVERRIDE": "0", "COLUMNS": "200"}
        command = [sys.executable, str(Path(__file__).with_name("runner.py"))]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.folder = folder

    def __call__(self, name: str, *options: str, source: str | None = None, missing: Sequence[str] = ()) -> Run:
        _skip_without(name)
        assert self.process.stdin is not None and self.process.stdout is not None
        path = EXAMPLES / f"{name}.py"
        text = path.read_text(encoding="utf-8") if source is None else source
        job = {"path": str(path), "source": text, "options": options, "missing": missing}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"{name}: the process of the examples ended, see stderr"
        return Run(**json.loads(answer))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _skip_without(name: str) -> None:
    for package in {**NEEDS, **OWN}[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("elsewhere"))
    yield runner
    runner.close()


def without_the_line(name: str) -> str:
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if MARK not in line)


def test_every_example_is_tested_and_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"images"}
    assert names == {*NEEDS, *OWN}
    listed = set(re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed >= names


@pytest.mark.parametrize("name", NEEDS)
def test_the_line_is_one_and_can_be_read_at_once(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert source.count("fastvit.accelerate(") == source.count(MARK) == 1
    assert re.search(rf"^ +fastvit\.accelerate\([\w.]+, mean=MEAN, std=STD\)  {MARK}$", source, re.MULTILINE)
    assert len(source.splitlines()) <= 120


@pytest.mark.parametrize("name", NEEDS)
def test_the_line_changes_nothing_but_the_code_that_runs(run: Runner, name: str) -> None:
    accelerated = run(name, *TINY)
    assert accelerated.launches > 0
    assert "accelerated in" in accelerated.out
    before = run(name, *TINY, source=without_the_line(name))
    assert before.launches == 0
    assert "not accelerated" in before.out
    assert accelerated.loss == pytest.approx(before.loss, rel=TOLERANCE)
    plain = run(name, *TINY, "--plain")
    assert plain.launches == 0
    assert plain.loss == before.loss
    assert list(run.folder.iterdir()) == []  # no logs, no checkpoints


@pytest.mark.parametrize("name", NEEDS)
def test_the_loss_is_that_of_these_images_and_this_seed(run: Runner, name: str) -> None:
    # A loss that is the same whatever the images would agree before and after, too.
    losses = {run(name, *TINY, *options).loss for options in ((), ("--seed", "1"), ("--data", "digits"))}
    assert len(losses) == 3
    assert all(abs(a - b) > 100 * TOLERANCE * a for a in losses for b in losses - {a})


@pytest.mark.parametrize("name", RAW)
def test_raw_uint8_gives_the_same_loss(run: Runner, name: str) -> None:
    raw = run(name, *TINY, "--raw")
    assert raw.launches > 0
    assert raw.loss == pytest.approx(run(name, *TINY).loss, rel=TOLERANCE)


@pytest.mark.parametrize("name", NEEDS)
def test_a_folder_of_images(run: Runner, name: str, tmp_path: Path) -> None:
    from PIL import Image

    from fastvit.validation import photographs

    for index, crop in enumerate(photographs(20, 48, 40)):
        path = tmp_path / ("china", "flower")[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(path)
    found = run(name, *TINY, "--batch-size", "8", "--data", str(tmp_path))
    assert found.launches > 0
    assert found.loss > 0


def test_workers_load_the_same_images(run: Runner) -> None:
    assert run("mae_pretraining", *TINY, "--workers", "1").loss == run("mae_pretraining", *TINY).loss


@pytest.mark.full
@pytest.mark.parametrize("name", NEEDS)
def test_the_command(name: str, tmp_path: Path) -> None:
    """As a user types it, but for torchvision beside a torch that its wheel was not made for."""
    _skip_without(name)
    prelude = tmp_path / "prelude" / "sitecustomize.py"
    prelude.parent.mkdir()
    prelude.write_text('from fastvit.peers import import_peer\nimport_peer("torchvision")\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *TINY],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(prelude.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "accelerated in" in done.stdout and "images/s" in done.stdout


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--data", "/nonexistent"), "argument --data: /nonexistent is no folder; accepted: photographs, digits, or a"),
        (("--data", "."), "argument --data: .: no class directories; expected FOLDER/<class>/<image>"),
        (("--epochs", "0"), "argument --epochs: 0 is no whole number from 1 up"),
        (("--workers", "-1"), "argument --workers: -1 is no whole number from 0 up"),
    ],
)
def test_bad_options_are_named(run: Runner, name: str, options: tuple[str, ...], expected: str) -> None:
    found = run(name, *TINY, *options)
    assert found.code == 2
    assert expected in found.errors.splitlines()[-1]


@pytest.mark.parametrize("name", RAW)
def test_raw_needs_the_line(run: Runner, name: str) -> None:
    found = run(name, *TINY, "--raw", "--plain")
    assert found.code == 2
    assert "--plain: not allowed with argument --raw" in found.errors


@pytest.mark.parametrize(("name", "package"), [(name, package) for name in NEEDS for package in NEEDS[name][:1]])
def test_a_missing_package_is_named(run: Runner, name: str, package: str) -> None:
    found = run(name, *TINY, missing=[package])
    assert found.code == 1
    assert found.out == ""
    assert re.fullmatch(rf".*{package}.*; pip install .*\b{package}\b.*\n", found.errors)


@pytest.mark.parametrize("name", NEEDS)
def test_help(run: Runner, name: str) -> None:
    found = run(name, "--help")
    assert found.code == 0
    assert "--data" in found.out and "one line accelerates" in found.out


def test_torchvision_weights(run: Runner, tmp_path: Path) -> None:
    found = run("torchvision_finetune", *TINY, "--weights", str(tmp_path / "none.pth"))
    assert found.code == 1
    assert re.fullmatch(r"--weights .*none\.pth: .*No such file.*\n", found.errors)


def test_timm_mixup(run: Runner) -> None:
    mixed = run("timm_training", *TINY, "--mixup", "0.8")
    assert mixed.launches > 0
    assert mixed.loss != run("timm_training", *TINY).loss
    refused = run("timm_training", *TINY, "--mixup", "0.8", "--raw")
    assert refused.code == 2
    assert "--mixup: mixes normalised images; leave out --raw" in refused.errors


def test_images_of_mixed_sizes_are_learnt(run: Runner) -> None:
    found = run("mixed_sizes", "--tiny", "--epochs", "4", "--tokens-per-batch", "256")
    assert found.launches > 30 and found.loss < 0.55  # of two classes: 0.69 by chance
    accuracy = re.search(r"accuracy ([\d.]+)", found.out)
    assert accuracy and float(accuracy[1]) > 0.7
    assert found.loss != run("mixed_sizes", "--tiny", "--epochs", "4", "--seed", "1").loss
    assert list(run.folder.iterdir()) == []
    wrong = run("mixed_sizes", "--max-tokens", "0")
    assert wrong.code == 2 and "--max-tokens: 0 is less than 1" in wrong.errors
