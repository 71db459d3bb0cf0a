"""Where the time of a step goes: time per kernel, of ours or of a rival, so that data says what to optimise next.

    python -m fastvit.benchmarks.profiling [--model S] [--batch N] [--provider fastvit] [--mode step] [--compiled] ...

After warm-up, one call is recorded by torch.profiler: on a GPU the time of each kernel, on a CPU each operator's own
time. A training step is forward, cross-entropy, backward and a fused AdamW step; on a GPU under bfloat16 autocast, on
a CPU in float32. The time of the step itself is measured without the profiler, which slows the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text
from torch import nn
from torch.autograd import DeviceType

from fastvit.backend import BACKENDS, available_backends
from fastvit.benchmarks import model, models
from fastvit.benchmarks.problem import COMPILED, FORWARD, STEP, Unavailable
from fastvit.benchmarks.rows import commit, device_name, versions
from fastvit.benchmarks.timing import Call, quiet_errors

OURS = "fastvit"
PROVIDERS: dict[str, Callable[..., nn.Module]] = {OURS: models.ours, **models.RIVALS}
MODES = {"forward": FORWARD, "step": STEP}
WARM_UP, ROUNDS = 3, 5
OTHER = "other"
# What a kernel's name says of its purpose: the first class that has a part of the name, in lower case.
CLASSES: dict[str, tuple[str, ...]] = {
    "fused block ops": ("add_norm", "bias_act", "pack_heads", "split_heads"),
    "patch embedding": (
        "fastvit::", "patch_embed", "add_position", "prepare_weight", "position_table", "reduce_weight_gradient",
        "sum_rows", "sum_segments", "packed_forward", "packed_weight_gradient", "place_rows", "sum_positions",
    ),
    "attention": ("attention", "flash", "fmha", "sdpa", "mem_eff"),
    "optimizer": ("optimizer", "adam", "multi_tensor"),
    "norm": ("layer_norm", "layernorm", "gammabeta", "rms_norm", "rmsnorm"),
    # A ViT has one convolution, the patch embedding of those who use one.
    "convolution": ("convol", "conv2d", "cudnn", "fprop", "wgrad", "dgrad", "nchwtonhwc", "nhwctonchw"),
    "gemm": (
        "gemm", "nvjet", "cutlass", "xmma", "cublas", "gemv", "splitk", "triton_tem", "aten::mm", "aten::addmm",
        "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "linear_pointwise",
    ),
    "copy/memset": (
        "memcpy", "memset", "copy_kernel", "catarray", "fillfunctor", "aten::copy_", "aten::clone", "aten::_to_copy",
        "aten::contiguous", "aten::cat", "aten::zero_", "aten::fill_",
    ),
    "reduction": ("reduce", "softmax", "nll_loss", "triton_red", "triton_per", "aten::sum", "aten::mean"),
    "elementwise": (
        "elementwise", "triton_poi", "cpp_fused", "gelu", "aten::add", "aten::mul", "aten::sub", "aten::div",
        "aten::neg", "aten::sqrt", "aten::exp",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One model on one batch of images [batch, 3, 224, 224], and what is done with it.

    `provider` is of PROVIDERS; fastvit:<backend> is ours by one backend.
    """

    model: str = "S"
    batch: int = 256
    provider: str = OURS
    mode: str = "step"
    compiled: bool = False

    def __str__(self) -> str:
        how = f" {COMPILED}" if self.compiled else ""
        return f"ViT-{self.model}/16 224, batch {self.batch}, {self.provider}{how}, {MODES[self.mode]}"


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in the step: microseconds together, and as a share of the time of all kernels."""

    name: str
    group: str  # of CLASSES, or OTHER
    us: float
    share: float
    count: int


@dataclass(frozen=True)
class Profile:
    """The kernels of one step, the longest first. `step_us`: the median time of a step without the profiler."""

    setup: Setup
    device: str
    versions: dict[str, str]
    dtype: str
    step_us: float
    kernels: tuple[Kernel, ...]

    @property
    def kernels_us(self) -> float:
        """The time of all kernels together."""
        return sum(kernel.us for kernel in self.kernels)

    def groups(self) -> dict[str, tuple[float, float, int]]:
        """Class → microseconds, share, launches; the longest first."""
        found: dict[str, tuple[float, float, int]] = {}
        for kernel in self.kernels:
            us, share, count = found.get(kernel.group, (0.0, 0.0, 0))
            found[kernel.group] = (us + kernel.us, share + kernel.share, count + kernel.count)
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def to_json_lines(self) -> Iterator[str]:
        """A line for each kernel, each of which stands alone."""
        about = {**asdict(self.setup), "device": self.device, "dtype": self.dtype, "step_us": round(self.step_us, 1)}
        about |= {"versions": self.versions, "commit": commit()}
        for kernel in self.kernels:
            yield json.dumps({**asdict(kernel), **about})


def class_of(name: str) -> str:
    """The class of a kernel or an operator."""
    name = name.lower()
    return next((group for group, parts in CLASSES.items() if any(part in name for part in parts)), OTHER)


def profile(setup: Setup, device: str | torch.device, **overrides: Any) -> Profile:
    """Profile one call after warm-up.

    Args:
        setup: what to profile.
        device: a CPU or a CUDA device.
        overrides: arguments of the model, such as `depth`.

    Raises:
        Unavailable: the provider is not installed, or its backend can't run here.
    """
    device = torch.device(device)
    call = _call(setup, device, overrides)
    on_gpu = device.type == "cuda"

    def step() -> None:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)

    timeit.timeit(step, number=WARM_UP)
    step_us = 1e6 * statistics.median(timeit.repeat(step, number=1, repeat=ROUNDS))
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with quiet_errors(), torch.profiler.profile(activities=activities) as recorded:
        step()
    kernels = tuple(sorted(_kernels(recorded.key_averages(), on_gpu), key=lambda kernel: -kernel.us))
    dtype = "bfloat16 autocast" if on_gpu else "float32"
    return Profile(setup, device_name(device), versions(device.type), dtype, step_us, kernels)


def _call(setup: Setup, device: torch.device, overrides: dict[str, Any]) -> Call:
    """The forward pass, or the training step, of a fresh model on random images: what the suite `model` times."""
    provider, _, backend = setup.provider.partition(":")
    reason = available_backends(device)[backend] if backend else ""
    if reason:
        raise Unavailable(reason)
    residual = torch.float32 if device.type == "cuda" else None  # autocast on a GPU alone
    suite = model.Setup(setup.model, setup.batch, device, residual, overrides)
    torch._dynamo.reset()
    how = COMPILED if setup.compiled else ""
    return model.timed_model(PROVIDERS[provider], suite, *suite.data(), MODES[setup.mode], backend, how)


def _kernels(events: Sequence[Any], on_gpu: bool) -> Iterator[Kernel]:
    """What the profiler recorded, by name. On a GPU its own annotations span kernels, and would count them twice."""
    times: dict[str, tuple[float, int]] = {}
    for event in events:
        if on_gpu and (event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False)):
            continue
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        before, count = times.get(event.key, (0.0, 0))
        times[event.key] = (before + us, count + event.count)
    total = sum(us for us, _ in times.values()) or 1.0
    for name, (us, count) in times.items():
        yield Kernel(name, class_of(name), round(us, 2), round(us / total, 5), count)


def format_table(found: Profile, top: int = 15) -> RenderableType:
    """The classes, and the `top` longest kernels."""

    def table(title: str, first: str, *more: str) -> Table:
        numbers = [Column(heading, justify="right") for heading in ("time", "share", "count")]
        return Table(Column(first, max_width=100, no_wrap=True), *numbers, *more, title=title)

    classes = table("time by class", "class")
    kernels = table(f"the longest of {len(found.kernels)} kernels", "kernel", "class")
    for group, (us, share, count) in found.groups().items():
        classes.add_row(group, _milliseconds(us), f"{share:.1%}", str(count))
    for kernel in found.kernels[:top]:
        cells = (_milliseconds(kernel.us), f"{kernel.share:.1%}", str(kernel.count), kernel.group)
        kernels.add_row(Text(kernel.name), *cells)  # a name in brackets is no markup
    about = f"{found.device}, {found.dtype}: a step takes {_milliseconds(found.step_us)}, its kernels together "
    return Group(Text(str(found.setup)), classes, kernels, Text(about + _milliseconds(found.kernels_us)))


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1000:.2f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    about_this = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.profiling", description=about_this)
    parser.add_argument("--model", choices=models.NAMES, default="S")
    parser.add_argument("--batch", type=int, help="images; default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu or cuda; default: a GPU where there is one")
    parser.add_argument("--mode", choices=MODES, default="step")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    providers = [*PROVIDERS, *(f"{OURS}:{backend}" for backend in BACKENDS)]
    parser.add_argument("--provider", choices=providers, default=OURS)
    parser.add_argument("--top", type=int, default=15, help="kernels to list")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each kernel instead")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        parser.error("--device cuda: no CUDA device; accepted is cpu")
    device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
    batch = options.batch or (256 if device.type == "cuda" else 8)
    setup = Setup(options.model, batch, options.provider, options.mode, options.compiled)
    try:
        found = profile(setup, device)
    except Unavailable as error:
        print(f"error: --provider {options.provider}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print("\n".join(found.to_json_lines()))
    else:
        Console(width=160).print(format_table(found, options.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
