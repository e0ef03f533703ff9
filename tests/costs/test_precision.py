"""Which formats are advised, at what price."""

import pytest

from configs.load import load
from costs import precision
from costs.devices import H100, V4

GIB = 2**30
BASE = (0.9, 60 * GIB)
ONES = {
    precision.INT8: (0.77, 60 * GIB),
    precision.HEAD: (0.76, 60 * GIB),
    precision.FP8: None,
    precision.MOMENTS: (0.95, 50 * GIB),
}


PAID = {
    precision.INT8: "yes, for its speed",
    precision.HEAD: "no: costs more than 1 %",
    precision.FP8: "no: nothing gained",
    precision.MOMENTS: "yes, where memory is short",
}


@pytest.mark.parametrize(
    ("most", "used"), [(1.0, PAID), (2.0, PAID | {precision.HEAD: "yes, for its speed"})]
)
def test_a_format_is_advised_for_what_it_gains_if_its_measured_price_may_be_paid(most, used):
    found = {one.name: one for one in precision.training(BASE, ONES, most)}
    assert {name: found[name].use for name in used} == used
    assert found[precision.INT8].gain == "770 ms, 60.0 GiB: -14%, +0%"


def test_what_was_never_measured_is_never_advised():
    assert precision.NONE.use(", for its speed", 100.0) == "no: not measured"


def test_weights_that_are_served_take_their_bits_and_are_read_once_a_token():
    model = load("configs/llama.py:1B", {}).model
    found = {one.name: one for one in precision.serving(model, H100, 1.0)}
    # 1,498,482,688 numbers, 262,668,288 of each table; a token meets all but the first of the two.
    assert found["bfloat16"].gain.startswith("weights of 2.79 GiB, at most 1,355 tokens/s")
    assert found["--scheme=w8"].gain.startswith("weights of 1.40 GiB, at most 2,711 tokens/s")
    assert found["--scheme=w4g64"].gain.startswith("weights of 1.03 GiB")
    uses = {name: one.use.partition(":")[0] for name, one in found.items()}
    assert uses["--scheme=w8"] == uses["--scheme=w8a8"] == "yes, for its bytes"
    assert uses["--scheme=w4g64"] == uses["--scheme=fp8"] == "no"


def test_an_encoder_decodes_nothing():
    run = load("configs/quickstart.py", {"model.arch.attention.causal": "false"})
    assert "tokens/s" not in precision.serving(run.model, V4, 1.0)[0].gain
