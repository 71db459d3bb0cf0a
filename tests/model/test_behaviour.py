"""What the model does beyond timm's: raw pixels, one call for the tokens, dropped patches, dtypes, maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastvit import functional, stream
from fastvit.model import PatchEmbed
from fastvit.positions import sincos_2d

IMAGES = (2, 3, 24, 32)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def calls(monkeypatch):
    """The calls of functional.patch_embed, as their keyword arguments and their result."""
    seen = []
    original = functional.patch_embed

    def recorded(*args, **kwargs):
        result = original(*args, **kwargs)
        seen.append({**kwargs, "images": args[0], "result": result})
        return result

    monkeypatch.setattr(functional, "patch_embed", recorded)
    return seen


def normalise(images: torch.Tensor) -> torch.Tensor:
    """As a data loader does it: floats are normalised already."""
    if images.is_floating_point():
        return images
    return (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("raw", ["uint8", "float"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_raw_pixels_are_normalised_in_the_model_and_floats_are_not(raw, layout, tiny):
    model = tiny(mean=MEAN, std=STD)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    images = torch.randint(0, 256, IMAGES, dtype=torch.uint8) if raw == "uint8" else torch.randn(IMAGES)
    images = images.contiguous(memory_format=layout)
    torch.testing.assert_close(model(images), plain(normalise(images)), rtol=1e-4, atol=1e-5)
    for one, other in ((model, images), (plain, normalise(images))):
        one(other).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_mean_that_is_set_later_counts(tiny):
    model = tiny()
    images = torch.randint(0, 256, IMAGES, dtype=torch.uint8)
    expected = model(normalise(images))
    model.mean, model.std = MEAN, STD
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_uint8_without_a_mean_is_divided_by_255(tiny):
    model = tiny()
    images = torch.randint(0, 256, IMAGES, dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(images.float() / 255), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("raw", ["uint8", "float"])
def test_padding_is_black_after_normalisation(raw, tiny):
    model = tiny(mean=MEAN, std=STD, dynamic_img_size=True, dynamic_img_pad=True)
    plain = tiny(dynamic_img_size=True, dynamic_img_pad=True)
    plain.load_state_dict(model.state_dict())
    size = (2, 3, 21, 43)
    images = torch.randint(0, 256, size, dtype=torch.uint8) if raw == "uint8" else torch.rand(size)
    torch.testing.assert_close(model(images), plain(normalise(images)), rtol=1e-4, atol=1e-5)
    # A size that needs no padding stays raw.
    whole = torch.randint(0, 256, IMAGES, dtype=torch.uint8)
    torch.testing.assert_close(model(whole), plain(normalise(whole)), rtol=1e-4, atol=1e-5)


def test_padding_to_a_fixed_size(tiny):
    model = tiny(img_size=(20, 30), dynamic_img_pad=True)
    assert model.patch_embed.grid_size == (2, 3) and model.pos_embed.shape[1] == 7
    assert model.forward_features(torch.randn(2, 3, 20, 30)).shape == (2, 1 + 3 * 4, 48)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"reg_tokens": 3}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}, {"pos_embed": ""}],
)
def test_one_call_makes_the_whole_sequence(arguments, calls, tiny):
    model = tiny(**arguments)
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    model(torch.randn(IMAGES))
    assert len(calls) == 1
    assert calls[0]["result"] is entered[0]  # nothing is done to the tokens after it
    assert entered[0].shape == (2, model.num_prefix_tokens + 12, 48)


@pytest.mark.parametrize("arguments", [{}, {"reg_tokens": 2, "no_embed_class": True}])
def test_dropped_patches_are_never_projected(arguments, calls, tiny):
    model = tiny(patch_drop_rate=0.75, **arguments)
    images = torch.randn(IMAGES, requires_grad=True)
    model(images).sum().backward()
    keep = calls[0]["keep"]
    assert keep.shape == (2, 3) and keep.dtype == torch.int64
    assert calls[0]["result"].shape[1] == model.num_prefix_tokens + 3
    assert images.grad is not None
    touched = images.grad.unflatten(2, (3, 8)).unflatten(4, (4, 8)).abs().sum(dim=(1, 3, 5)).flatten(1) > 0
    for sample in range(2):
        assert touched[sample].nonzero().flatten().tolist() == sorted(keep[sample].tolist())
    model.eval()
    model(images)
    assert calls[1]["keep"] is None
    with pytest.raises(ValueError, match="output_fmt: 'NCHW' needs all of 3 x 4"):
        model.train().forward_intermediates(images)
    assert model.forward_intermediates(images, output_fmt="NLC")[1][0].shape == (2, 3, 48)


def test_sincos_positions_are_fixed_and_travel_with_the_checkpoint(tiny, device):
    model = tiny(pos_embed="sincos")
    table = sincos_2d((3, 4), 48, num_prefix_tokens=1)[None]
    assert torch.equal(model.pos_embed, table)
    assert not model.pos_embed.requires_grad and "pos_embed" in model.state_dict()
    model(torch.randn(IMAGES)).sum().backward()
    assert model.pos_embed.grad is None
    assert torch.equal(tiny(pos_embed="sincos", weight_init="skip").pos_embed, table)
    learned = tiny()
    learned.load_state_dict(model.state_dict())  # as MAE's checkpoints have it
    assert torch.equal(learned.pos_embed, table) and learned.pos_embed.requires_grad
    assert tiny(pos_embed="sincos", no_embed_class=True).pos_embed.shape == (1, 12, 48)
    with torch.device("meta"):
        empty = tiny(pos_embed="sincos")
    empty = empty.to_empty(device=device)
    empty.init_weights()
    assert torch.equal(empty.pos_embed, table)
    dynamic = tiny(pos_embed="sincos", dynamic_img_size=True)
    assert dynamic(torch.randn(1, 3, 40, 40)).shape == (1, 7)
    dynamic.set_input_size((40, 40))
    assert not dynamic.pos_embed.requires_grad


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"init_values": 0.5, "qk_norm": True}, {"pre_norm": True, "global_pool": "avg"}, {"drop_path_rate": 0.5}],
)
def test_residual_dtype(autocast, arguments, tiny, device):
    model = tiny(residual_dtype=torch.bfloat16, **arguments)
    plain = tiny(**arguments)
    plain.load_state_dict(model.state_dict())
    seen: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    images = torch.randn(IMAGES)
    torch.manual_seed(1)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        output = model(images)
    assert seen == [torch.bfloat16] * 4
    assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if "drop_path_rate" not in arguments:
        torch.testing.assert_close(output.float(), plain(images), rtol=0.1, atol=0.1)
    maps = model.get_attention_maps(images)
    assert len(maps) == 2
    model.eval()
    tokens, intermediates = model.forward_intermediates(images, norm=True)
    assert tokens.shape == (2, 13, 48) and intermediates[0].shape == (2, 48, 3, 4)


def test_a_wider_residual_stream(tiny):
    model = tiny(residual_dtype=torch.float32).bfloat16()
    seen = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert model(torch.randn(IMAGES, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen == [torch.float32]


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True, "reg_tokens": 2}])
def test_attention_maps(arguments, tiny):
    model = tiny(**arguments).eval()
    images = torch.randn(IMAGES)
    maps = model.get_attention_maps(images)
    tokens = model.num_prefix_tokens + 12
    assert len(maps) == 2
    for weights in maps:
        assert weights.shape == (2, 3, tokens, tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, tokens))
    assert torch.equal(model.get_attention_maps(images, [-1])[0], maps[1])
    assert torch.equal(model.get_attention_maps(images, 1)[0], maps[1])

    # The maps are what the fused attention uses: with them its output can be made again.
    attention = model.blocks[1].attn
    inputs = []
    attention.register_forward_hook(lambda module, args, output: inputs.append((args[0], output)))
    model(images)
    x, output = inputs[0]
    values = attention.qkv(x).reshape(2, tokens, 3, 3, 16)[:, :, 2].transpose(1, 2)
    again = attention.proj((maps[1] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, output, rtol=1e-4, atol=1e-5)


def test_grad_checkpointing_changes_nothing_but_memory(tiny):
    model = tiny(drop_path_rate=0.5, proj_drop_rate=0.1)
    images = torch.randn(4, 3, 24, 32)
    gradients = []
    forwards = []
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: forwards.append(1))
    for enable, model.checkpointed_blocks in ((False, None), (True, None), (True, 1), (True, 0), (True, 2)):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        forwards.clear()
        torch.manual_seed(4)
        model(images).square().sum().backward()
        assert len(forwards) == (2 if enable and model.checkpointed_blocks in (None, 2) else 1)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for part in gradients[1:] for one, other in zip(gradients[0], part, strict=True))


def test_a_block_that_is_compiled_by_itself_is_called(tiny, monkeypatch):
    """Also where blocks run by the trunk's ops, which do not call them."""
    monkeypatch.setattr(stream, "LEAST_ON_A_CPU", 0)
    model, counter = tiny(), CompileCounter()
    images = torch.randn(2, 3, 24, 32)
    expected = model(images)
    for block in model.blocks:
        block.compile(backend=counter)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count


def test_two_runs_give_the_same_bits(tiny):
    model = tiny(reg_tokens=1)
    images = torch.randn(4, 3, 24, 32)
    runs = []
    for _ in range(2):
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        runs.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch, tiny):
    for arguments in ({}, {"patch_drop_rate": 0.5}, {"mean": MEAN, "std": STD}):
        output = tiny(**arguments)(torch.rand(batch, 3, 24, 32))
        assert output.shape == (batch, 7)
        output.sum().backward()


def test_sliced_images(tiny):
    model = tiny(img_size=16)
    images = torch.randn(4, 3, 40, 40)
    for view in (images[::2, :, 3:19, 5:21], images.transpose(2, 3)[:, :, :16, :16], images.flip(0)[:, :, :16, :16]):
        torch.testing.assert_close(model(view), model(view.contiguous()))


def test_the_patch_embedding_stands_alone(timm):
    from timm.layers import PatchEmbed as TimmPatchEmbed

    theirs = TimmPatchEmbed(img_size=32, patch_size=8, embed_dim=16)
    ours = PatchEmbed(img_size=32, patch_size=8, embed_dim=16)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert ours.feat_ratio() == theirs.feat_ratio() == 8
    assert ours.feat_ratio(as_scalar=False) == theirs.feat_ratio(as_scalar=False)
    assert ours.dynamic_feat_size((40, 16)) == theirs.dynamic_feat_size((40, 16))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_copy_images_keeps_what_the_loader_writes_over(is_compiled, tiny):
    images = torch.randint(0, 256, IMAGES, dtype=torch.uint8)
    buffer = torch.zeros(IMAGES, dtype=torch.uint8).numpy()  # numpy's writes are not seen by torch
    gradients = []
    for copy_images in (False, True):
        torch.manual_seed(3)
        model = tiny(mean=MEAN, std=STD, copy_images=copy_images)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        for shared in (images.clone(), torch.from_numpy(buffer)):
            shared.copy_(images)
            model.zero_grad()
            output = run(shared)
            if shared.data_ptr() == buffer.ctypes.data:
                buffer[:] = 7
            output.square().sum().backward()
            gradients.append(model.patch_embed.proj.weight.grad)
    assert torch.equal(gradients[2], gradients[0]) and not torch.equal(gradients[1], gradients[0])
    assert torch.equal(gradients[3], gradients[0])


@pytest.mark.parametrize("as_list", [False, True])
def test_copy_images_with_a_frozen_projection(as_list, tiny):
    """Whose images are kept for the gradients of the other parts."""
    model = tiny(mean=MEAN, std=STD, copy_images=True)
    model.patch_embed.proj.weight.requires_grad_(False)
    images = torch.randint(0, 256, IMAGES, dtype=torch.uint8)
    output = model(list(images) if as_list else images)
    images.zero_()
    output.square().sum().backward()
    assert model.patch_embed.proj.bias.grad.any() and model.pos_embed.grad.any()


class Doubled(nn.Module):
    """A block of the user's own, with timm's arguments."""

    def __init__(self, dim, num_heads, **rest):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        return x + self.linear(x)


def test_blocks_of_ones_own(tiny):
    model = tiny(block_fn=Doubled)
    assert model(torch.randn(IMAGES)).shape == (2, 7)
