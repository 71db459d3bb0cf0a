"""Raw pixels are normalised or refused, whatever stands between the model's door and its projection."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.interop.host import normalised
from fastvit.interop.raw_pixels import Door, RawPixels, Trail
from fastvit.peers import import_peer
from tests.interop.subjects import (
    LIBRARIES,
    MEAN,
    STD,
    build,
    entry,
    expect_close,
    expect_same_gradients,
    gradients,
    launched,
    pair,
    raw_images,
)
from tests.libraries import peer


class Around(nn.Module):
    """A model, and what somebody does to the images in front of it."""

    def __init__(self, model: nn.Module, front: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.front = model, front

    def forward(self, images: Any) -> Any:
        return self.model(self.front(images))


CASTS: dict[str, Callable[[Any], Any]] = {
    "to a dtype": lambda x: x.to(torch.float32),
    "to a device and a dtype": lambda x: x.to("cpu", dtype=torch.float32, non_blocking=True),
    "like a tensor": lambda x: x.to(torch.zeros(1)),
    "float": lambda x: x.float(),
    "type": lambda x: x.type(torch.float32),
    "cast twice": lambda x: x.half().float().contiguous(),
    "cropped, turned and cast": lambda x: x.float()[:, :, :, torch.arange(32)].flip(3).flip(3),
    "out of a row of images": lambda x: x[None].to(torch.float32).flatten(0, 1),
    "by the shape": lambda x: x.float() if x.shape[1] == 3 and x.size(2) == x.shape[-2] and x.dim() == 4 else None,
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", [*LIBRARIES, "timm-swin"])
def test_cast_in_front(name: str, cast: str):
    untouched = Around(build(name), lambda x: x)
    model = fastvit.accelerate(copy.deepcopy(untouched), mean=MEAN, std=STD)
    model.front = CASTS[cast]
    want = entry(name).outputs(untouched, normalised(raw_images(), MEAN, STD))
    for images in (raw_images(), raw_images().permute(0, 2, 3, 1)):
        launched()
        got = entry(name).outputs(model, images)
        assert launched() == 1
        expect_close(got, want)
    expect_same_gradients(gradients(model, got), gradients(untouched, want))


@pytest.mark.parametrize("name", LIBRARIES)
def test_normalised_in_front(name: str):
    """By whoever wrote the model: these are floats, normalised already."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    untouched = Around(build(name), lambda x: (x / 255 - mean) / std)
    model = fastvit.accelerate(copy.deepcopy(untouched), mean=MEAN, std=STD)
    expect_close(entry(name).outputs(model, raw_images()), entry(name).outputs(untouched, raw_images()))


@pytest.mark.parametrize("front", [lambda x: F.interpolate(x.float(), size=32), lambda x: x.float() * 1.0])
@pytest.mark.parametrize("seen_floats", [False, True])
def test_values_that_went_on_as_floats(front: Callable[[Any], Any], seen_floats: bool):
    model = fastvit.accelerate(Around(build("timm-vit"), lambda x: x), mean=MEAN, std=STD)
    if seen_floats:
        model(normalised(raw_images(), MEAN, STD))
    model.front = front
    with pytest.raises(ValueError, match=r"^images: floats up to 25\d, where normalised ones end at 3.0: raw pixels"):
        model(raw_images())


@pytest.mark.parametrize("name", LIBRARIES)
def test_floats_that_were_cast_before_the_door(name: str):
    """Where the module that casts was not given to accelerate; looked at once, and again after accelerating again."""
    model = Around(build(name), lambda x: x.float())
    fastvit.accelerate(model.model, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="Give fastvit.accelerate the outermost module"):
        entry(name).outputs(model, raw_images())
    entry(name).outputs(model.model, normalised(raw_images(), MEAN, STD))


def test_normalised_images_are_not_looked_at_twice(monkeypatch: pytest.MonkeyPatch):
    model, _ = pair("timm-vit", mean=MEAN, std=STD)
    looks = []
    aminmax = Tensor.aminmax
    monkeypatch.setattr(Tensor, "aminmax", lambda self: looks.append(1) or aminmax(self))
    for _ in range(3):
        model(entry("timm-vit").images())
    assert len(looks) == 1


@pytest.mark.parametrize("cast", [lambda x: x, lambda x: x.float(), lambda x: x.to(torch.float32).clone()])
def test_a_part_that_is_not_accelerated(cast: Callable[[Any], Any]):
    """Two towers, of which one is none for us: it takes normalised images too."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.other, self.known = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(2)), build("timm-vit")

        def forward(self, images: Any) -> Tensor:
            images = cast(images)
            return self.known(images) + self.other(images).mean(2) + self.known(images)

    untouched = Both()
    model = fastvit.accelerate(copy.deepcopy(untouched), mean=MEAN, std=STD)
    want = untouched(normalised(raw_images(), MEAN, STD))
    expect_close([model(raw_images()), model(raw_images().permute(0, 2, 3, 1))], [want, want])


class Autoencoder(nn.Module):
    """Of somebody's own, with a loss on the pixels it was given."""

    def __init__(self, early: bool, numbers: bool) -> None:
        super().__init__()
        timm: Any = import_peer("timm.layers")
        torch.manual_seed(6)
        self.patch_embed, self.decoder = timm.PatchEmbed(32, 8, 3, 48), nn.Linear(48, 192)
        self.early, self.numbers = early, numbers

    def target(self, images: Any) -> Any:
        patches = images.reshape(len(images), 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return patches.float() - patches.float().mean(-1, keepdim=True) if self.numbers else patches

    def forward(self, images: Any) -> Tensor:
        first = self.target(images) if self.early else None
        tokens = self.patch_embed(images)
        return (self.decoder(tokens) - (self.target(images) if first is None else first)).square().mean()


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_a_loss_on_the_pixels(early: bool, numbers: bool):
    """Its target is normalised, as the images were without FastViT; unless it was calculated before they were."""
    untouched = Autoencoder(early, numbers)
    model = fastvit.accelerate(copy.deepcopy(untouched), mean=MEAN, std=STD)
    want = untouched(normalised(raw_images(), MEAN, STD))
    for images in (raw_images(), raw_images().permute(0, 2, 3, 1)):
        if early and numbers:
            with pytest.raises(RuntimeError, match="0..255, went into .* before the projection normalised them"):
                model(images)
        else:
            expect_close([model(images)], [want])


FEATURES = (
    "timm-vit-relpos",
    "timm-cait",
    "timm-convit",
    "timm-beit",
    "timm-naflexvit-conv",
    "timm-vit",
    "timm-dinov3",
)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("method", ["forward_intermediates", "forward_features"])
def test_methods_that_read_the_shape(name: str, method: str):
    """NHWC too, also where the projection alone is one call."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    options = {"intermediates_only": True} if method == "forward_intermediates" else {}

    def outputs(side: Any, images: Tensor) -> list[Tensor]:
        found = getattr(side, method)(images, **options)
        return (
            list(found)
            if isinstance(found, (list, tuple))
            else [*found.values()]
            if isinstance(found, dict)
            else [found]
        )

    want = [one for one in outputs(untouched, normalised(raw_images(), MEAN, STD)) if isinstance(one, Tensor)]
    for images in (raw_images(), raw_images().permute(0, 2, 3, 1).contiguous()):
        expect_close(outputs(model, images), want)


@pytest.mark.parametrize("name", [*LIBRARIES, "timm-swin", "transformers-clip"])
def test_other_numbers_of_channels(name: str):
    """One channel would be broadcast against mean and std, into three."""
    model, _ = pair(name, mean=MEAN, std=STD)
    for channels in (1, 4):
        images = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^images: {channels} channels, but mean and std have 3"):
                entry(name).outputs(model, images)


def test_a_mask_of_bytes_beside_the_images():
    """It is no image, and stays what it is."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = build("timm-vit")

        def forward(self, images: Tensor, mask: Tensor) -> Tensor:
            return self.vit(images) * mask.float().mean()

    untouched, mask = Masked(), torch.ones(2, 1, 32, 32, dtype=torch.uint8)
    model = fastvit.accelerate(copy.deepcopy(untouched), mean=MEAN, std=STD)
    floats = normalised(raw_images(), MEAN, STD)
    for images in (raw_images(), floats):
        expect_close([model(images, mask=mask)], [untouched(floats, mask)])


@pytest.mark.parametrize("name", LIBRARIES)
def test_images_that_are_overwritten_before_the_backward(name: str):
    """By torch: an error. By others: seen by nobody, unless the images are copied."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    images = raw_images()
    want = gradients(untouched, entry(name).outputs(untouched, normalised(images, MEAN, STD)))
    outputs = entry(name).outputs(model, images)
    images.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, outputs)
    fastvit.accelerate(model, mean=MEAN, std=STD, copy_images=True)
    buffer = np.array(raw_images())
    outputs = entry(name).outputs(model, torch.from_numpy(buffer))
    buffer[...] = 0
    expect_same_gradients(gradients(model, outputs), want)


FRONTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "masked": (lambda x: x.masked_fill(torch.arange(32) > 16, 0), "went into masked_fill"),
    "padded": (lambda x: F.pad(x, (0, 1))[..., :32], "went into pad"),
    "times a mask": (lambda x: x * (torch.arange(32) > 16), "went into mul"),
    "chosen": (lambda x: torch.where(torch.arange(32) > 16, x, 0), "went into where"),
    "negated": (lambda x: -x, "went into neg"),
    "empty": (lambda x: torch.zeros_like(x), "went into zeros_like"),
    "BGR": (lambda x: x[:, [2, 1, 0]], "channels moved"),
    "channels flipped": (lambda x: x.flip(1), "channels moved"),
    "one channel thrice": (lambda x: x[:, :1].expand(-1, 3, -1, -1), "channels moved"),
    "written to": (lambda x: x.__setitem__((0,), 0), "can't be written to"),
}


@pytest.mark.parametrize("front", FRONTS)
def test_calculated_with_as_bytes_in_front(front: str):
    """What comes out looks like raw pixels, and is not what the same makes of normalised ones."""
    change, message = FRONTS[front]
    model = fastvit.accelerate(Around(build("timm-vit"), change), mean=MEAN, std=STD)
    with pytest.raises(RuntimeError, match=message):
        model(raw_images())


@pytest.mark.parametrize(
    "join",
    [
        lambda x: torch.flip(x, [3]),
        lambda x: torch.clone(x),
        lambda x: torch.cat([x[:1], x[1:]]),
        lambda x: torch.flatten(torch.stack([x[:1], x[1:]]), 0, 1),
        lambda x: torch.cat(list(x.chunk(2, dim=3)), dim=3),
    ],
)
def test_a_loss_on_what_was_joined(join: Callable[[Any], Any]):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = build("timm-vit")

        def forward(self, images: Any) -> Tensor:
            return (self.vit(join(images)).mean() - images).square().mean()

    untouched = Model()
    model = fastvit.accelerate(copy.deepcopy(untouched), mean=MEAN, std=STD)
    expect_close([model(raw_images())], [untouched(normalised(raw_images(), MEAN, STD))])


def test_dark_images_that_were_cast():
    """Neither a batch of zeros nor one of small numbers passes for normalised."""
    model = Around(build("timm-vit"), lambda x: x.float())
    fastvit.accelerate(model.model, mean=MEAN, std=STD)
    model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    for images in (raw_images() // 8, raw_images()):
        with pytest.raises(ValueError, match="raw pixels that were cast"):
            model(images)


def test_images_in_a_dictionary():
    model = fastvit.accelerate(Around(build("timm-vit"), lambda batch: batch["image"].float()), mean=MEAN, std=STD)
    want = model({"image": normalised(raw_images(), MEAN, STD)})
    expect_close([model({"image": raw_images().permute(0, 2, 3, 1), "label": [3]})], [want])


def test_parts_that_were_accelerated_apart():
    model = fastvit.accelerate(Around(build("timm-vit"), lambda x: x), mean=MEAN, std=STD)
    apart: tuple[dict[str, Any], ...] = ({}, {"mean": STD, "std": MEAN})
    for arguments in apart:
        fastvit.accelerate(model.model, **arguments)
        with pytest.raises(RuntimeError, match="were accelerated apart"):
            model(raw_images())


def test_a_wrapper_that_splits_batches():
    """It gets a tensor, which it knows how to split."""
    seen: list[type] = []
    model = Around(build("timm-vit"), lambda x: x)
    model.model = nn.DataParallel(model.model)
    model.model.register_forward_pre_hook(lambda _, args: seen.append(type(args[0])))
    fastvit.accelerate(model, mean=MEAN, std=STD)
    expect_close([model(raw_images())], [model(normalised(raw_images(), MEAN, STD))])
    assert seen == [Tensor, Tensor]
    fastvit.restore(model)
    assert len(model.model._forward_pre_hooks) == 1


def test_transforms_of_torchvision_inside_the_model():
    """They pass over what is no image, so that nothing would be cropped."""
    model = nn.Sequential(peer("torchvision.transforms.v2").CenterCrop(32), build("timm-vit"))
    untouched = copy.deepcopy(model)
    fastvit.accelerate(model, mean=MEAN, std=STD)
    with pytest.raises(RuntimeError, match="raw pixels reached CenterCrop"):
        model(raw_images(size=40))
    images = normalised(raw_images(size=40), MEAN, STD)
    expect_close([model(images)], [untouched(images)])
    fastvit.restore(model)
    assert not model[0]._forward_pre_hooks


def test_own_normalisation_compiles_once():
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    model = fastvit.accelerate(Around(build("timm-vit"), lambda x: (x.float() / 255 - mean) / std), mean=MEAN, std=STD)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(12):
        got = compiled(raw_images())
    expect_close([got], [model(raw_images())])


def doors(model: nn.Module) -> list[str]:
    return [
        path for path, m in model.named_modules() if any(isinstance(h, Door) for h in m._forward_pre_hooks.values())
    ]


def test_doors_come_and_go():
    model = Around(nn.Sequential(build("transformers-vit")), lambda x: x)
    before = [(type(module), list(module._forward_pre_hooks)) for module in model.modules()]
    fastvit.accelerate(model)
    assert not doors(model)
    fastvit.accelerate(model, mean=MEAN, std=STD)
    assert doors(model) == ["", "model", "model.0", "model.0.vit"]
    fastvit.accelerate(model, mean=STD, std=MEAN)
    assert doors(model) == ["", "model", "model.0", "model.0.vit"]
    assert len(model._forward_pre_hooks) == len(model._forward_pre_hooks_with_kwargs) == 1
    fastvit.restore(model)
    assert [(type(module), list(module._forward_pre_hooks)) for module in model.modules()] == before
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_doors(copied: Callable[[Any], Any]):
    model, untouched = pair("transformers-vit", mean=MEAN, std=STD)
    other = copied(model)
    fastvit.restore(model)
    want = entry("transformers-vit").outputs(untouched, normalised(raw_images(), MEAN, STD))
    expect_close(entry("transformers-vit").outputs(other, raw_images()), want)


def test_it_answers_as_the_tensor_would():
    images = raw_images()
    pixels = RawPixels(images, Trail(MEAN, STD))
    assert pixels.shape == images.shape and len(pixels) == 2 and pixels.ndim == 4 and pixels.device == images.device
    assert not pixels.is_floating_point() and pixels.float().is_floating_point()
    assert pixels.cuda.__name__ == "cuda" and pixels.cpu().device.type == "cpu"
    assert torch.equal(pixels.mean(dtype=torch.float32), images.mean(dtype=torch.float32))
    for value, want in (
        (pixels.float() - 1, images.float() - 1),
        (1 - pixels.float(), 1 - images.float()),
        (pixels // 2, images // 2),
        (-pixels.float(), -images.float()),
        (torch.cat([pixels, pixels]), torch.cat([images, images])),
        (torch.stack([images, pixels]), torch.stack([images, images])),
        (pixels == 3, images == 3),
    ):
        assert torch.equal(value, want) and value.dtype == want.dtype
    one, other = pixels.half().chunk(2)
    assert isinstance(one, RawPixels) and one.dtype == torch.float16 and torch.equal(other.images, images[1:])
    with pytest.raises(RuntimeError, match="went into .* before matmul normalised them"):
        pixels.float() @ pixels.float()


def test_behind_what_normalised_them_it_answers_as_normalised_images_would():
    images = raw_images()
    pixels, floats = RawPixels(images, Trail(MEAN, STD)), normalised(images, MEAN, STD)
    rows = pixels.permute(0, 2, 3, 1).flip(1).chunk(2, dim=3)[0]
    assert torch.equal(pixels.take("a projection"), images)
    assert torch.equal(rows * 1, floats.permute(0, 2, 3, 1).flip(1).chunk(2, dim=3)[0])
    assert torch.equal(pixels.half() + 0, floats.half()) and torch.equal(F.relu(pixels), F.relu(floats))
    assert torch.equal(pixels[1, :, 3:5].mean(), floats[1, :, 3:5].mean())
