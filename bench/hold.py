"""Opens COUNT connections to HOST:PORT, sends one request on each, and holds them until it is killed."""

import socket
import sys
import time

host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
request = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
held, answered = [], 0
# A hundred at a time, so that the accept queue is not what is measured.
while len(held) < count:
    batch = []
    for _ in range(min(100, count - len(held))):
        connection = socket.create_connection((host, port), timeout=20)
        connection.sendall(request)
        batch.append(connection)
    for connection in batch:
        if b" 200 " not in connection.recv(4096):
            sys.exit("an answer was not 200")
    held += batch
print("holding", len(held), flush=True)
time.sleep(3600)
