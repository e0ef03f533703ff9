"""The time to the first step: parts that add up to it, from when the process began."""

import subprocess
import sys
import time

import pytest

from monitor import startup
from monitor.startup import Startup


def test_parts_add_up_and_one_that_comes_again_is_summed(monkeypatch):
    clock = iter([10.0, 10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr(startup, "age", lambda: 2.5)
    monkeypatch.setattr(startup.time, "monotonic", lambda: next(clock))
    found = Startup()
    for name in ("text", "state", "text"):
        found.lap(name)
    assert found.parts == {"imports": 2.5, "text": 1.0 + 3.0, "state": 2.0}
    assert found.told().startswith("8.5 s to the end of the first step: imports 2.5 s, text 4.0 s")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_process_knows_when_it_began():
    code = "import time; time.sleep(0.3); from monitor.startup import age; print(age())"
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(out.stdout) <= time.monotonic() - began + 0.02


def test_where_the_system_does_not_tell_it_is_the_time_computed(monkeypatch):
    monkeypatch.setattr(startup.Path, "read_text", lambda *_, **__: "12 (a name) R 1 2")
    assert startup.age() == pytest.approx(time.process_time(), abs=0.05)
