"""A step whose gradient is not finite, or whose loss jumps, is skipped; too many end the run."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from configs.load import load
from configs.run import WINDOW, GuardConfig, Run
from model.transformer import Transformer
from monitor.progress import Progress
from tests.training.conftest import Recorded
from training.guard import Guard, rewound
from training.health import Health, reason

POISON = 120  # "x", which stands in no document of the tiny run


@pytest.fixture
def poisoned(monkeypatch):
    """A row that begins with POISON makes the gradient NaN; with one more, the loss high."""
    loss = Transformer.loss

    def spoiled(self, inputs, *args, **kwargs):
        total, told = loss(self, inputs, *args, **kwargs)
        first = jnp.arange(inputs.shape[1])[None] == 0
        nan, high = (jnp.any((inputs == POISON + i) & first) for i in range(2))
        total = jnp.where(nan, jnp.nan, 1.0) * total  # the gradient; the loss that is told is not
        return total, {**told, "nats": jnp.where(high, 9.0, 1.0) * told["nats"]}

    monkeypatch.setattr(Transformer, "loss", spoiled)


def poison(*steps: int, token: int = POISON) -> dict:
    """`at` of a command line: the token goes into the batches of these steps."""

    def spoil() -> None:
        Recorded.batches[-1].arrays["inputs"][0, 0] = token

    return dict.fromkeys(steps, spoil)


QUICK = ("--config.eval.every=0", "--config.eval.bytes=1", "--config.sample.tokens=0")


def lines(ended) -> list[dict]:
    path = ended.workdir / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def params(ended, step: int) -> dict[str, bytes]:
    """Parameters and moments of a save."""
    kept = ended.state(step).items()
    return {name: value for name, value in kept if name.startswith(("params", "opt_state"))}


# ---- the decision ----


def judged(cfg: GuardConfig, losses, norms=None) -> list[bool]:
    """Whether each step of a run with these losses is taken."""
    guard, found = Guard.fresh(), []
    judge = jax.jit(lambda guard, loss, norm: guard.judge(cfg, loss, norm)[:2])
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        good, guard = judge(guard, jnp.float32(loss), jnp.float32(norm))
        found.append(bool(good))
    return found


def test_a_step_is_taken_if_loss_and_gradient_are_finite():
    nan, inf = float("nan"), float("inf")
    losses, norms = [3, nan, 3, inf, 3, 3], [1, 1, nan, 1, inf, 2]
    assert judged(GuardConfig(), losses, norms) == [True, False, False, False, False, True]


def test_a_loss_far_above_the_last_is_a_spike_and_spoils_no_later_judgement():
    draw = np.random.default_rng(0)
    losses = (3 + 0.1 * draw.standard_normal(40)).tolist()
    spiky = [*losses, 4.5, 4.5, 3.1, 2.9, 4.5]
    cfg = GuardConfig(spike=6, window=32)
    assert judged(cfg, spiky) == [True] * 40 + [False, False, True, True, False]
    assert all(judged(GuardConfig(), spiky))


def test_there_are_no_spikes_before_the_window_is_full_nor_on_a_flat_loss():
    cfg = GuardConfig(spike=6, window=8)
    assert judged(cfg, [1.0] * 7 + [99.0])[-1]
    assert all(judged(cfg, [1.0] * 20 + [1.0 + 1e-6]))


def test_what_lies_between_a_state_and_the_step_it_is_put_to_counts_as_skipped():
    guard = Guard(jnp.ones(WINDOW), jnp.int32(3), jnp.int32(0))
    state = rewound(train.State(jnp.int32(10), (), (), guard), jnp.int32(25))
    assert (int(state.step), int(state.guard.skipped), int(state.guard.in_row)) == (25, 18, 0)


def test_the_reason_says_which_number_it_was():
    assert reason(float("nan"), 1, 0) == "the loss is nan, not finite"
    assert "gradient is inf, the loss 2" in reason(2, float("inf"), 0)
    assert "7.5 deviations above" in reason(2, 1, 7.5)


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [("stop", 0, "at least 1"), ("spike", -6.0, "at least 0"), ("window", 129, "8 to 128"),
     ("rewind", -1, "at least 0")],
)  # fmt: skip
def test_a_guard_that_cannot_be_is_refused(field, value, right):
    with pytest.raises(ValueError, match=f"{field}={value} must be {right}"):
        Run(guard=GuardConfig(**{field: value}))


# ---- the run ----


def test_a_poisoned_batch_is_skipped_counted_and_its_samples_are_logged(poisoned, command_line):
    ended = command_line(*QUICK, "--config.steps=5", "--config.checkpoint.every=1", at=poison(3, 4))
    assert ended.code == 0, ended.err
    assert params(ended, 2) == params(ended, 3) == params(ended, 4) != params(ended, 5)
    assert [row["skipped"] for row in ended.rows().values()] == [0, 0, 1, 2, 2]
    told = lines(ended)
    assert [row["step"] for row in told] == [3, 4]
    assert told[0]["samples"] == json.loads(json.dumps(ended.batches[2].samples))
    why = r"skipped    step (\d+): the norm of the gradient is nan"
    assert re.findall(why, ended.out) == ["3", "4"]
    run = load(str(ended.workdir / "config.json"))
    rate = train.make_schedule(run.optim, run.steps)(2)  # it stood still for two steps
    assert ended.rows()[5]["lr"] == pytest.approx(float(rate), rel=1e-6)


@pytest.mark.slow
def test_so_many_in_a_row_end_the_run_with_code_3_saved_and_it_can_go_on(poisoned, command_line):
    ended = command_line(*QUICK, "--config.guard.stop=3", at=poison(5, 6, 7))
    assert ended.code == 3, ended.out
    assert "steps 5 to 7 were skipped in a row (guard.stop=3)" in ended.err
    assert "Parameters and moments are as before step 5" in ended.err
    assert "is saved" in ended.err and "Traceback" not in ended.err
    last = ended.steps_saved()[-1]
    assert 7 <= last <= 9 and [row["step"] for row in lines(ended)] == [5, 6, 7]
    again = command_line(*QUICK, "--config.guard.stop=3")
    assert again.code == 0 and f"restored   step {last}" in again.out
    assert again.batches[0].samples not in [batch.samples for batch in ended.batches[:last]]


@pytest.mark.slow
@pytest.mark.parametrize(("every", "keep", "to"), [(4, 9, 4), (1, 2, 6)])
def test_a_run_may_go_back_to_a_save_and_past_the_batches_instead(
    every, keep, to, poisoned, command_line
):
    """Saves of skipped steps do not take the place of the one to which it goes back."""
    ended = command_line(
        *QUICK, "--config.guard.stop=3", "--config.guard.rewind=1", "--config.log.every=1",
        f"--config.checkpoint.every={every}", f"--config.checkpoint.keep={keep}",
        at=poison(7, 8, 9),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    (told,) = re.findall(rf"rewound    to the state of step {to}, past .* step (\d+)", ended.out)
    back = int(told)
    if keep > 2:
        assert params(ended, back) == params(ended, to)
    assert ended.rows()[12]["skipped"] == back - to and list(ended.rows()) == [*range(1, 13)]
    assert len(set(ended.samples())) == len(ended.samples())


def test_a_run_that_could_not_go_back_is_not_told_to_try(tmp_path):
    for rewind, advice in (
        (0, "guard.rewind=1, to go on from an earlier save with later batches, may help"),
        (1, "more than guard.rewind=1, with a save from before step 0 kept (checkpoint.keep), may"),
    ):
        found = Health(GuardConfig(rewind=rewind), tmp_path, Progress(9, 0, main=False))
        assert advice in found.verdict()


@pytest.mark.slow
def test_a_spike_is_skipped_when_asked(poisoned, command_line):
    args = (*QUICK, "--config.log.every=1", "--config.guard.window=8")
    ended = command_line(*args, "--config.guard.spike=50", at=poison(11, token=POISON + 1))
    assert ended.code == 0 and [row["step"] for row in lines(ended)] == [11], ended.err
    assert "deviations above the mean" in ended.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, {"dcn": 2, "fsdp": 4}],
    ids=str,
)
def test_on_every_mesh_all_devices_skip_the_same_steps(poisoned, command_line, sizes):
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    ended = command_line(
        *QUICK, *mesh, "--config.steps=6", "--config.checkpoint.every=1", at=poison(3, 6)
    )
    assert ended.code == 0, ended.err
    assert params(ended, 2) == params(ended, 3) != params(ended, 4)
    assert params(ended, 5) == params(ended, 6)
    assert ended.rows()[6]["skipped"] == 2
