"""Profiles: what a kernel is for, from its name, and where the time of a small model's step goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType

from fastvit import backend as backends
from fastvit import peers
from fastvit.backend import launch_counts, reset_launch_counts
from fastvit.benchmarks import profiling as module
from fastvit.benchmarks.problem import Unavailable
from fastvit.benchmarks.profiling import CLASSES, OTHER, Kernel, Profile, Setup, class_of, format_table, main, profile
from tests.libraries import peer

KERNELS = {
    "attention": [
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128>>",
        "fmha_cutlassB_bf16_aligned_64x64_k64_sm80",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_cta_m_2",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "gemm": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_nn_align8>",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel__5x_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
        "triton_tem_fused_addmm_3",
        "aten::addmm",
        "mkldnn::_linear_pointwise",
    ],
    "norm": [
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>",
        "triton_per_fused__to_copy_add_native_layer_norm_2",
        "aten::native_layer_norm_backward",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
        "void at::native::elementwise_kernel<128, 4, at::native::CUDAFunctor_add<float>>",
        "triton_poi_fused_convert_element_type_gelu_4",
        "aten::add",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>",
        "aten::_fused_adamw_",
        "Optimizer.step#AdamW.step",
    ],
    "copy/memset": [
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<OpaqueType<4>>",
        "aten::copy_",
    ],
    "convolution": [
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<float, float, float>",
        "void implicit_convolve_sgemm<float, float, 1024>",
        "aten::mkldnn_convolution",
    ],
    "reduction": [
        "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>",
        "void (anonymous namespace)::cunn_SoftMaxForward<4, float>",
        "triton_red_fused_sum_1",
        "aten::sum",
    ],
    "fused block ops": [
        "add_norm_backward",
        "pack_heads",
        "fastvit::split_heads",
        "void fastvit::add_norm_forward<__nv_bfloat16, float>",
    ],
    "patch embedding": [
        "_patch_embed_forward",
        "_sum_segments",
        "fastvit::patch_embed_backward",
        "void fastvit::patch_embed_weight_gradient<__nv_bfloat16, 8, fastvit::Tile<__nv_bfloat16, 128, 128, 64>>",
        "fastvit::write_normaliser(fastvit::PrepareWeight)",
    ],
    OTHER: ["aten::empty", "autograd::engine::evaluate_function: ViewBackward0"],
}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in KERNELS.items() for name in names])
def test_kernels_are_classed_by_name(group: str, name: str) -> None:
    assert class_of(name) == group


def test_every_class_has_an_example() -> None:
    assert set(KERNELS) == {*CLASSES, OTHER}
    assert all(part == part.lower() for parts in CLASSES.values() for part in parts)


def test_all_our_kernels_are_known_as_ours() -> None:
    pytest.importorskip("triton")
    from fastvit.kernels import manifest
    from fastvit.kernels.launch import jit_function

    names = {getattr(jit_function(entry), "fn", jit_function(entry)).__name__ for entry in manifest.entries()}
    assert len(names) >= 8 and {class_of(name) for name in names} == {"patch embedding", "fused block ops"}


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_a_step_of_a_small_model(mode: str) -> None:
    found = profile(Setup("Ti", 1, mode=mode), "cpu", depth=1)
    groups = found.groups()
    assert {"gemm", "norm", "attention", "patch embedding", "elementwise"} <= set(groups)
    assert ("optimizer" in groups) == (mode == "step")
    assert sum(kernel.share for kernel in found.kernels) == pytest.approx(1, abs=0.01)
    times = [kernel.us for kernel in found.kernels]
    assert times == sorted(times, reverse=True) and found.kernels_us == pytest.approx(sum(times)) and found.step_us > 0
    assert sum(count for _, _, count in groups.values()) == sum(kernel.count for kernel in found.kernels)
    rows = [json.loads(line) for line in found.to_json_lines()]
    assert len(rows) == len(found.kernels)
    for row in rows:
        assert row["model"] == "Ti" and row["mode"] == mode and row["versions"]["torch"] and row["device"]


def test_a_rival_uses_a_convolution() -> None:
    peer("timm")
    found = profile(Setup("Ti", 1, provider="timm", mode="forward"), "cpu", depth=1)
    assert "convolution" in found.groups() and "patch embedding" not in found.groups()


def test_a_backend_can_be_named(gpu_backends: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpu_backends:
        reset_launch_counts()
        profile(Setup("Ti", 1, provider=f"fastvit:{name}", mode="forward"), "cpu", depth=1)
        assert {backend for _, backend in launch_counts()} == {name}
    monkeypatch.setitem(backends._REASONS, "cuda", lambda device_type: "it is not built")
    with pytest.raises(Unavailable, match="it is not built"):
        profile(Setup("Ti", 1, provider="fastvit:cuda"), "cpu", depth=1)


def test_compiled_means_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def compile_(function: Callable[[], object], **options: object) -> Callable[[], object]:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    profile(Setup("Ti", 1, mode="forward"), "cpu", depth=1)
    assert not asked
    profile(Setup("Ti", 1, mode="forward", compiled=True), "cpu", depth=1)
    assert asked == [{"dynamic": False}]


def test_on_a_gpu_kernels_count_and_annotations_do_not() -> None:
    """The events as torch gives them there: operators of the host, kernels, and ranges that span kernels."""

    def event(key: str, device_type: DeviceType, us: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=device_type, self_device_time_total=us, self_cpu_time_total=99.0, count=2,
            is_user_annotation=annotation,
        )  # fmt: skip

    events = [
        event("aten::mm", DeviceType.CPU, 30.0),
        event("nvjet_tst", DeviceType.CUDA, 30.0),
        event("_patch_embed_forward", DeviceType.CUDA, 10.0),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 500.0, annotation=True),
    ]
    found = list(module._kernels(events, on_gpu=True))
    assert found == [
        Kernel("nvjet_tst", "gemm", 30.0, 0.75, 2),
        Kernel("_patch_embed_forward", "patch embedding", 10.0, 0.25, 2),
    ]


def test_the_table_shows_classes_and_the_longest_kernels() -> None:
    kernels = (Kernel("first[/red]", "gemm", 3000.0, 0.75, 4), Kernel("second", "norm", 1000.0, 0.25, 1))
    found = Profile(Setup("S", 8, compiled=True), "a GPU", {}, "bfloat16 autocast", 5000.0, kernels)
    console = Console(width=150, record=True, file=open("/dev/null", "w"))
    console.print(format_table(found, top=1))
    text = console.export_text()
    assert "ViT-S/16 224, batch 8, fastvit compiled, training step" in text
    assert "first[/red]" in text and "second" not in text and "75.0%" in text and "norm" in text
    assert "a step takes 5.00 ms, its kernels together 4.00 ms" in text


def test_as_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[Setup, str]] = []
    real = profile

    def small(setup: Setup, device: torch.device) -> Profile:
        asked.append((setup, device.type))
        return real(Setup("Ti", 1, mode="forward"), device, depth=1)

    monkeypatch.setattr(module, "profile", small)
    arguments = ["--model", "B", "--batch", "2", "--device", "cpu", "--mode", "forward", "--provider", "timm"]
    assert main([*arguments, "--compiled"]) == 0
    assert asked == [(Setup("B", 2, "timm", "forward", True), "cpu")]
    assert "time by class" in capsys.readouterr().out
    assert main(["--device", "cpu", "--json"]) == 0 and asked[-1] == (Setup("S", 8), "cpu")
    assert json.loads(capsys.readouterr().out.splitlines()[0])["us"] > 0


def test_a_missing_provider_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise ImportError("timm can't be imported: not here")

    monkeypatch.setattr(peers, "import_peer", missing)
    assert main(["--provider", "timm", "--device", "cpu", "--model", "Ti"]) == 1
    assert capsys.readouterr().err == "error: --provider timm: timm can't be imported: not here\n"
    monkeypatch.setitem(backends._REASONS, "cuda", lambda device_type: "it is not built")
    assert main(["--provider", "fastvit:cuda", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "error: --provider fastvit:cuda: it is not built\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda: no CUDA device" in capsys.readouterr().err
