"""Tests the port for LMCache's notifications with libzmq as client: notify.py XPYD FOLDER CONNECTOR. Needs no engines."""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request

import msgspec
import zmq

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
READY = b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"
MEBIBYTE = b"x" * (1 << 20)
MOST_GROWTH_KILOBYTES = 16 * 1024


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Proxy:
    """`xpyd proxy` over engines that do not exist."""

    def __init__(self, xpyd):
        self.http, self.port = free_port(), free_port()
        command = [xpyd, "proxy", "--connector", "lmcache", "--port", str(self.http), "--proxy-port", str(self.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if "receiving notifications" in line:
                break

    def count(self, name):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/metrics", timeout=60) as page:
            return float(re.search(rf"^xpyd_{name} (\S+)$", page.read().decode(), re.MULTILINE)[1])

    def wait_for(self, expected):
        """Waits until this number of unexpected notifications has arrived."""
        deadline = time.monotonic() + 60
        while (count := self.count("late_notifications")) != expected:
            assert time.monotonic() < deadline, f"{count} notifications came, not {expected}"
            time.sleep(0.05)

    def kilobytes(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return int(re.search(r"VmHWM:\s+(\d+)", status.read())[1])

    def raw(self, data):
        """Sends bytes over a new connection. Returns the connection, and whether the other side has closed it."""
        connection = socket.create_connection(("127.0.0.1", self.port), 5)
        connection.settimeout(15)
        try:
            connection.sendall(data)
            while connection.recv(1000):
                pass
            return connection, True
        except TimeoutError:
            return connection, False
        except OSError:
            return connection, True


def notification(number):
    return msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": f"request-{number}"})


def from_libzmq(proxy, context):
    push = context.socket(zmq.PUSH)
    # Several heartbeats pass while nothing else is sent. One without a reply would end the connection.
    push.setsockopt(zmq.HEARTBEAT_IVL, 100)
    push.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2000)
    push.setsockopt(zmq.HEARTBEAT_TTL, 2000)
    monitor = push.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    push.connect(f"tcp://127.0.0.1:{proxy.port}")
    for number in range(1000):
        push.send(notification(number))
    proxy.wait_for(1000)
    time.sleep(3)
    push.send_multipart([notification(1000), b"more", b""])
    proxy.wait_for(1001)
    assert not monitor.poll(0), "the connection broke"
    print("  1,000 notifications, heartbeats for 3 s, a message of three frames: all received over one connection", flush=True)
    # LMCache's sockets live as long as their engine, which can outlive xpyd.
    pushes = [context.socket(zmq.PUSH) for _ in range(200)]
    for number, other in enumerate(pushes):
        other.connect(f"tcp://127.0.0.1:{proxy.port}")
        other.send(notification(number))
    proxy.wait_for(1201)
    push.send(notification(0))
    proxy.wait_for(1202)
    print("  200 sockets at once: a notification from each", flush=True)
    for other in (push, *pushes):
        other.close(0)


def from_foreign_clients(proxy):
    """Sends what once crashed xpyd or filled its memory."""
    for name, data in {
        "a frame of 1 TiB before the handshake": GREETING + b"\x06" + struct.pack(">Q", 1 << 40),
        "a frame of 1 TiB": GREETING + READY + b"\x02" + struct.pack(">Q", 1 << 40),
        "a real frame of 300 MiB": GREETING + READY + b"\x02" + struct.pack(">Q", 300 << 20) + MEBIBYTE * 300,
        "HTTP": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        "half a greeting": GREETING[:33],
    }.items():
        connection, closed = proxy.raw(data)
        connection.close()
        assert closed, f"{name}: the connection is still open"
    connection, _ = proxy.raw(GREETING + READY + b"\x01\x64" + b"x" * 100 + (b"\x01\x64" + b"x" * 100) * 3000)
    connection.close()
    held = [socket.create_connection(("127.0.0.1", proxy.port), 5) for _ in range(1000)]
    descriptors = len(os.listdir(f"/proc/{proxy.process.pid}/fd"))
    for connection in held:
        connection.close()
    print(f"  foreign clients: disconnected each time; with 1,000 connections {descriptors} descriptors", flush=True)
    assert descriptors < 400, descriptors


def main():
    xpyd, _, connector = sys.argv[1:]
    if connector != "lmcache":
        return
    proxy = Proxy(xpyd)
    try:
        before = proxy.kilobytes()
        from_foreign_clients(proxy)
        from_libzmq(proxy, zmq.Context())
        growth = proxy.kilobytes() - before
        print(f"  peak memory: {growth} kB more than at the start", flush=True)
        assert growth < MOST_GROWTH_KILOBYTES
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.process.wait(60) == 0
    finally:
        proxy.process.kill()
    print("== notifications: passed", flush=True)


if __name__ == "__main__":
    main()
