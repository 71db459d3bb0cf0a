"""Mends bfloat16 in Triton's interpreter, which is silently wrong as shipped.

With ``TRITON_INTERPRET=1`` kernels run on the CPU through numpy. Numpy has no bfloat16, so the interpreter keeps
such values as their raw 16 bits: ``tl.dot`` multiplies those bits as integers, a cast from an integer keeps the raw
bits and a cast from float32 truncates. ``mend`` puts dot and casts right and makes every other arithmetic operation
on bfloat16 raise, because a wrong number that looks like a number is worse than an error.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

# Operations that only move bits, or that ``mend`` replaces: right for bfloat16.
_MOVES_BITS = frozenset(
    {
        "create_addptr",
        "create_bitcast",
        "create_broadcast",
        "create_cat",
        "create_expand_dims",
        "create_gather",
        "create_int_to_ptr",
        "create_join",
        "create_ptr_to_int",
        "create_reshape",
        "create_select",
        "create_splat",
        "create_split",
        "create_trans",
        "create_unsplat",
        "create_load",
        "create_store",
        "create_masked_load",
        "create_masked_store",
        "create_descriptor_load",
        "create_descriptor_store",
        "create_make_tensor_descriptor",
        "create_print",
        "create_assert",
    }
)
_CASTS = (
    "create_si_to_fp",
    "create_ui_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
    "create_fp_ext",
    "create_fp_trunc",
    "create_int_cast",
)


def interpreting() -> bool:
    """True when Triton interprets kernels; it reads the variable when it is imported, so set it before that."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "on", "yes")


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 values -> float32 values (exact)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values -> uint16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def mend() -> bool:
    """Mends the interpreter once, when it is in use; returns whether it is mended."""
    if not interpreting():
        return False
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if not getattr(builder, "_fastvit_mended", False):
        _replace_dot_and_casts(builder, interpreter)
        _forbid_other_arithmetic(builder, interpreter)
        _forbid_reductions(interpreter)
        _index_with_any_numpy(interpreter)
        builder._fastvit_mended = True
    return True


def _replace_dot_and_casts(builder: Any, interpreter: Any) -> None:
    import triton.language as tl

    shipped_dot, shipped_cast = builder.create_dot, builder.cast_impl
    shipped_fp_to_fp = builder.create_fp_to_fp
    handle = interpreter.TensorHandle

    def widened(value: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return value
        return handle(bfloat16_to_float32(value.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return shipped_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self: Any, source: Any, target_type: Any) -> Any:
        target = target_type.scalar
        if source.dtype.scalar == target:
            return source
        if target == tl.bfloat16:
            # Any source reaches bfloat16 by way of float32: exact for integers of up to 24 bits and for float16.
            return handle(float32_to_bfloat16(widened(source).data.astype(np.float32)), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16:
            source = widened(source)
            return source if target == tl.float32 else shipped_cast(self, source, target_type)
        return shipped_cast(self, source, target_type)

    def create_fp_to_fp(self: Any, source: Any, target_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target_type.scalar):
            return cast_impl(self, source, target_type)
        return shipped_fp_to_fp(self, source, target_type, rounding_mode)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    for name in _CASTS:
        setattr(builder, name, lambda self, source, target_type, *_: self.cast_impl(source, target_type))


def _is_bfloat16(value: Any, interpreter: Any) -> bool:
    import triton.language as tl

    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _forbid_other_arithmetic(builder: Any, interpreter: Any) -> None:
    replaced = {"create_dot", "create_fp_to_fp", *_CASTS}
    for name in dir(builder):
        if name.startswith("create_") and name not in _MOVES_BITS and name not in replaced:
            setattr(builder, name, _raising_on_bfloat16(name, getattr(builder, name), interpreter))


def _raising_on_bfloat16(name: str, shipped: Any, interpreter: Any) -> Any:
    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        if any(_is_bfloat16(value, interpreter) for value in arguments):
            raise NotImplementedError(f"{name} on bfloat16 is wrong in Triton's interpreter: cast to float32 first")
        return shipped(self, *arguments, **options)

    return checked


def _forbid_reductions(interpreter: Any) -> None:
    shipped = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, values: Any) -> None:
        shipped(self, values)
        if any(_is_bfloat16(value.handle, interpreter) for value in values):
            raise NotImplementedError("a reduction of bfloat16 is wrong in Triton's interpreter: cast to float32 first")

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor


def _index_with_any_numpy(interpreter: Any) -> None:
    """A scalar of the interpreter is an array of one element, which numpy 2.4 no longer turns into an int for
    Triton 3.6: a loop over a runtime bound would raise."""
    shipped = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        shipped(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(()))

    interpreter._patch_lang_tensor = patch_lang_tensor
