"""Another image size, patch size or number of channels: the same tensors as timm's."""

from __future__ import annotations

import pytest
import torch

from fastvit.checkpoints import CheckpointError, convert, load_pretrained
from fastvit.checkpoints.adapt import adapt_channels
from fastvit.checkpoints.writing import write_checkpoint
from tests.checkpoints.conftest import CLASSES, DEPTH, HEADS, IMAGE, PATCH, WIDTH, agree, scrambled
from tests.libraries import peer

SIZES = {
    "larger": {"img_size": 48},
    "rectangular": {"img_size": (24, 40)},
    "other_patch": {"img_size": 32, "patch_size": 4},
    "same_grid": {"img_size": 64, "patch_size": 16},
    "rectangular_patch": {"patch_size": (4, 8)},
}
MODELS = {
    "class_token": {},
    "no_embed_class": {"no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "registers_apart": {"reg_tokens": 4, "no_embed_class": True},
    "gap": {"class_token": False, "global_pool": "avg"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_as_timm_resamples(size, model, timm_vit):
    vit = peer("timm.models.vision_transformer")
    state = timm_vit(**MODELS[model]).state_dict()
    target = timm_vit(**MODELS[model], **SIZES[size])
    truth = vit.checkpoint_filter_fn(dict(state), target)
    # told, since 16 rows may also be a class token's and those of the rectangle's 3 x 5 patches
    known = {"num_heads": 3, "no_embed_class": "no_embed_class" in MODELS[model]}
    known |= {"global_pool": "avg"} if model == "gap" else {}
    ours = load_pretrained(state, **known, **SIZES[size])
    got = ours.state_dict()
    for name in ("pos_embed", "patch_embed.proj.weight"):
        agree(got[name], truth[name])
    if size != "rectangular":
        target.load_state_dict(truth)
        pixels = torch.randn(2, 3, *ours.patch_embed.img_size)
        agree(ours(pixels), target(pixels))


@pytest.mark.parametrize("size", SIZES)
def test_as_timm_resamples_its_flexivit(size, tmp_path):
    """timm resizes FlexiViT's bilinearly, by the name; and so does FastViT where a config gives it."""
    create = peer("timm").create_model
    small = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": CLASSES}
    own = {"img_size": IMAGE, "patch_size": PATCH}
    state = scrambled(create("flexivit_small", **own, **small)).state_dict()
    write_checkpoint(tmp_path / "flexivit", state, {"architecture": "flexivit_small", "model_args": small})
    weights = str(tmp_path / "flexivit" / "model.safetensors")
    model_file = {"pretrained": True, "pretrained_cfg_overlay": {"file": weights, "num_classes": CLASSES}}
    theirs = create("flexivit_small", **(own | SIZES[size]), **small, **model_file)
    ours = load_pretrained(tmp_path / "flexivit", **SIZES[size]).state_dict()
    for name in ("pos_embed", "patch_embed.proj.weight"):
        agree(ours[name], theirs.state_dict()[name])


def test_ambiguous_positions(timm_vit):
    state = timm_vit(no_embed_class=True).state_dict()
    with pytest.raises(
        CheckpointError, match=r"16 rows may be a square .* or those of \[24, 40\]; say which, with no_e"
    ):
        load_pretrained(state, img_size=(24, 40))
    assert load_pretrained(state, img_size=(24, 40), no_embed_class=True).pos_embed.shape == (1, 15, 48)
    own = timm_vit(img_size=(24, 40)).state_dict()
    assert load_pretrained(own, img_size=(24, 40), no_embed_class=False).pos_embed.equal(own["pos_embed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_as_timm_adapts_channels(channels, dtype):
    adapt_input_conv = peer("timm.models").adapt_input_conv
    weight = torch.randn(6, 3, 4, 4, dtype=dtype)
    assert adapt_channels(weight, channels).equal(adapt_input_conv(channels, weight))


def test_more_channels_than_three():
    """A grey image in every channel gives the same tokens."""
    weight = torch.randn(6, 4, 4, 4)
    for channels in (1, 2, 8):
        torch.testing.assert_close(adapt_channels(weight, channels).sum(1), weight.sum(1) if channels != 2 else
                                   2 * weight[:, :2].sum(1))  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"img_size": 33}, "img_size: .33, 33. is not a multiple of the patch"),
        ({"img_size": 0}, "img_size: 0 is not a positive number"),
        ({"patch_size": "16"}, "patch_size: '16' is not"),
        ({"in_chans": 0}, "in_chans: 0 must be a whole number of at least 1"),
    ],
)
def test_sizes_that_can_not_be(wanted, message, timm_vit):
    with pytest.raises(ValueError, match=message):
        load_pretrained(timm_vit().state_dict(), num_heads=3, **wanted)


@pytest.mark.parametrize("own", [7, 0])
def test_another_head(own, timm_vit, images):
    theirs = timm_vit(num_classes=own)
    state = theirs.state_dict()
    with pytest.warns(UserWarning, match=r"fresh, not from the checkpoint: head\.weight, head\.bias"):
        ours = load_pretrained(state, num_heads=3, num_classes=5, new_head=True)
    assert ours.num_classes == 5 and ours.head.weight.shape == (5, 48)
    assert 0 < ours.head.weight.std() < 0.05  # drawn as the model draws it
    assert ours.head.bias.count_nonzero() == 0
    headless = load_pretrained(state, num_heads=3, num_classes=0)
    assert isinstance(headless.head, torch.nn.Identity)
    for model in (ours, headless):
        agree(model.forward_features(images), theirs.forward_features(images))
    if not own:
        with pytest.raises(CheckpointError, match="new_head=True needs num_classes"):
            load_pretrained(state, new_head=True)


@pytest.mark.parametrize("own", [7, 0])
def test_what_the_error_of_another_head_says_can_be_done(own, timm_vit, tmp_path):
    """Whoever gets it, `convert` too, which makes no fresh head."""
    state = timm_vit(num_classes=own).state_dict()
    found = "its head has 7 classes" if own else "it has no head that FastViT can use"
    with pytest.raises(CheckpointError) as loading:
        load_pretrained(state, num_heads=3, num_classes=5)
    with pytest.raises(CheckpointError) as converting:
        convert(state, tmp_path / "vit.pth", num_heads=3, num_classes=5)
    hint = "0 for no head; load_pretrained(new_head=True) makes a fresh head of any size"
    assert str(loading.value) == str(converting.value)
    assert str(loading.value).endswith(f"num_classes=5, but {found}; accepted: {'7, or ' if own else ''}{hint}")
    assert not list(tmp_path.iterdir())
    for accepted in {own, 0}:
        convert(state, tmp_path / "vit.pth", num_heads=3, num_classes=accepted, overwrite=True)
        assert load_pretrained(tmp_path / "vit.pth", num_heads=3).num_classes == accepted
    with pytest.raises(TypeError, match="new_head: is no property of a checkpoint; accepted: img_size"):
        convert(state, tmp_path / "new.pth", num_classes=5, new_head=True)
