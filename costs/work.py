"""FLOPs of an operation, on one device."""

import math

from costs.flops import visible
from costs.program import Op


def flops_of(op: Op) -> tuple[float, str]:
    """(floating-point operations, dtype of the operands) of a matmul or an attention; else 0."""
    if op.name == "dot_general":
        (sums, _), _ = op.params["dimension_numbers"]
        contracted = math.prod(op.ins[0].shape[i] for i in sums)
        return 2.0 * math.prod(op.outs[0].shape) * contracted, str(op.ins[0].dtype)
    if op.name in ("ragged_dot_general", "ragged_dot"):
        # Each row meets one group's weight; or, of a weight's gradient, each group its own rows.
        a, b, out = op.ins[0], op.ins[1], op.outs[0]
        return 2.0 * _ragged(a.shape, b.shape, out.shape), str(a.dtype)
    if op.name.startswith("attention_"):
        return attention(op)
    if op.name.startswith("matmul_8bit"):
        return 2.0 * math.prod(op.outs[0].shape) * op.ins[0].shape[-1], str(op.ins[0].dtype)
    return 0.0, ""


def _ragged(a: tuple, b: tuple, out: tuple) -> float:
    if len(b) == 3:  # [M, K] x [E, ., .] -> [M, N]
        return math.prod(out) * a[-1]
    return a[0] * math.prod(out[1:])  # [M, K] x [M, N] -> [E, N, K]


def attention(op: Op) -> tuple[float, str]:
    """Two matmuls forward; backward five, as the products of queries and keys are made again."""
    window, causal = (int(word) for word in op.name.split("_")[2:])
    q = next((value for value in op.ins if len(value.shape) == 5), None)
    if q is None:  # what tracing put aside of it, as for a schedule of stages
        return 0.0, ""
    rows, tokens, heads, groups, size = q.shape
    # A block of earlier keys shows all of them or, of a window, the corner that it still reaches.
    seen = visible(tokens, window) if causal else visible(tokens) if window else tokens
    matmuls = 2 if op.name.startswith("attention_forward") else 5
    return 2.0 * matmuls * rows * heads * groups * tokens * size * seen, str(q.dtype)
