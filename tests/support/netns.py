"""A network of hosts on one machine: network namespaces joined by a bridge, with links that can be cut and slowed.

Every host is a namespace with one interface `eth0` and an address of its own, and its own view of one folder
(`Network.home`), so that hosts share neither a network nor a disk, as on a real cluster. Names carry the id of the
process that made them: several networks live side by side, and each ends only what runs inside its own namespaces.

Needs root and iproute2. The kernel's `netem` is not needed: `slow` puts a small forwarder into the link.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cgroups import MemoryGroup

FORWARDER = Path(__file__).with_name("cluster_forwarder.py")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """Why no network can be made here, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    for program in ("ip", "mount"):
        if shutil.which(program) is None:
            return f"needs the program {program} (Debian and Ubuntu: apt install iproute2 mount)"
    name = f"gprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    try:
        if made.returncode == 0:
            made = subprocess.run(
                ["ip", "-n", name, "link", "add", "name", "left", "type", "veth", "peer", "name", "right"],
                capture_output=True,
                text=True,
            )
        return None if made.returncode == 0 else f"cannot make network namespaces here: {made.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def sweep() -> None:
    """End what a killed process left behind: namespaces that carry the id of a process that is no more."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for space in re.findall(r"^(glann-\d+-\S+)", listed, re.MULTILINE):
        if not Path(f"/proc/{space.split('-')[1]}").exists():
            _end_namespace(space)
    for folder in Path(tempfile.gettempdir()).glob("gn*-*"):
        owner = folder.name[2:].split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


class Network:
    """Hosts on one bridge. Use as a context manager: leaving it ends every process in it and removes it."""

    def __init__(self, label: str = "") -> None:
        sweep()
        # Of its own: processes see those of other networks, and Ray starts no head at an address where it finds one.
        self.prefix = f"10.{77 + os.getpid() // 250 % 100}.{os.getpid() % 250}."
        self.id = f"glann-{os.getpid()}{label and '-'}{label}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"gn{os.getpid()}-"))  # short: Ray's sockets lie below it
        self.home = self.folder / "home"  # a folder of its own on each host
        self.home.mkdir()
        # No name server is reached from a host. PyTorch asks for its peers' names: to be refused at once is better than
        # to wait 10 s each time for the machine's own.
        self._resolver = self.folder / "resolv.conf"
        self._resolver.write_text("nameserver 127.0.0.1\n")
        self.addresses: dict[str, str] = {}
        self.groups: dict[str, MemoryGroup] = {}  # of hosts whose memory is measured, or limited
        self._forwarders: dict[str, subprocess.Popen[bytes]] = {}
        self._bridge = self._namespace("bridge")
        try:
            _ip("netns", "add", self._bridge)
            _ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._bridge, "addr", "add", f"{self.prefix}254/24", "dev", "br0")
            _ip("-n", self._bridge, "link", "set", "br0", "up")
            _ip("-n", self._bridge, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process inside the namespaces, and remove them."""
        for host in self.addresses:
            self.end_processes(host)
        _end_namespace(self._bridge)
        for host in self.addresses:
            _end_namespace(self._namespace(host))
        for group in self.groups.values():
            group.close()
        self.groups.clear()
        self.addresses.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, host: str, number: int) -> str:
        """A host at address `prefix + number`, which is returned."""
        address, space, link = f"{self.prefix}{number}", self._namespace(host), f"v-{host}"
        self.addresses[host] = address
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", link, "netns", self._bridge)
        _ip("-n", self._bridge, "link", "set", link, "master", "br0", "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        # Programs find their own address by asking which one leads out.
        _ip("-n", space, "route", "add", "default", "via", f"{self.prefix}254")
        self.disk(host).mkdir()
        return address

    def disk(self, host: str) -> Path:
        """What the host sees as `home`, as it is seen from outside."""
        return self.folder / host

    def command(self, host: str, *words: str) -> list[str]:
        """The command line that runs `words` on the host."""
        enter = 'mount --bind "$1" /etc/resolv.conf && mount --bind "$2" "$3" && cd "$3" && shift 3 && exec "$@"'
        own = [str(self._resolver), str(self.disk(host)), str(self.home)]
        inside = ["ip", "netns", "exec", self._namespace(host), "sh", "-c", enter, "sh", *own, *words]
        if (group := self.groups.get(host)) is None:
            return inside
        return ["sh", "-c", 'echo 0 > "$1" && shift && exec "$@"', "sh", str(group.processes), *inside]

    def measure(self, host: str, limit: int | None = None) -> MemoryGroup:
        """Put processes that are started on the host from now on into a control group, which may limit their memory."""
        self.groups[host] = MemoryGroup(f"{self.id}-{host}", limit)
        return self.groups[host]

    def start(self, host: str, *words: str, env: Mapping[str, str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on the host, in the host's own `home`."""
        return subprocess.Popen(self.command(host, *words), env=dict(env), start_new_session=True, **options)

    def pids(self, host: str) -> list[int]:
        """The processes of a host."""
        return _pids(self._namespace(host))

    def end_processes(self, host: str) -> None:
        """SIGKILL to every process of the host, until none is left."""
        _end_all(self._namespace(host))

    def cut(self, host: str) -> None:
        """Pull the host's cable."""
        _ip("-n", self._bridge, "link", "set", f"v-{host}", "down")

    def heal(self, host: str) -> None:
        """Put the cable back, at full speed."""
        _ip("-n", self._bridge, "link", "set", f"v-{host}", "up")
        if forwarder := self._forwarders.pop(host, None):
            forwarder.kill()
            forwarder.wait()
            _ip("-n", self._bridge, "link", "del", f"p-{host}")
            _ip("-n", self._bridge, "link", "set", f"v-{host}", "master", "br0")

    def slow(self, host: str, ms: float, loss: float = 0.0) -> None:
        """Hold every frame of the host's link for `ms` in each direction, and drop a share `loss` of them."""
        self.heal(host)
        link, outer, inner = f"v-{host}", f"p-{host}", f"q-{host}"
        _ip("-n", self._bridge, "link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("-n", self._bridge, "link", "set", link, "nomaster")
        _ip("-n", self._bridge, "link", "set", inner, "master", "br0", "up")
        _ip("-n", self._bridge, "link", "set", outer, "up")
        arguments = [sys.executable, str(FORWARDER), link, outer, str(ms), str(loss)]
        # What the kernel leaves to the next device (long segments, checksums) must be done before the forwarder.
        for space, device in ((self._namespace(host), "eth0"), (self._bridge, inner)):
            words = ["ip", "netns", "exec", space, sys.executable, str(FORWARDER), "--plain", device]
            subprocess.run(words, check=True)
        self._forwarders[host] = subprocess.Popen(["ip", "netns", "exec", self._bridge, *arguments])

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Sockets that this thread, or a thread it starts, opens meanwhile belong to the host."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self._namespace(host)}", os.O_RDONLY)
        try:
            _set_namespace(there)
            yield
        finally:
            _set_namespace(before)
            os.close(before)
            os.close(there)

    def thread(self, host: str, target: Callable[[], None], name: str) -> threading.Thread:
        """A started daemon thread whose sockets belong to the host."""

        def run() -> None:
            with self.inside(host):
                target()

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def _namespace(self, host: str) -> str:
        return f"{self.id}-{host}"


def wait_until(ready: Callable[[], bool], seconds: float, otherwise: str, pause: float = 0.2) -> None:
    """Poll until `ready()`. Raises TimeoutError with `otherwise`."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(pause)


def _pids(space: str) -> list[int]:
    """The processes of a namespace. The caller may have threads inside; it is not one of them."""
    told = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [pid for pid in map(int, told.stdout.split()) if pid != os.getpid()]


def _end_all(space: str) -> None:
    for _ in range(100):
        pids = _pids(space)
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _end_namespace(space: str) -> None:
    _end_all(space)
    subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
