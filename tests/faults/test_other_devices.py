"""A run moves from 8 devices to 4, 2, 1 and back to 8, each time laid out otherwise."""

import random

import pytest

from tests.faults.often import SEED, nightly
from tests.tolerance import SAME
from tests.training.conftest import Ended

pytestmark = [pytest.mark.slow, nightly]

STEPS, EACH = 50, 10
PLACES = [  # devices, mesh, and the rest of the layout
    (8, {"data": 4, "fsdp": 2}, ("--config.layout.optimizer=data",)),
    (4, {"fsdp": 2, "tensor": 2}, ()),
    (2, {"stage": 2}, ("--config.optim.accumulate=2",)),
    (1, {}, ()),
    (8, {"dcn": 2, "fsdp": 2, "tensor": 2}, ("--config.layout.residual=none",)),
]


@pytest.fixture
def mixture(recipe, tmp_path) -> tuple[str, ...]:
    """Flags of a run on two sources, packed, of unequal shares."""
    draw, other = random.Random(SEED), tmp_path / "other"
    other.mkdir()
    for i in range(30):
        words = (draw.choice(("one", "two", "three\n")) for _ in range(draw.randint(1, 90)))
        (other / f"{i:02}.txt").write_text(f"{i} {' '.join(words)}")
    return (
        f"--config.data.sources={recipe.parent / 'corpus'},{other}", "--config.data.weights=1,3",
        "--config.model.layers=2", "--config.data.seq=64", f"--config.steps={STEPS}",
        "--config.log.every=1",
        "--config.checkpoint.every=0", "--config.eval.every=0", "--config.eval.bytes=1",
        "--config.sample.tokens=0", f"--config.seed={SEED}",
    )  # fmt: skip


def on(devices: int) -> dict[str, str]:
    count = f"--xla_force_host_platform_device_count={devices}"
    return {"XLA_FLAGS": f"--xla_backend_optimization_level=0 {count}"}


def test_losses_and_samples_are_those_of_one_device_whatever_the_devices(start, mixture, tmp_path):
    alone = start(tmp_path / "alone", *mixture, **on(1))
    code, _, err = alone.end()
    assert code == 0, err
    moved, samples = Ended(0, "", "", [], tmp_path / "moved"), []
    for i, (devices, sizes, more) in enumerate(PLACES):
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in {"data": 1, **sizes}.items()]
        last = i == len(PLACES) - 1
        stop = {} if last else {"SIGNAL_AT": str(EACH)}
        process = start(moved.workdir, *mixture, *mesh, *more, **on(devices), **stop)
        code, out, err = process.end()
        assert code == (0 if last else 143), err
        assert i == 0 or f"restored   step {EACH * i} " in out
        samples += process.samples()[:EACH]
    assert samples == alone.samples()[:STEPS]
    assert {piece[0] for batch in samples for row in batch for piece in row} == {0, 1}  # sources
    right = Ended(0, "", "", [], tmp_path / "alone").losses()
    assert list(right) == list(range(1, STEPS + 1))
    assert moved.losses() == pytest.approx(right, rel=SAME)
