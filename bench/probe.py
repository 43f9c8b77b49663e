"""Requests on one connection, one after the other; how long each took, in milliseconds, a line each.

With a pause of a millisecond after each; or, if a rate is given, as many a second, each timed from when it was due.
"""

import socket
import sys
import time

host, port = sys.argv[1], int(sys.argv[2])
rate = float(sys.argv[3]) if len(sys.argv) > 3 else None
request = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
with socket.create_connection((host, port)) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    due = time.perf_counter()
    while True:
        if rate:
            due += 1 / rate
            time.sleep(max(0, due - time.perf_counter()))
        started = due if rate else time.perf_counter()
        connection.sendall(request)
        answer = b""
        while not answer.endswith(b"x" * 64):
            more = connection.recv(65536)
            if not more:
                raise SystemExit("the connection was closed")
            answer += more
        print(f"{(time.perf_counter() - started) * 1e3:.3f}", flush=True)
        if not rate:
            time.sleep(0.001)
