#!/usr/bin/env bash
# A DEALER with RECONNECT_IVL -1, or with IMMEDIATE 1, throws away messages that have arrived.
#
# Versions: pyzmq 27.3.0 (libzmq 4.3.5), Python 3.11.
#
# Behaviour: a ROUTER sends ten messages, which reach the DEALER (it polls as readable), and half a
# second later closes in order. Only then does the DEALER's application read. By default, and with a
# RECONNECT_IVL of an hour, it gets all ten. With RECONNECT_IVL -1 ("do not reconnect") or IMMEDIATE 1
# ("queue only for completed connections") it gets none: when the connection ends, the DEALER's
# pipe is terminated with what is in it. The manual names effects on reconnecting and on *outgoing*
# messages alone. One would expect that what was received stays readable, as on a TCP socket; the last
# words of a peer that leaves (the end of an answer, a goodbye) are the ones that get lost, and only
# where the reader was busy for a moment.
#
# Output seen:
#   default: 10 of 10; RECONNECT_IVL an hour: 10 of 10; RECONNECT_IVL -1: 0 of 10; IMMEDIATE 1: 0 of 10
#
# Exits 0 while the behaviour is as described, 1 when it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "pyzmq==27.3.0"
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys
import time

import zmq


def read(**options):
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    router.linger, dealer.linger = 1000, 0
    dealer.setsockopt(zmq.ROUTING_ID, b"peer")
    for name, value in options.items():
        dealer.setsockopt(getattr(zmq, name), value)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    dealer.connect(f"tcp://127.0.0.1:{port}")
    dealer.send(b"hello")
    router.recv_multipart()
    for number in range(10):
        router.send_multipart([b"peer", b"%d" % number])
    assert dealer.poll(5000), "nothing arrived"
    time.sleep(0.5)
    router.close()
    time.sleep(0.5)
    got = 0
    while dealer.poll(500):
        dealer.recv()
        got += 1
    dealer.close()
    context.term()
    return got


cases = {
    "default": ({}, 10),
    "RECONNECT_IVL an hour": ({"RECONNECT_IVL": 3_600_000}, 10),
    "RECONNECT_IVL -1": ({"RECONNECT_IVL": -1}, 0),
    "IMMEDIATE 1": ({"IMMEDIATE": 1}, 0),
}
seen = {name: read(**options) for name, (options, _) in cases.items()}
print("; ".join(f"{name}: {got} of 10" for name, got in seen.items()))
sys.exit(0 if all(seen[name] == expected for name, (_, expected) in cases.items()) else 1)
PYTHON
