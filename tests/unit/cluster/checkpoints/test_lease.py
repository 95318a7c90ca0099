"""Protects the lease: one command at a time writes a run, and a dead one is followed soon."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from glann.cluster.checkpoints import lease as leases
from glann.cluster.checkpoints.lease import Lease, RunTaken, Ticket, enforces_conditions, hold, require
from glann.errors import EnvironmentFault
from glann.storage.local import LocalStore


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    monkeypatch.setattr(leases, "PATIENCE_S", 0.6)
    monkeypatch.setattr(leases, "_POLL_S", 0.05)
    return LocalStore(tmp_path / "checkpoints")


@pytest.fixture
def elsewhere(monkeypatch):
    """Processes are told as if they ran on other machines, whose process ids mean nothing here."""
    monkeypatch.setattr(leases, "_process", lambda pid: "")


def abandoned(store, number=1, **fields) -> Ticket:
    """A lease whose holder was killed."""
    lease = leases._new(number).model_copy(update=fields)
    store.write(f"lease-{number:06d}.json", lease.model_dump_json().encode())
    return Ticket(number, lease.owner)


def told() -> tuple[list[str], object]:
    lines: list[str] = []
    return lines, lines.append


def test_a_second_command_is_refused_in_one_line_that_names_the_first(store, elsewhere):
    with hold(store, print) as first:
        with (
            pytest.raises(RunTaken, match=r"has been training the run .* since 20\d\d-.* UTC") as error,
            hold(store, print),
        ):
            pass
        assert str(os.getpid()) in str(error.value)
        assert "\n" not in str(error.value)
        first.check()
        require(store, first.ticket)


def test_a_second_command_on_this_machine_is_refused_too(store):
    with hold(store, print), pytest.raises(RunTaken), hold(store, print):
        pass


def test_a_command_that_ended_is_followed_at_once(store, elsewhere):
    lines, say = told()
    for number in (1, 2, 3):
        with hold(store, say) as held:
            assert held.ticket.number == number
    assert lines == []
    assert store.list() == ["lease-000003.json"]


def test_a_holder_that_is_not_heard_of_is_followed_after_the_patience(store, elsewhere):
    lost = abandoned(store, 7)
    lines, say = told()
    began = time.monotonic()
    with hold(store, say) as held:
        assert 0.6 <= time.monotonic() - began < 5
        assert held.ticket.number == 8
        with pytest.raises(RunTaken, match="was taken over by"):
            require(store, lost)
    assert any("has not renewed its lease" in line for line in lines)


def test_a_killed_process_of_this_machine_is_not_waited_for(store, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE_S", 60.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    abandoned(store, process=leases._process(child.pid))
    with pytest.raises(RunTaken), hold(_counting(store), print):
        pass
    child.kill()
    child.wait()
    began = time.monotonic()
    with hold(store, print):
        assert time.monotonic() - began < 10


def test_a_process_id_given_to_another_process_is_no_sign_of_life(store):
    boot, space, pid, started = leases._process(os.getpid()).split()
    abandoned(store, process=f"{boot} {space} {pid} {int(started) - 1}")
    with hold(store, print) as held:
        assert held.ticket.number == 2


@pytest.mark.parametrize("part", [0, 1])
def test_nothing_is_concluded_from_a_process_id_of_another_machine_or_container(part):
    parts = leases._process(os.getpid()).split()
    parts[part], parts[2] = "another", "999999999"
    assert not leases._is_gone(" ".join(parts))


def test_whoever_was_taken_over_notices_and_stops(store, elsewhere):
    with hold(store, print) as first:
        store.write("lease-000002.json", leases._new(2).model_dump_json().encode())  # as after a long pause of ours
        with pytest.raises(RunTaken, match="was taken over"):
            require(store, first.ticket)
        deadline = time.monotonic() + 10
        while first._lost is None and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(RunTaken):
            first.check()
    assert not Lease.model_validate_json(store.read("lease-000002.json")).released


def test_of_many_commands_that_take_over_one_succeeds(store, elsewhere):
    abandoned(store)
    held, refused, end = [], [], threading.Event()

    def command():
        try:
            with hold(store, lambda _: None) as lease:
                held.append(lease.ticket)
                end.wait(30)
        except RunTaken:
            refused.append(1)

    threads = [threading.Thread(target=command) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(held) + len(refused) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    end.set()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


def test_a_store_that_is_away_for_a_while_does_not_end_a_run(store, elsewhere, monkeypatch):
    with hold(store, print) as held:

        def away(*_, **__):
            raise EnvironmentFault("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "write", away)
            time.sleep(0.3)
            held.check()
        before = Lease.model_validate_json(store.read("lease-000001.json")).count
        time.sleep(0.5)
        assert Lease.model_validate_json(store.read("lease-000001.json")).count > before


def test_a_folder_that_was_removed_is_a_lost_run(store, elsewhere):
    with hold(store, print) as held:
        pass
    store.delete("lease-000001.json")
    with pytest.raises(RunTaken, match="was removed"):
        require(store, held.ticket)


class _Lax(LocalStore):
    """A server that knows nothing of If-None-Match."""

    def write(self, key, data, *, only_if_absent=False):
        super().write(key, data)


def test_a_server_without_conditional_writes_is_told(store):
    assert enforces_conditions(store)
    assert store.list() == []
    lines, say = told()
    with hold(_Lax(store.root), say):
        assert "does not enforce If-None-Match" in lines[0]
    assert len(lines) == 1


def _counting(store):
    """The same store, in which the lease is seen to be renewed."""

    class Counting(LocalStore):
        reads = 0

        def read(self, key):
            if not key.startswith("lease-0"):
                return super().read(key)
            type(self).reads += 1
            lease = Lease.model_validate_json(super().read(key))
            return lease.model_copy(update={"count": self.reads}).model_dump_json().encode()

    return Counting(store.root)
