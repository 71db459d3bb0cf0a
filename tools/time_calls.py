"""How long a call keeps the host: of the C++/CUDA extension, everything but the kernels, which are not launched; of an
accelerated model, the look before each call at whether it still is what it was; and of a transformer block among
others, all of it, beside the library's own in turns.

    python tools/time_calls.py [blocks]

Needs no GPU: the binding is built for the CPU over launches that do nothing. On a GPU the stream, the device guard and
the launches themselves, some microseconds each, come on top: of these an accelerated block has fewer (`fastvit bench
traffic`). `torch.add` of as many values is there to compare with. Times are those of the thread, the least of many
rounds.
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from build_extension import WORK, build, find_toolchain, host_library

from fastvit import functional
from fastvit.guards import why_no_projection
from fastvit.interop import accelerate
from fastvit.interop.host import fused
from fastvit.peers import import_peer, peer_missing

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ROUNDS, CALLS = 15, 2000
DEPTH, ROUNDS_IN_TURNS, CALLS_IN_TURNS = 6, 40, 20


def main() -> int:
    toolchain, missing = find_toolchain(cuda=False)
    if toolchain is None:
        print(f"there is no {'; no '.join(missing)}")
        return 1
    library = WORK / "time_calls.so"
    build(host_library(toolchain, no_launch=True), library)
    torch.ops.load_library(str(library))
    torch.set_num_threads(1)
    pretend_to_be_cuda()
    if sys.argv[1:] != ["blocks"]:
        for name, call in {**calls(), **guards()}.items():
            median, least = microseconds(call)
            print(f"{name:38} {median:7.2f} us median, {least:7.2f} us least")
    print(f"\na block of {DEPTH}, us of the host: the library's -> accelerated")
    for library, modes in blocks().items():
        for mode, (theirs, ours) in modes.items():
            before, after = (1e6 * seconds / DEPTH for seconds in in_turns(theirs, ours))
            print(f"{library:14} {mode:22} {before:7.1f} -> {after:7.1f}   {after / before:.2f}")
    return 0


def guards() -> dict[str, Callable[[], Any]]:
    """What is looked at before a call, of a model of each library that is here."""
    found: dict[str, Callable[[], Any]] = {}
    for library, model in accelerated_models().items():
        part: Any = next(module for module in model.modules() if fused(module))
        images = torch.zeros(1, 3, 32, 32)
        if part.why_not(part) or part.why_not_of(images):
            raise RuntimeError(f"{library}: {part.why_not(part) or part.why_not_of(images)}")
        found[f"guard, {library}"] = lambda part=part, images=images: (part.why_not(part), part.why_not_of(images))
    projection = torch.nn.Conv2d(3, 8, 16, 16)
    found["guard, of a projection alone"] = lambda: why_no_projection(projection)
    found["for comparison, projection.weight"] = lambda: projection.weight
    return found


def accelerated_models(**options: Any) -> dict[str, torch.nn.Module]:
    """A small one of each library that is here."""
    return {name: accelerate(build(), **options) for name, build in MODELS.items() if not peer_missing(name)}


def _timm(depth: int = 1) -> torch.nn.Module:
    size = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": depth, "num_heads": 1}
    return import_peer("timm").create_model("vit_tiny_patch16_224", **size)  # type: ignore[no-any-return]


def _torchvision(depth: int = 1) -> torch.nn.Module:
    return import_peer("torchvision").models.VisionTransformer(32, 16, depth, 1, 8, 32)  # type: ignore[no-any-return]


def _transformers(depth: int = 1) -> torch.nn.Module:
    config = {"image_size": 32, "hidden_size": 8, "num_hidden_layers": depth, "num_attention_heads": 1}
    library = import_peer("transformers")
    return library.ViTModel(library.ViTConfig(**config, intermediate_size=32))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[..., torch.nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def blocks() -> dict[str, dict[str, tuple[Callable[[], Any], Callable[[], Any]]]]:
    """Of each library that is here what blocks do one after another, by the library's code and accelerated, on hardly
    any data: as the library has it, and by the trunk's ops, which do nothing here. Kernels of PyTorch that are as small
    as that take about as long as a launch."""
    found = {}
    for library, build_model in MODELS.items():
        if peer_missing(library):
            continue
        theirs = build_model(DEPTH).train()
        ours = accelerate(copy.deepcopy(theirs), backend="cuda")
        pair = [sequence_of(model) for model in (theirs, ours)]
        x = torch.randn(1, 5, 8, requires_grad=True)
        found[library] = {
            mode: tuple(functools.partial(function, model, x) for model in pair)
            for mode, function in {
                "forward, no gradients": without_gradients,
                "forward": forward_of,
                "forward and backward": step_of,
            }.items()
        }
    return found  # type: ignore[return-value]


def sequence_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module that has the blocks."""
    part: Any = next(module for module in model.modules() if len(module._modules) == DEPTH)
    return part  # type: ignore[no-any-return]


def forward_of(blocks: Any, x: torch.Tensor) -> torch.Tensor:
    """Under autocast, as models are trained."""
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(blocks, torch.nn.Sequential):
            return blocks(x)  # type: ignore[no-any-return]
        for block in blocks:
            found = block(x)
            x = found[0] if isinstance(found, tuple) else found
    return x


def without_gradients(blocks: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        forward_of(blocks, x)


def step_of(blocks: Any, x: torch.Tensor) -> None:
    result = forward_of(blocks, x)
    torch.autograd.grad(result, [x, *blocks.parameters()], torch.ones_like(result))


def in_turns(*functions: Callable[[], Any]) -> list[float]:
    """The least seconds of a call of each."""
    least = [float("inf")] * len(functions)
    for _ in range(ROUNDS_IN_TURNS):
        for place, function in enumerate(functions):
            start = time.thread_time()
            for _ in range(CALLS_IN_TURNS):
                function()
            least[place] = min(least[place], (time.thread_time() - start) / CALLS_IN_TURNS)
    return least


def pretend_to_be_cuda() -> None:
    """Let the backend "cuda" run on the CPU, over the library without launches."""
    from fastvit import backend

    backend._REASONS["cuda"] = lambda device_type: ""
    both_ways = ("patch_embed", "add_position", "add_norm", "bias_act", "half_block")
    names = [f"{op}{way}_cuda" for op in both_ways for way in ("", "_backward")]
    for name in (*names, "split_heads_backward_cuda"):
        setattr(torch.ops.fastvit, name, getattr(torch.ops.fastvit_host, name))


def calls() -> dict[str, Callable[[], Any]]:
    """Calls of small tensors, by name."""
    ops, bf16 = torch.ops.fastvit_host, torch.bfloat16
    tokens, positions, prefix = torch.randn(1, 4, 8), torch.randn(4, 8), torch.randn(1, 8)
    images, weight, bias = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.randn(8, 3, 16, 16), torch.randn(8)
    constants = torch.ones(4, 3)
    grad = torch.randn(1, 5, 8).to(bf16)
    needs = [False, True, True, True]
    stream, branch, vector, statistics = (
        torch.randn(1, 4, 8),
        torch.randn(1, 4, 8).to(bf16),
        torch.randn(8),
        torch.ones(2, 4),
    )
    heads = torch.randn(1, 2, 4, 8).to(bf16)
    return {
        "torch.add": lambda: torch.add(tokens, positions),
        "torch.add, bfloat16 result": lambda: torch.add(tokens, positions).to(bf16),
        "add_position_cuda": lambda: ops.add_position_cuda(tokens, positions, prefix, bf16),
        "add_position_cuda, no prefix": lambda: ops.add_position_cuda(tokens, positions, None, bf16),
        "add_position_backward_cuda": lambda: ops.add_position_backward_cuda(grad),
        "add_norm_cuda": lambda: ops.add_norm_cuda(
            stream, branch, vector, None, None, vector, vector, 1e-6, False, torch.float32, bf16
        ),
        "add_norm_backward_cuda": lambda: ops.add_norm_backward_cuda(
            stream, branch, stream, branch, vector, None, None, vector, vector, statistics, False, torch.float32
        ),
        "bias_act_cuda": lambda: ops.bias_act_cuda(branch, vector, None, None, 0, 0.0, 0.0, None, bf16),
        "bias_act_backward_cuda": lambda: ops.bias_act_backward_cuda(
            branch, branch, vector, None, None, 0, 0.0, 0.0, None
        ),
        "split_heads_backward_cuda": lambda: ops.split_heads_backward_cuda(heads, heads, heads, True),
        "patch_embed_cuda": lambda: ops.patch_embed_cuda(
            images, weight, bias, positions, prefix, None, constants, bf16, bf16, False
        ),
        "fastvit.functional.add_position": lambda: functional.add_position(
            tokens, positions, prefix=prefix, backend="cuda"
        ),
        "fastvit.functional.add_norm": lambda: functional.add_norm(
            stream, branch, vector, weight=vector, norm_bias=vector, eps=1e-6, dtype=bf16, backend="cuda"
        ),
        "fastvit.functional.bias_act": lambda: functional.bias_act(branch, vector, backend="cuda"),
        "fastvit.functional.patch_embed": lambda: functional.patch_embed(
            images, weight, bias, pos_embed=positions, prefix=prefix, mean=MEAN, std=STD, dtype=bf16, backend="cuda"
        ),
        "patch_embed_backward_cuda": lambda: ops.patch_embed_backward_cuda(
            grad, grad, images, weight, None, constants, constants, bf16, 1, False, True, needs
        ),
    }


def microseconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Median and least of the rounds."""
    timeit.timeit(call, number=CALLS)
    rounds = [1e6 * timeit.timeit(call, number=CALLS) / CALLS for _ in range(ROUNDS)]
    return statistics.median(rounds), min(rounds)


if __name__ == "__main__":
    sys.exit(main())
