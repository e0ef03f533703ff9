"""Which results become buffers, how long they live, and what of them a peak is made of."""

import jax
import jax.numpy as jnp
from jax import lax

from costs import kernels, peak
from tests.costs.test_program import read

PLAIN = kernels.Compiler()
KIB = 1024


def highest(found, compiler=PLAIN):
    return peak.peak(kernels.schedule(found, compiler))


def square(n=128):
    return (n, n)  # 64 KiB of float32


def test_a_chain_of_elementwise_operations_is_one_kernel_and_takes_no_buffer():
    found = read(lambda x: jnp.tanh(jnp.exp(x) + 1) * 2, square())
    assert highest(found).bytes == 0  # straight to the result, which the caller holds
    assert len(kernels.schedule(found, PLAIN).kernels) == 1


def test_a_matmul_needs_its_operands_in_memory():
    found = read(lambda x, w: jnp.sum(jnp.exp(x) @ w), square(), square())
    assert highest(found).bytes == 2 * 64 * KIB  # exp(x), and the product
    fused = kernels.Compiler(dots_fuse=True)  # a TPU's matmul makes exp(x) as it goes
    assert 0 <= highest(found, fused).bytes - 64 * KIB < KIB


def test_a_value_dies_with_its_last_reader():
    def chain(x, w):
        for _ in range(6):
            x = x @ w
        return jnp.sum(x)

    assert highest(read(chain, square(), square())).bytes == 2 * 64 * KIB


def test_what_the_backward_pass_reads_lives_until_then():
    def loss(x, w):
        for _ in range(6):
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    found = read(jax.grad(loss), square(), square())
    # Five outputs that later layers read, and at the turn what the last layers need at once.
    assert 6 * 64 * KIB <= highest(found).bytes <= 10 * 64 * KIB


def test_a_loop_keeps_its_stacks_to_its_end_and_its_body_counts_once():
    def loss(w, xs):
        def layer(x, _):
            return jnp.tanh(x @ w), None

        return jnp.sum(lax.scan(layer, xs, None, length=10)[0])

    moment = highest(read(jax.grad(loss), square(), square()))
    stacks = [buffer.bytes for buffer in moment.buffers if buffer.kind == "stack"]
    assert stacks and set(stacks) == {10 * 64 * KIB}
    assert moment.bytes <= sum(stacks) + 6 * 64 * KIB


def test_a_loop_writes_parts_of_what_it_carries_where_that_lies():
    def pieces(x, g):
        def step(i, x):
            part = lax.dynamic_slice_in_dim(x, 16 * i, 16) - lax.dynamic_slice_in_dim(g, 16 * i, 16)
            return lax.dynamic_update_slice_in_dim(x, part, 16 * i, 0)

        return lax.fori_loop(0, 8, step, x)

    assert highest(read(pieces, square(), square())).bytes < KIB  # in the state that it was given
    made = highest(read(lambda x, g: pieces(x @ g, g), square(), square()))
    assert 64 * KIB <= made.bytes < 65 * KIB
    [loop] = kernels.schedule(read(pieces, square(), square()), PLAIN).kernels
    [update] = [k for k in loop.inner[0].kernels if k.name == "dynamic_update_slice"]
    assert sum(update.reads.values()) // KIB == 2 * 8 and update.written == 8 * KIB


def test_of_a_value_with_many_ways_to_it_each_is_not_walked():
    def mixed(x):
        for _ in range(60):
            x = jnp.sin(x) * x
        return x

    [kernel] = kernels.schedule(read(mixed, (8, 8)), PLAIN).kernels  # by 2^60 ways, never
    assert sum(kernel.reads.values()) == kernel.written == 8 * 8 * 4


def test_a_gpu_lays_a_stack_out_anew_that_is_gathered_along_an_inner_dim():
    def gathered(dim):
        def layer(x, w):
            spec = [None, None]
            spec[dim] = "fsdp"

            def local(w):
                return lax.all_gather(w, "fsdp", axis=dim, tiled=True, to="reduced")

            whole = jax.shard_map(local, in_specs=jax.P(*spec), out_specs=jax.P(reduced={"fsdp"}))(
                w
            )
            return jnp.einsum("bd,fd->bf", x, whole, out_sharding=jax.P("fsdp", None)), None

        def function(x, ws):
            return lax.scan(layer, x, ws)[0]

        spec = [None, None, None]
        spec[dim + 1] = "fsdp"
        specs = (jax.P("fsdp", None), jax.P(*spec))
        return read(function, square(), (12, *square()), specs=specs, sizes=(1, 8, 1))

    gpu = kernels.COMPILERS["gpu"]
    turned = [
        sum(b.bytes for k in kernels.schedule(gathered(dim), gpu).kernels
            for b in k.writes if b.kind == "turned")
        for dim in (0, 1)
    ]  # fmt: skip
    assert turned == [0, 12 * 64 * KIB // 8]


def test_a_sum_starts_a_round_late_if_only_a_stack_asks_for_it():
    @jax.shard_map(in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp"))
    def scattered(x):
        return lax.psum_scatter(x, "fsdp", tiled=True)

    def rounds(keeps, x):
        def step(total, _):
            part = scattered(jnp.tanh(x)) * 2
            return (total, part) if keeps else (total + part, None)

        zeros = jnp.zeros((16, 128), out_sharding=jax.P("fsdp"))
        return lax.scan(step, zeros, None, length=12)

    late = []
    for keeps in (True, False):
        args = {"specs": (jax.P("fsdp", None),), "sizes": (1, 8, 1)}
        found = read(lambda x, keeps=keeps: rounds(keeps, x), square(), **args)
        [loop] = (k for k in kernels.schedule(found, kernels.COMPILERS["gpu"]).kernels if k.inner)
        late.append([buffer.bytes for buffer in loop.inner[0].always])
    assert late == [[64 * KIB // 8], []]


def test_a_gpu_computes_each_row_for_every_expert_on_copies_laid_out_twice():
    @jax.shard_map(in_specs=(jax.P(), jax.P()), out_specs=jax.P())
    def experts(x, w):
        return lax.ragged_dot(x, w, jnp.full(4, 32, jnp.int32))

    found = read(experts, square(), (4, *square()))
    gpu = kernels.Compiler(dense_experts=True)
    grouped, dense = (kernels.schedule(found, one).kernels[-1] for one in (PLAIN, gpu))
    assert grouped.flops == 2 * 128**3 and dense.flops == 4 * grouped.flops
    assert highest(found, gpu).bytes == (2 * 4 + 1) * 64 * KIB  # and the product


def test_what_takes_long_to_compute_and_several_read_is_written_once_on_a_gpu():
    def twice(x, w):
        y = jnp.tanh(x @ w)
        return (y + 1) @ w, (y * 2) @ w

    found = read(twice, square(), square())
    count = [
        sum(k.name == "fusion" for k in kernels.schedule(found, one).kernels)
        for one in (PLAIN, kernels.Compiler(dear=frozenset({"tanh"})))
    ]
    assert count == [2, 3]


def test_the_parts_of_a_peak_add_up_and_have_their_names():
    def step(table, x):
        logits = x @ table.T
        return jax.grad(lambda table, x: jnp.sum(jnp.exp(x @ table.T)))(table, x), jnp.sum(logits)

    moment = highest(read(step, (256, 64), (128, 64)))
    parts = peak.parts(moment, [((256, 64), "float32")], vocab=256)
    assert sum(parts.values()) == moment.bytes
    assert parts["logits"] >= 128 * 256 * 4
