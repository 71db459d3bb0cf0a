"""What the ops mean, in small examples worked by hand; numbers at large are the validator's business."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvit import functional, reference
from fastvit.validation.tolerance import assert_close


@pytest.fixture(params=["reference", "fast"])
def backend_name(request: pytest.FixtureRequest, backend: str) -> str:
    """The reference too: what it means is the definition, and is spelled out here."""
    return "reference" if request.param == "reference" else backend


def test_patches_are_row_major_and_flattened_channel_row_column(backend_name: str, device: str) -> None:
    images = torch.arange(2 * 2 * 4 * 6, device=device).reshape(2, 2, 4, 6).float()
    weight = torch.eye(2 * 2 * 3, device=device).reshape(12, 2, 2, 3)  # the projection returns the flattened patch
    tokens = functional.patch_embed(images, weight, backend=backend_name)
    for batch in range(2):
        for row in range(2):
            for column in range(2):
                patch = images[batch, :, row * 2 : row * 2 + 2, column * 3 : column * 3 + 3]
                assert torch.equal(tokens[batch, row * 2 + column], patch.flatten())


def test_prefix_positions_and_bias_land_in_their_rows(backend_name: str, device: str) -> None:
    images, weight = torch.randn(2, 3, 4, 8, device=device), torch.zeros(5, 3, 4, 4, device=device)
    bias, prefix = torch.randn(5, device=device), torch.randn(3, 5, device=device)
    on_patches, everywhere = torch.randn(2, 5, device=device), torch.randn(5, 5, device=device)

    def run(positions: Tensor | None) -> Tensor:
        return functional.patch_embed(images, weight, bias, pos_embed=positions, prefix=prefix, backend=backend_name)

    patches = bias.expand(2, 5)
    for positions, expected in (
        (None, torch.cat([prefix, patches])),
        (on_patches, torch.cat([prefix, patches + on_patches])),
        (everywhere[None], torch.cat([prefix, patches]) + everywhere),
    ):
        out = run(positions)
        assert out.shape == (2, 5, 5)
        torch.testing.assert_close(out, expected.expand(2, -1, -1), rtol=1e-6, atol=1e-6)


def test_keep_projects_the_kept_patches_with_their_own_positions(backend_name: str, device: str) -> None:
    images, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(5, 3, 4, 4, device=device)
    positions, prefix = torch.randn(4, 5, device=device), torch.randn(1, 5, device=device)
    keep = torch.tensor([[3, 0, 3], [1, 2, 0]], device=device)
    arguments = {"pos_embed": positions, "prefix": prefix, "backend": backend_name}
    full = functional.patch_embed(images, weight, **arguments)
    kept = functional.patch_embed(images, weight, keep=keep, **arguments)
    expected = torch.cat([full[:, :1], full[:, 1:].gather(1, keep[:, :, None].expand(-1, -1, 5))], dim=1)
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)


def test_uint8_is_divided_by_255_and_floats_are_not(backend_name: str, device: str) -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, device=device)
    weight = torch.randn(5, 3, 4, 4, device=device)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    for normalise in ({}, {"mean": mean, "std": std}):
        raw = functional.patch_embed(pixels, weight, backend=backend_name, **normalise)
        scaled = functional.patch_embed(pixels.float() / 255, weight, backend=backend_name, **normalise)
        torch.testing.assert_close(raw, scaled, rtol=1e-4, atol=1e-4)


def test_default_dtypes(backend: str, device: str) -> None:
    images, weight = torch.randn(1, 3, 4, 4, device=device), torch.randn(8, 3, 4, 4, device=device)

    def run(weight: Tensor = weight, **kwargs: torch.dtype) -> torch.dtype:
        return functional.patch_embed(images, weight, backend=backend, **kwargs).dtype

    assert run() == torch.float32
    assert run(weight.bfloat16()) == torch.bfloat16
    assert run(weight.bfloat16(), dtype=torch.float32) == torch.float32
    with torch.autocast(device, torch.bfloat16):
        assert run() == torch.bfloat16
        assert run(dtype=torch.float32) == torch.float32
        assert run(weight.half()) == torch.bfloat16
        tokens = torch.randn(1, 4, 8, device=device)
        assert functional.add_position(tokens, tokens[0], backend=backend).dtype == torch.bfloat16


def test_autocast_reaches_masters_and_their_gradients(backend: str, device: str) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device=device)
    parameters = [torch.randn(48, 3, 16, 16, device=device) * 0.03, torch.randn(48, device=device)]
    normalise = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    grad = torch.randn(4, 4, 48, device=device)

    def results(leaves: list[Tensor], run: object) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = run(*leaves)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    with torch.autocast(device, torch.bfloat16):
        ours = results(parameters, lambda w, b: functional.patch_embed(images, w, b, backend=backend, **normalise))
        plain = results(parameters, lambda w, b: reference.patch_embed(images, w, b, **normalise).bfloat16())
    grad = grad.bfloat16().double()
    truth = results([p.double() for p in parameters], lambda w, b: reference.patch_embed(images, w, b, **normalise))
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32]
    for name, *three in zip(("tokens", "weight", "bias"), ours, plain, truth, strict=True):
        assert_close(*three, name)


def test_same_inputs_same_bits(backend: str, device: str) -> None:
    images = torch.randn(6, 3, 32, 32, device=device)
    leaves = [torch.randn(s, device=device) for s in ((70, 3, 8, 8), (70,), (17, 70), (1, 70))]
    keep = torch.randint(0, 16, (6, 40), device=device)
    grad = torch.randn(6, 41, 70, device=device)

    def run() -> list[Tensor]:
        inputs = [leaf.detach().requires_grad_() for leaf in (images, *leaves)]
        out = functional.patch_embed(*inputs[:3], pos_embed=inputs[3], prefix=inputs[4], keep=keep, backend=backend)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_empty_batch_has_zero_gradients(backend: str, device: str) -> None:
    weight = torch.randn(8, 3, 4, 4, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    positions = torch.randn(5, 8, device=device, requires_grad=True)
    prefix = torch.randn(1, 8, device=device, requires_grad=True)
    images = torch.randn(0, 3, 8, 8, device=device, requires_grad=True)
    for keep in (None, torch.zeros(0, 2, dtype=torch.int64, device=device)):
        out = functional.patch_embed(
            images, weight, bias, pos_embed=positions, prefix=prefix, keep=keep, backend=backend
        )
        assert out.shape == (0, 3 if keep is not None else 5, 8)
        for grad in torch.autograd.grad(out.sum(), (weight, bias, positions, prefix)):
            assert not grad.any()


def test_offsets_beyond_two_to_the_31(backend: str, device: str) -> None:
    far = 2**31
    # Untouched pages cost no memory on a CPU; 2 GiB on a GPU.
    storage = torch.empty(far + 3 * 8 * 8, dtype=torch.uint8, device=device)
    images = storage.as_strided((2, 3, 8, 8), (far, 64, 8, 1))
    for sample in images:
        sample.copy_(torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8))
    weight = torch.randn(16, 3, 4, 4, device=device, requires_grad=True)
    results = []
    for x in (images, images.contiguous()):
        out = functional.patch_embed(x, weight, mean=(0.5,) * 3, std=(0.2,) * 3, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_prepare_weight_takes_the_mean_from_the_rounded_weight(device: str) -> None:
    weight, bias = torch.randn(8, 3, 4, 4, device=device), torch.randn(8, device=device)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    matrix, shifted = torch.ops.fastvit.prepare_weight(weight, bias, mean, std, True, torch.bfloat16)
    assert matrix.dtype == torch.bfloat16 and shifted.dtype == torch.float32
    # A grey image of the mean colour normalises to zero, whatever the rounding of W' did.
    colour = (torch.tensor(mean, device=device) * 255).repeat_interleave(16)
    torch.testing.assert_close(matrix.float() @ colour + shifted, bias, rtol=1e-4, atol=1e-4)
    # And the matrix is the scaled weight, rounded once.
    scale = 255 * torch.tensor(std, device=device).view(1, 3, 1, 1)
    torch.testing.assert_close(matrix.float(), (weight / scale).bfloat16().float().flatten(1), rtol=2**-7, atol=0)
