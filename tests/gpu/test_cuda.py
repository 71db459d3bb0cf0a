"""What only a real GPU shows: CUDA graphs, streams, other devices, waits, huge offsets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastvit import functional
from fastvit.backend import launch_counts
from fastvit.validation import Inputs, PatchEmbedCase, make_inputs, poisoned, validate
from fastvit.validation.ops import truth
from fastvit.validation.runner import backend_candidate, check_inputs
from fastvit.validation.tolerance import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASE = PatchEmbedCase("graph", batch=4, grid=(14, 14), width=384, images="uint8", normalise=True)
MASKED = PatchEmbedCase("masked", batch=4, grid=(14, 14), width=384, images="uint8", normalise=True, keep=49)
CASES = pytest.mark.parametrize("case", [CASE, MASKED], ids=lambda case: case.name)


def _run(kernels: str, inputs: Inputs, images: Tensor | None = None) -> list[Tensor]:
    """Tokens and all parameter gradients, by the kernels of a backend."""
    tensors = inputs.tensors
    weight, bias, pos_embed, prefix = leaves = [
        _known(tensors[name]).detach().requires_grad_() for name in ("weight", "bias", "pos_embed", "prefix")
    ]
    out = functional.patch_embed(
        _known(tensors["images"]) if images is None else images,
        weight,
        bias,
        pos_embed=pos_embed,
        prefix=prefix,
        mean=inputs.mean,
        std=inputs.std,
        keep=inputs.keep,
        backend=kernels,
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)]


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"tensor {index} differs"


@CASES
def test_a_cuda_graph_replays_forward_and_backward(case: PatchEmbedCase, kernels: str) -> None:
    inputs, others = (make_inputs(case, torch.bfloat16, "cuda", seed) for seed in (0, 1))
    images = _known(inputs.tensors["images"]).clone()
    expected, expected_other = _run(kernels, inputs), _run(kernels, inputs, _known(others.tensors["images"]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _run(kernels, inputs, images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _run(kernels, inputs, images)
    graph.replay()
    _assert_same_bits(found, expected)
    images.copy_(_known(others.tensors["images"]))
    graph.replay()
    _assert_same_bits(found, expected_other)


@CASES
def test_two_streams_do_not_disturb_each_other(case: PatchEmbedCase, kernels: str) -> None:
    pairs = [make_inputs(case, torch.bfloat16, "cuda", seed) for seed in (0, 1)]
    expected = [_run(kernels, inputs) for inputs in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in pairs]
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(10):
        for place, (stream, inputs) in enumerate(zip(streams, pairs, strict=True)):
            with torch.cuda.stream(stream):
                found[place].append(_run(kernels, inputs))
    torch.cuda.synchronize()
    for place, runs in enumerate(found):
        for run in runs:
            _assert_same_bits(run, expected[place])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_a_device_that_is_not_the_current_one(kernels: str) -> None:
    assert torch.cuda.current_device() == 0
    for case in (CASE, MASKED):
        here = _run(kernels, make_inputs(case, torch.bfloat16, "cuda:0"))
        there = _run(kernels, make_inputs(case, torch.bfloat16, "cuda:1"))
        assert all(tensor.device.index == 1 for tensor in there)
        _assert_same_bits([tensor.to("cuda:0") for tensor in there], here)


@CASES
def test_compiled_into_a_cuda_graph(case: PatchEmbedCase, kernels: str) -> None:
    """torch.compile warms its graphs up with their own pool of memory, in which nothing may outlive the call."""
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    mean, std = (0.3, 0.4, 0.5), (0.25, 0.35, 0.45)  # such as no other test has, so that nothing is made beforehand
    weight = _known(inputs.tensors["weight"])

    def embed(images: Tensor) -> Tensor:
        return functional.patch_embed(images, weight, mean=mean, std=std, keep=inputs.keep, backend=kernels)

    images = _known(inputs.tensors["images"])
    compiled = torch.compile(embed, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        found = [compiled(images).clone() for _ in range(4)]
        expected = embed(images)
    _assert_same_bits(found, [expected] * 4)


@pytest.fixture
def _waits_raise() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@CASES
def test_nothing_waits_for_the_gpu(case: PatchEmbedCase, kernels: str, request: pytest.FixtureRequest) -> None:
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    _run(kernels, inputs)
    request.getfixturevalue("_waits_raise")
    _run(kernels, inputs)


def test_the_default_backend_on_a_gpu_is_a_kernel() -> None:
    inputs = make_inputs(CASE, torch.bfloat16, "cuda")
    before = sum(count for (op, name), count in launch_counts().items() if name in ("triton", "cuda"))
    functional.patch_embed(_known(inputs.tensors["images"]), _known(inputs.tensors["weight"]))
    assert sum(count for (op, name), count in launch_counts().items() if name in ("triton", "cuda")) == before + 1


def test_an_index_out_of_range_is_nan_and_contributes_nothing(kernels: str) -> None:
    inputs = make_inputs(MASKED, torch.float32, "cuda")
    keep = _known(inputs.keep)
    for bad in (-1, CASE.patches, 2**40, -(2**40)):
        changed = keep.clone()
        changed[1, 3] = bad
        inputs.keep = changed
        with poisoned():
            found = _run(kernels, inputs)
        tokens = found[0]
        row = MASKED.prefix + 3
        assert tokens[1, row].isnan().all()
        tokens[1, row] = 0
        assert tokens.isfinite().all() and all(gradient.isfinite().all() for gradient in found[1:])
        inputs.keep = keep
        without = inputs.grad.clone()
        without[1, row] = 0
        original, inputs.grad = inputs.grad, without
        expected = _run(kernels, inputs)
        inputs.grad = original
        for gradient, wanted in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_offsets_beyond_two_to_the_31(kernels: str) -> None:
    batch, width = 15_000, 64
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    images = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8, device="cuda")
    assert images.numel() > 2**31
    weight = torch.randn(width, 3, 16, 16, device="cuda", dtype=torch.bfloat16) / 28
    pos_embed = torch.randn(196, width, device="cuda", dtype=torch.bfloat16)
    tokens = functional.patch_embed(images, weight, pos_embed=pos_embed, backend=kernels)
    for part in (slice(0, 2), slice(batch - 2, batch)):
        alone = functional.patch_embed(images[part].clone(), weight, pos_embed=pos_embed, backend=kernels)
        torch.testing.assert_close(tokens[part], alone, rtol=0, atol=0.02)


def test_quick_validation_passes(kernels: str) -> None:
    report = validate(backends=[kernels], device="cuda", quick=True)
    assert report.ok, report.failures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("images", ["uint8", "same", "float32"])
@pytest.mark.parametrize("width", [520, 528])  # a multiple of 16 has kernels of its own
def test_more_tiles_than_multiprocessors(
    width: int, images: str, layout: str, dtype: torch.dtype, kernels: str
) -> None:
    """The kernels of real batches, which the small cases of the validator don't reach: forward and every gradient."""
    for patch, channels, keep in ((8, 1, None), (16, 3, 99)):
        case = PatchEmbedCase(
            "many tiles", batch=64, grid=(10, 10), patch=(patch, patch), channels=channels, width=width, images=images,
            layout=layout, normalise=True, keep=keep,
        )  # fmt: skip
        rows = check_inputs(backend_candidate(kernels, "cuda"), "patch_embed", make_inputs(case, dtype, "cuda"))
        assert rows and all(row.status == "passed" for row in rows), rows


@pytest.mark.parametrize("images", ["uint8", "same"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_products_are_as_exact_as_torchs_convolutions(precision: str, images: str, kernels: str) -> None:
    """They follow the same flag: eleven bits of each factor, or all of them."""
    case = PatchEmbedCase("precision", batch=2, grid=(4, 4), width=64, images=images, normalise=True)
    inputs = make_inputs(case, torch.float32, "cuda")
    wide = {name: t if t is None or t.dtype is torch.uint8 else t.double() for name, t in inputs.tensors.items()}
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    convolution.fp32_precision = precision
    try:
        found = _run(kernels, inputs)[0]
    finally:
        convolution.fp32_precision = before
    error = relative_error(found, truth("patch_embed", inputs, wide))
    assert 2**-16 < error < 2**-10 if precision == "tf32" else error < 2**-18
