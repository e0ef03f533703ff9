"""Kernels and bytes of compiled programs, against figures by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from costs import fusion

# f32[256] has 1,024 bytes. A matmul; then a mean over rows and what is divided by it, in two
# kernels; a loop that puts a row of 64 bytes into a stack, 4 times.
TEXT = """
HloModule jit_step

FileNames
1 "/home/me/project/model/layers.py"

FunctionNames
1 "RMSNorm.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=100 end_line=100 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=103 end_line=103 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_reduce (p: f32[16,16]) -> f32[16] {
  %p = f32[16,16]{1,0} parameter(0)
  %square = f32[16,16]{1,0} multiply(%p, %p), metadata={op_name="x" stack_frame_id=1}
  %zero = f32[] constant(0)
  ROOT %mean = f32[16]{0} reduce(%square, %zero), dimensions={1}, to_apply=%add
}

%fused_divide (p: f32[16,16], q: f32[16]) -> f32[16,16] {
  %p.1 = f32[16,16]{1,0} parameter(0)
  %q.1 = f32[16]{0} parameter(1)
  %wide = f32[16,16]{1,0} broadcast(%q.1), dimensions={0}
  ROOT %divide = f32[16,16]{1,0} divide(%p.1, %wide), metadata={op_name="y" stack_frame_id=2}
}

%fused_update (s: f32[4,16], x: f32[16,16], i: s32[]) -> f32[4,16] {
  %s = f32[4,16]{1,0} parameter(0)
  %x = f32[16,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %row = f32[1,16]{1,0} dynamic-slice(%x, %i, %zero.1), dynamic_slice_sizes={1,16}
  %twice = f32[1,16]{1,0} add(%row, %row)
  ROOT %update = f32[4,16]{1,0} dynamic-update-slice(%s, %twice, %i, %zero.1)
}

%body (carry: (s32[], f32[4,16], f32[16,16])) -> (s32[], f32[4,16], f32[16,16]) {
  %carry = (s32[], /*index=1*/f32[4,16]{1,0}, f32[16,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %stack = f32[4,16]{1,0} get-tuple-element(%carry), index=1
  %rows = f32[16,16]{1,0} get-tuple-element(%carry), index=2
  %updated = f32[4,16]{1,0} fusion(%stack, %rows, %n), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], f32[4,16]{1,0}, f32[16,16]{1,0}) tuple(%n, %updated, %rows)
}

%cond (carry.1: (s32[], f32[4,16], f32[16,16])) -> pred[] {
  %carry.1 = (s32[], f32[4,16]{1,0}, f32[16,16]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%carry.1), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%n.1, %four), direction=LT
}

ENTRY %main (x: f32[16,16], w: f32[16,16]) -> f32[4,16] {
  %x.2 = f32[16,16]{1,0} parameter(0)
  %w = f32[16,16]{1,0} parameter(1)
  %product = (f32[16,16]{1,0}, s8[512]{0}) custom-call(%x.2, %w), custom_call_target="__cublas$gemm"
  %y = f32[16,16]{1,0} get-tuple-element(%product), index=0
  %mean.1 = f32[16]{0} fusion(%y), kind=kInput, calls=%fused_reduce
  %normed = f32[16,16]{1,0} fusion(%y, %mean.1), kind=kLoop, calls=%fused_divide, metadata={op_name="y" stack_frame_id=2}
  %none = s32[] constant(0)
  %empty = f32[4,16]{1,0} broadcast(%none), dimensions={}
  %first = (s32[], f32[4,16]{1,0}, f32[16,16]{1,0}) tuple(%none, %empty, %normed)
  %loop = (s32[], f32[4,16]{1,0}, f32[16,16]{1,0}) while(%first), condition=%cond, body=%body
  ROOT %stack.1 = f32[4,16]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def found():
    return fusion.analyse(TEXT, "/home/me/project")


def test_a_kernel_moves_what_it_reads_and_writes_and_a_loops_as_often_as_it_runs(found):
    each = {kernel.name: (kernel.kind, kernel.bytes, kernel.times) for kernel in found.kernels}
    assert each == {
        "product": ("matmul", 3 * 1024, 1),  # its workspace aside
        "mean.1": ("reduction", 1024 + 64, 1),
        "normed": ("elementwise", 1024 + 64 + 1024, 1),
        "empty": ("copy", 256, 1),
        "updated": ("elementwise", 64 + 4 + 64, 4),  # a row, its number, a row
    }
    assert found.launches == 8
    assert found.moved == 3072 + 1088 + 2112 + 256 + 4 * 132
    assert next(iter(found.kinds().values())) == (1, 3072)


def test_what_fusion_saved_is_what_stayed_inside(found):
    apart = {kernel.name: kernel.apart for kernel in found.kernels}
    assert apart["mean.1"] == 3 * 1024 + (1024 + 64)  # the square, read twice, written; the sum
    assert apart["normed"] == 2112  # one operation
    assert found.saved == (4160 - 1088) + 4 * (apart["updated"] - 132)
    assert found.fused == 2 + 4 * 3


def test_what_is_left_between_memory_bound_kernels_is_told_with_its_places(found):
    (left,) = found.left
    assert left == fusion.Left("model/layers.py:100", ("model/layers.py:103",), (16,), 128, 1)
    assert found.least == found.moved - 128  # what the loop takes has to be written
    assert found.beside == 2 * 1024  # the product, read by the mean and by the division


def test_a_fused_program_moves_its_arguments_and_results():
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    text = jax.jit(lambda x: jnp.tanh(x) * 2 + x).lower(x).compile().as_text()
    found = fusion.analyse(text)
    assert found.moved == 2 * x.size * 4
    assert found.launches == 1 and not found.left
    assert found.saved >= 4 * x.size * 4


def test_a_matmul_keeps_a_program_in_parts_and_the_text_is_of_any_backend():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    text = jax.jit(lambda x: jnp.sin(jnp.cos(x) @ x)).lower(x).compile().as_text()
    found = fusion.analyse(text)
    assert found.kinds()["matmul"][0] == 1
    assert np.isclose(found.moved, (2 + 3 + 2) * x.size * 4)
