"""Traffic is counted: figures that are known, faults that are planted, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from fastvit.benchmarks.traffic import suite
from fastvit.benchmarks.traffic.gradients import gradients
from fastvit.benchmarks.traffic.suite import Case, TrafficRow, run
from fastvit.peers import peer_missing
from tests.seen import Names

PLAIN, SCALED = "plain", "layerscale+droppath"
DEPTH = 3  # blocks: with the two that are taken off, the third one is what is held here
# host, setting, stream → bytes per token value and block, launches; ViT-S, batch 256, eager.
EAGER = {
    ("timm", PLAIN, "float32"): (219.225, 54),
    ("timm", PLAIN, "bfloat16"): (211.225, 56),
    # LayerScale and DropPath: ten products, four additions and two sums more; four launches draw the masks.
    ("timm", SCALED, "float32"): (311.226, 70),
    ("timm", SCALED, "bfloat16"): (259.226, 72),
    ("torchvision", PLAIN, "float32"): (299.225, 62),
    ("transformers vit", PLAIN, "float32"): (243.225, 74),
    ("transformers dinov2", SCALED, "float32"): (367.226, 96),
}
# The same by the trunk's ops, which our own model has anyway: bytes may not be more, nor launches.
OURS = {
    ("timm", PLAIN, "float32"): (112, 36),
    ("timm", PLAIN, "bfloat16"): (87, 36),
    ("timm", SCALED, "float32"): (116, 42),  # of which four draw masks
    ("torchvision", PLAIN, "float32"): (112, 36),
    ("transformers vit", PLAIN, "float32"): (120, 45),
    ("transformers dinov2", SCALED, "float32"): (168, 63),
    ("fastvit", PLAIN, "float32"): (112, 36),
    ("fastvit", SCALED, "bfloat16"): (95, 42),
}
LEFT_OUT = {
    ("torchvision", SCALED, "float32"): "neither LayerScale nor DropPath",
    ("transformers vit", SCALED, "bfloat16"): "neither LayerScale nor DropPath",
    ("transformers dinov2", PLAIN, "float32"): "always has LayerScale",
}
# The same for what inductor writes, by torch's version: a gain of ours may be gone with a new one. Of timm's models.
COMPILED = {
    "2.13": {PLAIN: (142.385, 47), SCALED: (138.551, 51)},
}


def needs(host: str) -> None:
    missing = peer_missing(host.partition(" ")[0]) if host != "fastvit" else ""
    if missing:
        pytest.skip(missing)


def counted(
    chosen: Iterable[tuple[str, str, str]], *, compiled: bool = False, accelerated: bool = False
) -> dict[tuple[str, str, str], TrafficRow]:
    rows = run([
        Case(host, "S", setting, stream, compiled, accelerated and host != "fastvit", depth=DEPTH)
        for host, setting, stream in chosen
    ])  # fmt: skip
    return {(row.host, row.setting, row.stream): row for row in rows}


@pytest.fixture(scope="module")
def eager() -> dict[tuple[str, str, str], TrafficRow]:
    return counted([*EAGER, *LEFT_OUT])


@pytest.fixture(scope="module")
def ours() -> dict[tuple[str, str, str], TrafficRow]:
    return counted(OURS, accelerated=True)


@pytest.mark.parametrize("case", OURS, ids=" ".join)
def test_the_trunks_ops_keep_to_their_bounds(
    ours: dict[tuple[str, str, str], TrafficRow], case: tuple[str, str, str]
) -> None:
    needs(case[0])
    row, (most_bytes, most_launches) = ours[case], OURS[case]
    assert not row.reason
    assert 0.9 * most_bytes < row.bytes_per_value <= most_bytes and row.launches_per_block <= most_launches


@pytest.mark.parametrize("case", EAGER, ids=" ".join)
def test_eager_counts_are_those_that_are_known(
    eager: dict[tuple[str, str, str], TrafficRow], case: tuple[str, str, str]
) -> None:
    needs(case[0])
    row = eager[case]
    assert not row.reason and (row.bytes_per_value, row.launches_per_block) == pytest.approx(EAGER[case], abs=1e-3)
    assert row.method == "counted" and row.shape == f"ViT-S/16 224, batch 256, depth {DEPTH}"
    assert row.attention_bytes_per_value == pytest.approx(24.125, abs=1e-3)
    assert row.flops_step and row.bytes_step and row.products_bytes_step and row.floor_us() > 0


@pytest.mark.parametrize("setting", [PLAIN, pytest.param(SCALED, marks=pytest.mark.full)])
def test_compiled_counts_are_those_of_this_torch(setting: str) -> None:
    needs("timm")
    case = ("timm", setting, "float32")
    row, version = counted([case], compiled=True)[case], ".".join(torch.__version__.split(".")[:2])
    assert not row.reason, row.reason
    found = (row.bytes_per_value, row.launches_per_block)
    if version not in COMPILED:
        pytest.skip(f"torch {version}: inductor's {setting} block takes {found}; hold that in COMPILED")
    assert found == pytest.approx(COMPILED[version][setting], abs=1e-3), f"inductor of torch {version} changed"


def test_what_can_not_be_counted_is_left_out_with_the_reason(eager: dict[tuple[str, str, str], TrafficRow]) -> None:
    for case, reason in LEFT_OUT.items():
        assert reason in eager[case].reason and eager[case].bytes_step is None


def test_a_floor_is_the_slower_of_two_and_the_rest() -> None:
    row = TrafficRow("h", PLAIN, "float32", "s", False, False, bytes_step=100, products_bytes_step=30, flops_step=7)
    row = TrafficRow(**{**json.loads(row.to_json()), "attention_bytes_step": 10})
    assert row.floor_us(bytes_per_us=10, flops_per_us=1) == 60 / 10 + 7
    assert row.floor_us(bytes_per_us=10, flops_per_us=7) == 60 / 10 + 40 / 10


# What is tried on the fake GPU, in a process of its own: by name, what came of it.
CHILD = """
import fastvit, json, torch
from torch import nn
from fastvit.benchmarks.traffic import counting, gpu
from fastvit.benchmarks.traffic.step import count_step
from fastvit.functional import patch_embed

class Block(nn.Module):
    def __init__(self, copies):
        super().__init__()
        self.copies, self.linear = copies, nn.Linear(48, 48)
    def forward(self, images):
        tokens = images.flatten(2)[:, :, :48]
        for _ in range(self.copies):
            tokens = tokens.clone()
        return self.linear(tokens.sin())

def step(copies, compiled=False):
    return count_step(Block(copies), 4, compiled=compiled)

def ops():
    with gpu.fake_gpu():
        shapes = (2, 3, 32, 32), (48, 3, 16, 16), 48
        images, weight, bias = (torch.empty(shape, device=gpu.DEVICE) for shape in shapes)
        with counting.Count() as count:
            patch_embed(images, weight, bias, backend="triton")
            torch.ops.fastvit.prepare_weight(weight, bias, None, None, False, torch.bfloat16)
    return count.by_name()

def blocks(depth):
    model = fastvit.VisionTransformer(embed_dim=384, depth=depth, num_heads=6)
    return count_step(model, 256, compiled=False).by_name()

def watched(depth):  # each block gives a tensor, since somebody looks at it
    model = fastvit.VisionTransformer(embed_dim=384, depth=depth, num_heads=6)
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, result: None)
    return count_step(model, 256, compiled=False).total("bytes", "rest")

def state():
    dispatch = torch._C._dispatch_dump("aten::scaled_dot_product_attention")
    values = {f"{target} {name}": id(target.__dict__.get(name)) for target, name in targets}
    return {**values, "dispatch": dispatch, "modes": torch._C._len_torch_dispatch_stack()}

targets = [(target, name) for target, name, _ in gpu._replacements()]
before = state()
one, two, compiled = step(1), step(2), step(1, compiled=True)
after = state()
launched = ops()
counting._DECLARED = {"patch_embed": {"patch_embed": lambda *args, result: (7, 1000 + result.numel())}}
print(json.dumps({
    "a copy": [two.total(what) - one.total(what) for what in ("bytes", "launches")],
    "slices": [kernel.bytes for kernel in compiled.kernels if "sin" in kernel.name],
    "left behind": [name for name in before if before[name] != after[name]],
    "launched": launched,
    "declared": ops(),
    "blocks": [blocks(2), blocks(3)],
    "watched": [watched(2), watched(3)],
}))
"""


@pytest.fixture(scope="module")
def tried() -> dict[str, Any]:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_copy_more_is_a_read_and_a_write_more(tried: dict[str, Any]) -> None:
    assert tried["a copy"] == [2 * 4 * 3 * 48 * 4, 1]


def test_compiled_code_reads_of_a_slice_what_it_takes(tried: dict[str, Any]) -> None:
    assert tried["slices"] == [4 * 3 * 48 * (4 + 2)], "fp32 in, bf16 out; the copy is gone"


def test_an_op_is_its_launches_unless_its_file_declares_them(tried: dict[str, Any]) -> None:
    launched, declared = tried["launched"], tried["declared"]
    weight, tokens = 48 * 3 * 16 * 16, 2 * 4 * 48
    launches, moved = launched["patch_embed"]
    assert launches >= 1 and moved >= 4 * (2 * 3 * 32 * 32 + weight + tokens)
    assert declared["patch_embed"] == [7, 1000 + tokens]
    # No launchers of its own are known: what it takes and what it returns, once.
    assert declared["prepare_weight"] == [1, weight * (4 + 2) + 48 * (4 + 4)]


def test_between_the_products_there_is_nothing_but_ours(tried: dict[str, Any]) -> None:
    """What a block of ViT-S more adds: no copies around attention, and no casts but those of weights."""
    two, three = tried["blocks"]
    added = {name: [a - b for a, b in zip(three[name], two.get(name, [0, 0]), strict=True)] for name in three}
    names = {name for name, (launches, _) in added.items() if launches}
    assert not names & {"stack", "cat", "clone", "add", "add_", "mul", "sum", "gelu", "gelu_backward"}
    weights = 12 * 384**2  # fp32 to bf16, and their gradients back
    assert added["_to_copy"][1] < 1.01 * 2 * weights * (4 + 2)
    assert {"add_norm", "add_norm_backward", "bias_act", "bias_act_backward", "split_heads_backward"} <= names


def test_blocks_that_are_watched_keep_to_their_bound(tried: dict[str, Any]) -> None:
    two, three = tried["watched"]
    assert 112 < (three - two) / (256 * 197 * 384) <= 120


def test_nothing_is_left_behind(tried: dict[str, Any]) -> None:
    assert tried["left behind"] == []


KERNEL = """
@triton.jit
def triton_poi_fused_add_0(in_out_ptr0, in_ptr0, out_ptr0, ks0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_out_ptr0 + (x0 + 8*r0_1), xmask)
    tmp1 = tl.load(in_ptr0 + (64*x0), None)
    tmp2 = tl.load(in_ptr0 + (64*x0), None, eviction_policy='evict_last')
    tmp3 = tl.load(in_ptr0 + (1 + 64*x0), None)
    tl.store(in_out_ptr0 + (x0 + 8*r0_1), tmp3, xmask)
    tl.store(out_ptr0 + (x0), tmp3, xmask)
"""


def test_a_kernel_moves_what_its_code_reaches() -> None:
    pytest.importorskip("triton")
    from fastvit.benchmarks.traffic.lowered import kernel_bytes

    name, whole, part, out = "triton_poi_fused_add_0", torch.empty(32), torch.empty(4096), torch.empty(8).half()
    assert kernel_bytes(name, KERNEL, (whole, part, out, 3, 8, 4)) == 2 * 32 * 4 + 2 * 32 * 4 + 8 * 2
    with pytest.raises(ValueError, match="neither loads nor stores out_ptr0"):
        kernel_bytes(name, KERNEL.replace("tl.store(out_ptr0", "tl.other(out_ptr0"), (whole, part, out, 3, 8, 4))
    with pytest.raises(ValueError, match="no such function"):
        kernel_bytes("triton_other", KERNEL, (whole, part, out, 3, 8, 4))
    with pytest.raises(ValueError, match="zip"):
        kernel_bytes(name, KERNEL, (whole, part, out, 8, 4))


def test_gradients_are_made_as_by_torchs_engine() -> None:
    torch.manual_seed(0)
    norm, linear, scale = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.rand(8))
    unused = nn.Parameter(torch.rand(3))
    leaves = [*norm.parameters(), *linear.parameters(), scale, unused]
    x = torch.rand(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = x + scale * linear(norm(x))
        y = y + scale * linear(norm(y))
    seen = []
    for find in (torch.autograd.grad, gradients):
        with Names() as names:
            found = find(y, leaves, torch.ones_like(y), retain_graph=True, allow_unused=True)
        seen.append((found, sorted(name for name in names.seen if "view" not in name and "detach" not in name)))
    (expected, theirs), (found, ours) = seen
    assert found[-1] is None and expected[-1] is None
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], expected[:-1], strict=True))
    assert ours == [name.replace("add_", "add") for name in theirs]


def test_rows_are_read_as_they_are_written(tmp_path: Any) -> None:
    row = TrafficRow("timm", PLAIN, "float32", "ViT-S", True, False, bytes_step=3, reason="")
    file = tmp_path / "rows.jsonl"
    file.write_text(row.to_json() + "\n", encoding="utf-8")
    assert suite.read_json_lines(file) == [row] and row.way == "compiled"
