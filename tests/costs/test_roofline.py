"""Seconds by a stated model, by hand; measured steps are in tests/tools/test_plan.py."""

import pytest

from costs.devices import H100, V4, V5P
from costs.roofline import GPU, Time, attention_rate, bandwidth

ONE = dict.fromkeys(("dcn", "data", "stage", "fsdp", "expert", "context", "tensor"), 1)


@pytest.mark.parametrize(
    ("sizes", "axes", "rate"),
    [
        ({"fsdp": 8}, ("fsdp",), 450e9),  # inside a host: NVLink
        ({"data": 2, "fsdp": 8}, ("fsdp",), 450e9),
        ({"data": 2, "fsdp": 8}, ("data",), 50e9),  # one adapter a GPU
        ({"fsdp": 16}, ("fsdp",), 400e9),  # eight adapters of each of two hosts
        ({"data": 4, "fsdp": 2, "tensor": 4}, ("data", "fsdp"), 100e9),  # two of a host
        ({"data": 4, "fsdp": 2, "tensor": 4}, ("tensor",), 450e9),
    ],
)
def test_a_group_sends_at_the_rate_of_the_network_between_its_devices(sizes, axes, rate):
    assert bandwidth(axes, H100, ONE | sizes) == rate


def test_a_tpus_slice_is_one_network():
    assert bandwidth(("fsdp",), V5P, ONE | {"fsdp": 256}) == V5P.link


def test_attention_reaches_what_was_measured_at_two_sizes_of_head():
    assert attention_rate(GPU, 128) * 989.4 == pytest.approx(455, rel=0.02)
    assert attention_rate(GPU, 64) * 989.4 == pytest.approx(375, rel=0.02)
    assert attention_rate(GPU, 256) == GPU.attention and attention_rate(GPU, 32) < GPU.attention_64


def test_eight_bits_have_the_datasheets_rate_where_it_gives_one():
    assert H100.peak("int8") == H100.peak("float8_e4m3fn") == 1979e12
    assert H100.peak("float32") == H100.bf16 and V4.peak("int8") == V4.bf16


def test_what_hides_takes_no_time_as_long_as_there_is_work_to_hide_behind():
    time = Time(matmul=3.0, attention=1.0, memory=1.0, hides=2.0, waits=0.5)
    assert time.step(0.0) == 7.5 and time.step(1.0) == 5.5
    assert time.step(1.0, slows=0.5) == 6.5, "it takes from what runs beside it"
    time.hides = 9.0
    assert time.step(1.0) == pytest.approx(5.0 + 0.5 + 4.0)
