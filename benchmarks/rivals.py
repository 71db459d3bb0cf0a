"""How an image becomes tokens, by us and by everybody else: the same inputs, the same parameters, the same result.

Each function here takes the inputs of a case and returns a `Solution`: the call that makes [B, 1+N, D], class token
and positions included, and the parameters it is differentiated in. Raw uint8 images are normalised as timm's loader
does: to float, then subtract and divide in place. Nothing of ours is prepared outside the call; of the rivals,
channels_last images and weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import peers
from fastvit.benchmarks.problem import Unavailable
from fastvit.validation import Inputs as AnyInputs
from fastvit.validation import PatchEmbedInputs as Inputs

Embed = Callable[[Tensor], Tensor]  # normalised images [B, C, H, W] → tokens


@dataclass(frozen=True)
class Solution:
    """A way from the images of a case to its tokens, and the leaves it is differentiated in."""

    tokens: Callable[[], Any]
    parameters: list[Tensor]


class BiasOfProduct(torch.autograd.Function):
    """A linear layer's result and the gradient of its bias: the product itself adds the bias for nothing."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        return grad, grad.flatten(0, -2).sum(0).to(ctx.dtype)


def parameters_of(inputs: Inputs) -> list[Tensor]:
    """weight [D, C, P_h, P_w], bias [D], pos_embed [R+N, D], prefix [R, D]."""
    return [inputs[name] for name in ("weight", "bias", "pos_embed", "prefix")]


def autocast(inputs: AnyInputs) -> AbstractContextManager[None]:
    """Autocast where the case is about fp32 weights under it."""
    return torch.autocast(inputs.grad.device.type, inputs.compute) if inputs.autocast else nullcontext()


def loader(mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device) -> Embed:
    """What a loader does on the device before a model sees raw images; nothing without mean and std."""
    if mean is None or std is None:
        return lambda images: images
    means, stds = (torch.tensor(values, device=device).mul_(255).view(-1, 1, 1) for values in (mean, std))
    return lambda images: images.float().sub_(means).div_(stds)


def normaliser(inputs: Inputs) -> Embed:
    """The loader of a case, and the cast to what its model computes in."""
    load = loader(inputs.mean, inputs.std, inputs.grad.device)
    if inputs.mean is None:
        return load
    compute = torch.float32 if inputs.autocast else inputs.compute
    return lambda images: load(images).to(compute)


def _solution(inputs: Inputs, embed: Embed, parameters: list[Tensor], channels_last: bool = False) -> Solution:
    images, normalise = inputs["images"], normaliser(inputs)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def tokens() -> Tensor:
        x = normalise(images)
        with autocast(inputs):
            return embed(x)

    return Solution(tokens, parameters)


def _place(tokens: Tensor, pos_embed: Tensor, prefix: Tensor, keep: Tensor | None) -> Tensor:
    """Class token and positions; with `keep` as masked autoencoders do it: embed all, add positions, then gather."""
    batch, _, width = tokens.shape
    if keep is None:
        return torch.cat([prefix.expand(batch, -1, -1), tokens], dim=1) + pos_embed
    rows = prefix.shape[0]
    tokens = (tokens + pos_embed[rows:]).gather(1, keep[:, :, None].expand(-1, -1, width))
    return torch.cat([(prefix + pos_embed[:rows]).expand(batch, -1, -1), tokens], dim=1)


def conv2d(inputs: Inputs, channels_last: bool = False) -> Solution:
    """The convolution, cat and add that all ViTs are written with."""
    weight, bias, pos_embed, prefix = parameters_of(inputs)
    if channels_last:
        weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    stride = weight.shape[2:]

    def embed(x: Tensor) -> Tensor:
        x = F.conv2d(x, weight, bias, stride=stride).flatten(2).transpose(1, 2)
        return _place(x, pos_embed, prefix, inputs.keep)

    return _solution(inputs, embed, [weight, bias, pos_embed, prefix], channels_last)


def patches_of(x: Tensor, height: int, width: int) -> Tensor:
    """[B, C, H, W] → [B, N, C·P_h·P_w], a copy."""
    batch, channels, rows, columns = x.shape
    x = x.reshape(batch, channels, rows // height, height, columns // width, width).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, -1, channels * height * width)


def linear(inputs: Inputs) -> Solution:
    """Patches rearranged into a matrix, and a linear layer."""
    weight, bias, pos_embed, prefix = parameters = parameters_of(inputs)

    def embed(x: Tensor) -> Tensor:
        x = F.linear(patches_of(x, *weight.shape[2:]), weight.view(weight.shape[0], -1), bias)
        return _place(x, pos_embed, prefix, inputs.keep)

    return _solution(inputs, embed, parameters)


def product_alone(inputs: Inputs) -> Solution:
    """Only the linear layer, on patches that were normalised and unfolded before: what an implicit GEMM aims at."""
    images, weight, bias = (inputs[name] for name in ("images", "weight", "bias"))
    with torch.no_grad():
        patches = patches_of(normaliser(inputs)(images), *weight.shape[2:]).to(inputs.compute)

    def tokens() -> Tensor:
        with autocast(inputs):
            return F.linear(patches, weight.view(weight.shape[0], -1), bias)

    return Solution(tokens, [weight, bias])


def imported(module: str) -> Any:
    """A rival's module; raises Unavailable where it can't be imported."""
    try:
        return peers.import_peer(module)
    except ImportError as error:
        raise Unavailable(str(error)) from error


def _sizes(inputs: Inputs) -> tuple[tuple[int, int], int, int]:
    """Height and width of the images, the side of a patch, and the width of a token."""
    images, weight = inputs["images"], inputs["weight"]
    return (images.shape[2], images.shape[3]), weight.shape[2], weight.shape[0]


def _like(inputs: Inputs, module: Any) -> Any:
    """A rival's module, on the device of the case and with parameters of its dtype."""
    return module.to(inputs.grad.device, inputs["weight"].dtype)


def _copy(inputs: Inputs, targets: list[Tensor]) -> list[Tensor]:
    """The case's parameters, in a rival's own."""
    with torch.no_grad():
        for target, value in zip(targets, parameters_of(inputs), strict=True):
            target.copy_(value.reshape(target.shape))
    return targets


def timm(inputs: Inputs, channels_last: bool = False) -> Solution:
    """timm's PatchEmbed and _pos_embed."""
    vit = imported("timm.models.vision_transformer")
    size, patch, width = _sizes(inputs)
    model = _like(inputs, vit.VisionTransformer(size, patch, embed_dim=width, depth=1, num_heads=1, num_classes=0))
    targets = [model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.pos_embed, model.cls_token]
    parameters = _copy(inputs, targets)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return _solution(inputs, lambda x: model._pos_embed(model.patch_embed(x)), parameters, channels_last)


def torchvision(inputs: Inputs) -> Solution:
    """torchvision's VisionTransformer, as far as its first block."""
    vit = imported("torchvision.models.vision_transformer")
    (size, _), patch, width = _sizes(inputs)
    model = _like(inputs, vit.VisionTransformer(size, patch, 1, 1, hidden_dim=width, mlp_dim=1))
    targets = [model.conv_proj.weight, model.conv_proj.bias, model.encoder.pos_embedding, model.class_token]

    def embed(x: Tensor) -> Tensor:
        x = model._process_input(x)
        x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + model.encoder.pos_embedding

    return _solution(inputs, embed, _copy(inputs, targets))


def huggingface(inputs: Inputs) -> Solution:
    """ViTEmbeddings of transformers."""
    vit = imported("transformers.models.vit.modeling_vit")
    size, patch, width = _sizes(inputs)
    config = vit.ViTConfig(hidden_size=width, image_size=size, patch_size=patch, hidden_dropout_prob=0.0)
    model = _like(inputs, vit.ViTEmbeddings(config))
    projection = model.patch_embeddings.projection
    targets = [projection.weight, projection.bias, model.position_embeddings, model.cls_token]
    return _solution(inputs, model, _copy(inputs, targets))
