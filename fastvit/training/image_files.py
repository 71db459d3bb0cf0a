"""Image files with labels as the data of a run, wherever they lie: their split, their sizes and how they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastvit.checkpoints.errors import listed

from .any_size import ImageList, grid_within
from .auto_augment import AutoAugment
from .decoding import Source, decode, upright_size
from .errors import DataError, OptionError
from .image_set import ImageData, ImageSet, fingerprint, split_by_class
from .models import model_arguments
from .options import TrainOptions

EXTENSIONS = frozenset(".jpg .jpeg .jpe .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2".split())
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "valid", "validation", "test", "testing")
DEFAULT_SIZE = 224
LISTED = 5  # names in an error, at most

AnySource = TypeVar("AnySource", bound=Source)
Size = tuple[int, int]  # height and width


def read_images(
    sources: list[Source], size: int, channels: int, augment: AutoAugment | None, indices: list[int], random: Tensor
) -> Tensor:
    """Those of `sources`, cropped to squares of `size`: with `random` [B, 5] at random with a flip, else the middle;
    with [B, 6] by `augment` too."""
    drawn = zip(indices, random.tolist(), strict=True)
    return torch.stack([_read(sources[index], size, channels, augment, draws) for index, draws in drawn])


def read_any_size(
    sources: list[Source],
    sizes: list[Size],
    channels: int,
    augment: AutoAugment | None,
    indices: list[int],
    random: Tensor,
) -> ImageList:
    """Those of `sources`, each at its own of `sizes`: with `random` [B, 5] a crop with a flip, else the whole image;
    with [B, 6] by `augment` too."""
    drawn = zip(indices, random.tolist(), strict=True)
    return ImageList.of([_read(sources[i], sizes[i], channels, augment, draws) for i, draws in drawn])


def _read(source: Source, size: int | Size, channels: int, augment: AutoAugment | None, draws: list[float]) -> Tensor:
    image = decode(source, size=size, channels=channels, draws=draws[:5])
    return augment(image, draws[5]) if augment and draws else image


def image_data(
    options: TrainOptions,
    train: Sequence[tuple[AnySource, int]],
    test: Sequence[tuple[AnySource, int]],
    classes: tuple[str, ...],
    *,
    name: Callable[[AnySource], str],
    shuffle: Callable[[torch.Generator], Tensor] | None = None,
) -> ImageData:
    """The data of a run by `options` from two sets of samples, each a source and its label.

    Args:
        name: of a source, the same wherever the data are moved.
        shuffle: of the training images, as for ImageSet.
    """
    size, channels = options.image_size or DEFAULT_SIZE, options.channels or 3
    mean, std = ((0.5,), (0.5,)) if channels == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    arguments = {"img_size": size, "in_chans": channels, "num_classes": len(classes), "mean": mean, "std": std}
    augment = AutoAugment(options.auto_augment) if options.auto_augment else None
    measure = None
    if options.tokens_per_batch:
        measure = partial(measured, *token_limits(options, size))
        arguments["dynamic_img_size"] = True

    def image_set(samples: Sequence[tuple[AnySource, int]], **more: Any) -> ImageSet:
        sources: list[Source] = [source for source, _ in samples]
        labels = torch.tensor([label for _, label in samples])
        if measure is None:
            return ImageSet(partial(read_images, sources, size, channels, augment), labels, **more)
        sizes, tokens = measure(sources)
        return ImageSet(partial(read_any_size, sources, sizes, channels, augment), labels, tokens=tokens, **more)

    sets = image_set(train, draws=(5 + bool(augment)) * options.augment, shuffle=shuffle), image_set(test)
    names = [f"{name(source)} {label}" for source, label in [*train, *test]]
    # The numbers of tokens settle the batches of an epoch, and are to be the same in a resumed run.
    tokens = [str(count) for images in sets for count in images.tokens]
    return ImageData(*sets, classes, arguments, fingerprint(*classes, str(len(train)), *names, *tokens))


def token_limits(options: TrainOptions, size: int) -> tuple[int, int, int]:
    """The model's patch size in pixels, its prefix tokens, and the most patches of an image.

    Raises:
        OptionError: the largest image does not fit into a batch.
    """
    arguments = model_arguments(options.model, {})
    patch = arguments["patch_size"]
    prefix = int(arguments.get("class_token", True)) + arguments.get("reg_tokens", 0)
    most = options.max_tokens or (size // patch) ** 2
    if most < 1:
        raise OptionError("image_size", size, f"at least the patch of {options.model}, {patch}")
    if options.tokens_per_batch < most + prefix:
        accepted = f"at least {most + prefix}: an image of --max-tokens {most} and the model's prefix of {prefix}"
        raise OptionError("tokens_per_batch", options.tokens_per_batch, accepted)
    return patch, prefix, most


def measured(patch: int, prefix: int, most: int, sources: list[Source]) -> tuple[list[Size], list[int]]:
    """Of each image the size it is resized to, in pixels, and its number of tokens with `prefix`."""
    grids = [grid_within(*upright_size(source), patch, most) for source in sources]
    sizes = [(rows * patch, columns * patch) for rows, columns in grids]
    return sizes, [prefix + rows * columns for rows, columns in grids]


def check_same_classes(train: Collection[str], test: Collection[str], train_place: object, test_place: object) -> None:
    """Raises DataError where a class has images on one side only; names the places of the two."""
    differing = {"without": sorted(set(train) - set(test)), "with": sorted(set(test) - set(train))}
    if any(differing.values()):
        found = " and ".join(f"{word} {listed(names, LISTED)}" for word, names in differing.items() if names)
        raise DataError(f"{test_place}: other classes than in {train_place}: {found}")


def hold_out(
    samples: list[tuple[AnySource, int]], share: float, places: Sequence[object]
) -> tuple[list[tuple[AnySource, int]], list[tuple[AnySource, int]]]:
    """Training and test samples: about `share` of each class is held out, the same for every seed.

    Args:
        places: of each class, what an error about it names.

    Raises:
        DataError: a class with a single image.
    """
    labels = [label for _, label in samples]
    sizes = Counter(labels)
    for label, place in enumerate(places):
        if sizes[label] < 2:
            raise DataError(f"{place}: one image only; a class needs two, one of them to test on")
    train, test = split_by_class(torch.tensor(labels), share)
    return [samples[i] for i in train.tolist()], [samples[i] for i in test.tolist()]
