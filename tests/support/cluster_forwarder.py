"""Joins two interfaces like a cable that delays and loses frames; a program of its own, run inside a namespace.

python cluster_forwarder.py LEFT RIGHT MS LOSS      forward until killed
python cluster_forwarder.py --plain DEVICE          have DEVICE send whole frames, as `ethtool -K` would
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import random
import select
import socket
import struct
import sys
import time

ALL_FRAMES = 0x0003
OUTGOING = 4
SIOCETHTOOL = 0x8946
OFFLOADS = {"tx checksums": 0x17, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}
LONGEST_FRAME = 65536 + 64


def send_plain_frames(device: str) -> None:
    """What `ethtool -K DEVICE tx off tso off gso off gro off` does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in OFFLOADS.values():
            off = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP16x", device.encode(), ctypes.addressof(off))
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)


def forward(left: str, right: str, delay_s: float, loss: float) -> None:
    """Pass every frame that reaches one interface on to the other, `delay_s` later unless it is lost."""
    ends = []
    for device in (left, right):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(ALL_FRAMES))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        end.bind((device, 0))
        end.setblocking(False)
        ends.append(end)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    order = itertools.count()  # frames of one moment leave in the order in which they came
    lottery = random.Random(0)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], pause)[0]:
            for _ in range(64):
                try:
                    frame, (_, _, kind, *_) = end.recvfrom(LONGEST_FRAME)
                except BlockingIOError:
                    break
                if kind != OUTGOING and lottery.random() >= loss:
                    heapq.heappush(waiting, (time.monotonic() + delay_s, next(order), other[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the link is down or its queue is full: a lost frame
                end.send(frame)


if __name__ == "__main__":
    if sys.argv[1] == "--plain":
        send_plain_frames(sys.argv[2])
    else:
        forward(sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1000, float(sys.argv[4]))
