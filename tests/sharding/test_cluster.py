"""The hub and its members, as threads of one process: who meets, who is lost, where all stop."""

import random
import re
import socket
import threading
import time

import pytest

from sharding.cluster import hub, join, member
from sharding.cluster.hub import Hub
from sharding.cluster.member import Member, meet

HEARTBEAT = 1.0
RUN = {"seed": "0"}
SOON = 20.0  # seconds that a loaded machine may take for what takes milliseconds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(hub, "GRACE_S", 0.3)
    monkeypatch.setattr(member, "GRACE_S", 0.3)


class Group:
    """A hub and its members."""

    def __init__(self, count: int, heartbeat: float = HEARTBEAT):
        port = free_port()
        self.hub = Hub(port, count, heartbeat, SOON)
        self.lost: dict[int, str] = {}
        self.codes: dict[int, int] = {}
        self.members: dict[int, Member] = {}

        def come(process: int):
            line, start = meet(("127.0.0.1", port), count, process, RUN, SOON)
            own = self.hub if process == 0 else None

            def lost(why: str, code: int):
                self.codes[process], self.lost[process] = code, why

            self.members[process] = Member(line, process, start["first"], heartbeat, own, lost)

        together([lambda k=k: come(k) for k in range(count)])

    def hear(self, *processes: int) -> list[str]:
        """What these were told, once all of them were."""
        end = time.monotonic() + SOON
        while not set(processes) <= self.lost.keys():
            assert time.monotonic() < end, self.lost
            time.sleep(0.01)
        return [self.lost[process] for process in processes]

    def close(self):
        for one in self.members.values():
            one.leave()


def together(calls: list) -> list:
    """The results of calls, each in a thread of its own; ValueErrors as results."""
    results = [None] * len(calls)

    def run(i: int):
        try:
            results[i] = calls[i]()
        except ValueError as error:
            results[i] = str(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    return results


@pytest.fixture
def group():
    made = []

    def group(*args, **kwargs):
        made.append(Group(*args, **kwargs))
        return made[-1]

    yield group
    for one in made:
        one.close()


def test_who_does_not_come_is_told_to_those_who_did():
    port = free_port()
    Hub(port, 4, HEARTBEAT, 1.0)
    told = together([lambda k=k: meet(("127.0.0.1", port), 4, k, RUN, 1.0) for k in (0, 2)])
    assert told[0] == told[1]
    assert "2 of --processes=4 came within 1 s: process 0 (pid " in told[0]
    assert "No --process=1, 3: start all" in told[0] and "--connect_timeout=SECONDS" in told[0]


def test_a_process_that_was_told_another_number_of_processes_ends_all():
    port = free_port()
    Hub(port, 3, HEARTBEAT, SOON)
    calls = [(3, 0), (2, 1), (3, 2)]
    random.shuffle(calls)
    told = together([lambda n=n, k=k: meet(("127.0.0.1", port), n, k, RUN, SOON) for n, k in calls])
    assert len(set(told)) == 1
    assert "was started with --processes=2, process 0 with --processes=3" in told[0]


def test_two_of_one_number_end_all():
    port = free_port()
    Hub(port, 3, HEARTBEAT, SOON)
    told = together([lambda k=k: meet(("127.0.0.1", port), 3, k, RUN, SOON) for k in (1, 1, 0)])
    assert len(set(told)) == 1
    assert "--process=1 was started twice, as process 1 (pid" in told[0]
    assert "each takes its own number, 0 to 2" in told[0]


def test_another_run_ends_all_and_its_parts_are_named():
    port = free_port()
    Hub(port, 2, HEARTBEAT, SOON)
    runs = ({"data": "a", "optim": "b", "seed": "c"}, {"data": "a", "optim": "x", "seed": "y"})
    told = together([lambda k=k: meet(("127.0.0.1", port), 2, k, runs[k], SOON) for k in (0, 1)])
    assert told[0] == told[1]
    assert re.search(r"process \d \(.*\) has another configuration than process \d", told[0])
    assert "optim, seed differ; start all with the same flags, files" in told[0]


def test_nobody_at_the_address_is_told_with_the_reason():
    port = free_port()
    with pytest.raises(ValueError, match=f"no process 0 at .*:{port} within 0 s: .*refused"):
        meet(("127.0.0.1", port), 2, 1, RUN, 0.4)
    with pytest.raises(ValueError, match=r"no process 0 at --coordinator=no\.such\.host"):
        meet(("no.such.host.invalid", 1), 2, 1, RUN, 0.4)


def test_somebody_else_at_the_address_is_told():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connected, _ = other.accept()
            connected.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connected.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ValueError, match="is not process 0 of this run"):
            meet(other.getsockname(), 2, 1, RUN, 1.0)


def test_strangers_who_talk_to_the_hub_change_nothing(group):
    made = group(2)
    address = made.hub._listener.getsockname()[:2]
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 5000 + b"\n",
        b"x" * (1 << 16),
        b'{"kind": "hello"}\n',
        b'{"kind": "lost", "process": 1}\n',
        b'{"kind": "hello", "process": Infinity, "processes": 2, "pid": 9, "run": {}}\n',
        b'{"kind": ["hello"], "process": {}}\n',
        b'{"kind": "hello", "process": 1, "processes": 2, "pid": 9, "host": "h", "run": {}}\n',
        b'{"kind": "ended"}\n' * 100,
    ):
        with socket.create_connection(("127.0.0.1", address[1])) as stranger:
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
    time.sleep(1.2 * HEARTBEAT)
    assert not made.lost
    assert together([made.members[k].end for k in (0, 1)]) == [True, True]


def test_who_comes_late_waits_for_the_run_to_end(group):
    made = group(2)
    port = made.hub._listener.getsockname()[1]
    with pytest.raises(ValueError, match="within 1 s: the run there has all its processes"):
        meet(("127.0.0.1", port), 2, 1, RUN, 1.0)
    assert together([made.members[k].end for k in (0, 1)]) == [True, True]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_connection_that_closes_is_a_lost_process_and_all_name_it(group, victim):
    made = group(3)
    others = {0, 1, 2} - {victim}
    if victim == 0:  # and the hub with it
        made.hub._tell = lambda *_, **__: None
        for peer in list(made.hub._peers.values()):
            peer.line._socket.shutdown(socket.SHUT_RDWR)
    else:
        made.members[victim]._line._socket.shutdown(socket.SHUT_RDWR)
    for told in made.hear(*others):
        assert f"process {victim} (pid " in told and " is gone: its connection closed" in told


def test_a_silent_process_is_lost_after_the_heartbeat_and_not_before(group, monkeypatch):
    made = group(3)
    time.sleep(1.5 * HEARTBEAT)
    assert not made.lost
    monkeypatch.setattr(made.members[2], "_beat", lambda: None)
    start = time.monotonic()
    for told in made.hear(0, 1):
        assert f"process 2 (pid {member.os.getpid()} on {socket.gethostname()})" in told
        assert "has been silent for 1 s: it is stopped, hung or cut off" in told
    assert time.monotonic() - start > HEARTBEAT / 2
    assert made.hear(2)[0].startswith("the other processes have given this one up")


@pytest.mark.parametrize("leaves", [False, True], ids=["waits", "is gone before"])
def test_a_process_with_an_error_of_its_own_is_named_with_it(group, monkeypatch, leaves):
    monkeypatch.setattr(hub, "GRACE_S", SOON if leaves else 0.3)
    made = group(3)
    made.members[1].fail(3, "steps 4 to 9 were skipped")
    if leaves:
        made.members[1].leave()
    for told in made.hear(0, 2):
        assert "process 1 (pid " in told and "ended with code 3: steps 4 to 9 were" in told
    assert 1 not in made.lost  # it ends with its own
    assert made.codes == {0: 3, 2: 3}


def test_an_error_that_all_have_is_nobodys_and_waits_for_nobody(group, monkeypatch):
    monkeypatch.setattr(hub, "GRACE_S", SOON)
    made = group(3)
    start = time.monotonic()
    together([lambda k=k: made.members[k].fail(2, "mesh: 3 devices") for k in range(3)])
    assert time.monotonic() - start < SOON / 2 and not made.lost


def test_the_error_that_a_lost_process_causes_is_not_taken_for_the_cause(group):
    made = group(3)
    failing = threading.Thread(target=made.members[0].fail, args=(1, "Gloo failed"), daemon=True)
    failing.start()
    time.sleep(0.1)
    made.members[1]._line._socket.shutdown(socket.SHUT_RDWR)
    for told in made.hear(0, 2):
        assert "process 1 (pid " in told and "is gone" in told
    assert made.codes[0] == made.codes[2] == 0
    failing.join(0.3)  # it would end the process with a code of its own, before the loss is told
    assert failing.is_alive()


def test_all_wait_for_the_last_one_at_the_end(group):
    made = group(3)
    ended = []
    for k in (0, 1):
        threading.Thread(
            target=lambda k=k: ended.append(made.members[k].end()), daemon=True
        ).start()
    time.sleep(1.2 * HEARTBEAT)
    assert not ended and not made.lost
    assert made.members[2].end() is True
    end = time.monotonic() + SOON
    while len(ended) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert ended == [True, True] and not made.lost


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            [(5, 1), (5, 0), (5, 1)],
            r"5 s: still reading the data of step 5 are process 1 \(.*\), and the others are furth",
        ),
        (
            [(7, 1), (5, 1), (5, 1)],
            r"still computing step 5 are process 1 \(.*\), process 2 \(.*\), and the others",
        ),
        ([(5, 1), (5, 1), (5, 1)], "still computing step 5 are all 3 processes$"),
    ],
)
def test_a_step_that_never_ends_names_who_is_behind(group, places, message):
    made = group(3)
    for k, place in enumerate(places):
        made.members[k].at(*place)
    made.members[0].stuck(5)
    told = made.hear(0, 1, 2)
    assert len(set(told)) == 1
    assert re.search(message, told[0]), told


@pytest.mark.parametrize("seed", range(8))
def test_all_stop_at_the_same_step_however_far_each_one_is(group, seed):
    """Threads in the place of processes, whose devices wait for each other as in a collective."""
    draw, count, ahead = random.Random(seed), 4, 3
    made = group(count)
    begun = [0] * count  # steps
    moved = threading.Condition()
    asked = {draw.randrange(count): draw.randint(1, 30) for _ in range(draw.randint(1, 3))}
    pauses = [[draw.choice((0, 0, 0.001, 0.01)) for _ in range(200)] for _ in range(count)]

    def train(process: int) -> int:
        for step in range(1, 200):
            with moved:
                begun[process] = step
                moved.notify_all()
                # A result from `ahead` steps ago needs that all have begun that step.
                assert moved.wait_for(lambda s=step: min(begun) >= s - ahead, SOON)
            time.sleep(pauses[process][step])
            received = 15 if step >= asked.get(process, 999) else 0
            if made.members[process].stop(step, received):
                begun[process] = 999  # what it left behind is done
                with moved:
                    moved.notify_all()
                return step
        return -1

    (step,) = set(together([lambda k=k: train(k) for k in range(count)]))
    assert min(asked.values()) <= step <= min(asked.values()) + 2 * ahead + 20
    assert not made.lost


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, 0), "go together: give all three"),
        (("a:1", 2, 2), "--process=2 must be 0 to 1"),
        (("a:1", 2, -1), "--process=-1 must be 0 to 1"),
        (("a:1", 0, 0), "--processes=0 must be at least 1"),
        (("a", 2, 0), "--coordinator=a must be HOST:PORT, such as node1:1234"),
        (("a:b", 2, 0), "--coordinator=a:b must be HOST:PORT"),
        (("a:65536", 2, 0), "--coordinator=a:65536 must be HOST:PORT"),
        ((":1234", 2, 0), "--coordinator=:1234 must be HOST:PORT"),
    ],
)
def test_what_no_cluster_can_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        join.place(*given)


def test_an_address_may_be_of_either_kind():
    assert join.split("node1:1234") == ("node1", 1234)
    assert join.split("[::1]:1234") == ("::1", 1234)


def test_one_process_of_one_is_alone_and_so_is_one_without_a_cluster():
    assert join.place("a:1", 1, 0) is None
    assert join.place(None, None, None) is None


def test_a_port_that_is_taken_is_told():
    with hub.listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on port {port} of .* another port"):
            join.meet_all(
                join.Place(f"a:{port}", 2, 0), RUN, timeout=1, heartbeat=1, lost=print
            )  # fmt: skip
