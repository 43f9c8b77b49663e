"""Requests on one connection, one after the other, with a pause of a millisecond; how long each took, in milliseconds, a line each."""

import socket
import sys
import time

host, port = sys.argv[1], int(sys.argv[2])
request = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
with socket.create_connection((host, port)) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        started = time.perf_counter()
        connection.sendall(request)
        answer = b""
        while not answer.endswith(b"x" * 64):
            more = connection.recv(65536)
            if not more:
                raise SystemExit("the connection was closed")
            answer += more
        print(f"{(time.perf_counter() - started) * 1e3:.3f}", flush=True)
        time.sleep(0.001)
