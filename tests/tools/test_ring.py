"""`python -m tools.ring` times what it says and refuses what it cannot split."""

import re

import pytest

from tests.commands import status
from tools import ring

TINY = ("--tokens=64", "--heads=2", "--kv_heads=1", "--head_dim=4", "--repeats=1")


@pytest.mark.slow
def test_it_tells_the_rates_of_one_device_and_of_the_ring(capsys):
    assert status(ring, "--context=2", *TINY) == 0
    out = capsys.readouterr().out
    assert "2 x cpu: 1 x 64 tokens, 2 heads over 1 of 4, bfloat16" in out
    assert re.findall(r"(?m)^\| (one device|ring of 2|its work alone|its talk alone) ", out)[3:]
    assert re.search(r"efficiency [\d.]+%, \d+% of the talk hidden", out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--context=3", "--tokens=64"), "--tokens=64 is no multiple of 2 x --context=3"),
        (("--context=16", "--tokens=64"), "--context=16 is more than the 8 devices here"),
        (("--heads=3", "--kv_heads=2"), "--heads=3 is no multiple of --kv_heads=2"),
        (("--heads=0",), "--heads=0 must be a positive integer"),
        (("--documents=0",), "--documents=0 must be a positive integer"),
        (("what",), "'what' stands without a flag"),
    ],
)
def test_what_a_user_mends_is_exit_code_2_and_one_message(capsys, args, message):
    assert status(ring, *args) == 2
    assert message in capsys.readouterr().err
