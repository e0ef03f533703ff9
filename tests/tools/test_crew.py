"""Processes that share calls: all are made, and one that dies takes only its own call with it."""

import os
import signal

from tools.crew import Crew


def begin():
    os.environ["MESHLM_TEST_CREW"] = "begun"


def call(piece):
    if piece == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if piece == "leaves":
        os._exit(3)
    if piece == "raises":
        raise ValueError("what is wrong\nand more")
    return piece, os.getpid(), os.environ.get("MESHLM_TEST_CREW")


def test_one_that_dies_takes_only_its_own_call_with_it(capfd):
    pieces = [0, "dies", 2, "raises", "leaves", 5]
    with Crew(2, begin) as crew:
        found = dict(crew.each(call, pieces))
        again = dict(crew.each(call, [6]))
    assert sorted(found) == list(range(6))
    assert [found[i][0] for i in (0, 2, 5)] == [0, 2, 5] and again[0][0] == 6
    assert str(found[1]) == "its process ended by SIGSEGV"
    assert str(found[3]) == "what is wrong\nand more" and "Traceback" in capfd.readouterr().err
    assert str(found[4]) == "its process ended with exit code 3"
    made = [*(found[i] for i in (0, 2, 5)), again[0]]
    assert all(process != os.getpid() and word == "begun" for _, process, word in made)


def test_without_processes_calls_are_made_here(capfd):
    with Crew(0, begin) as crew:
        found = dict(crew.each(call, [0, "raises"]))
    assert found[0] == (0, os.getpid(), None)
    assert isinstance(found[1], RuntimeError) and "Traceback" in capfd.readouterr().err
