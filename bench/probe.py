"""Requests; how long each took, in milliseconds, a line each.

probe.py HOST PORT                    on one connection, one after the other, with a pause of a millisecond after each
probe.py HOST PORT RATE CONNECTIONS   so many a second, on the connections in turn, each timed from when it was due
"""

import socket
import sys
import threading
import time

host, port = sys.argv[1], int(sys.argv[2])
request = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def ask(connection):
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"x" * 64):
        more = connection.recv(65536)
        if not more:
            raise SystemExit("the connection was closed")
        answer += more


def connect():
    connection = socket.create_connection((host, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def told(started):
    sys.stdout.write(f"{(time.perf_counter() - started) * 1e3:.3f}\n")
    sys.stdout.flush()


def paced(interval, due):
    with connect() as connection:
        while True:
            due += interval
            time.sleep(max(0, due - time.perf_counter()))
            ask(connection)
            told(due)


def one_after_the_other():
    with connect() as connection:
        while True:
            started = time.perf_counter()
            ask(connection)
            told(started)
            time.sleep(0.001)


if len(sys.argv) <= 3:
    one_after_the_other()
else:
    rate, connections = float(sys.argv[3]), int(sys.argv[4])
    began = time.perf_counter()
    threads = [
        threading.Thread(target=paced, args=(connections / rate, began + number / rate), daemon=True)
        for number in range(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        raise SystemExit("a connection has ended")
