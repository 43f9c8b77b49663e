"""How the figures are shown, and how the time to the first 200 is taken."""

import os
import socket
import sys
import time

# What is aimed at: (figure, bound, text).
GUARDRAILS = [
    ("ready after start, ms", 50), ("100,000 workloads ready, s", 0.8), ("100,000 workloads peak, MiB", 143),
    ("longest request while 100,000 workloads arrive, more by ms", 15), ("KiB a connection, each side", 3),
    ("100,000 idle connections in one process, MB", 400),
    ("first SVID of 10,000 at once from a fake agent, p99 ms", 500), ("KiB an SVID at rest", 20),
    ("CPU of 10,000 SVIDs at rest, %", 1), ("10,000 streams again after an agent's restart, s", 10),
    ("certificates a second", 1500), ("certificates per CPU second", 2500),
]


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def first_200(pid, host, port, path, started, seconds=60):
    """Seconds since `started` until GET answers 200 in the network namespace of `pid`."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    entered = False
    while time.monotonic() - started < seconds:
        try:
            if not entered:
                # `ip netns exec` enters the namespace a moment after it was started.
                if os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
                    time.sleep(0.0005)
                    continue
                namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
                setns(namespace)
                os.close(namespace)
                entered = True
            with socket.create_connection((host, port), timeout=2) as connection:
                connection.sendall(request)
                if b" 200 " in connection.recv(1024).split(b"\r\n")[0]:
                    return time.monotonic() - started
        except OSError:
            pass
        finally:
            if entered:
                setns(home)
                entered = False
        time.sleep(0.001)
    raise SystemExit(f"bench: {host}:{port}{path} did not answer 200 within {seconds} s")


def setns(descriptor):
    """os.setns came with Python 3.12."""
    if hasattr(os, "setns"):
        os.setns(descriptor, 0)
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def table(header, rows):
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
    print()


def show(figures, work):
    progress("")
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    kernel, cores = os.uname().release, os.cpu_count()
    print(f"\nLinux {kernel}, {cores} cores. Medians of interleaved rounds; CPU is of both proxies together.\n")
    titles = (("traffic", "A proxy in each pod"), ("frames", "A proxy in each pod, the server's limited to frames of 16 KiB"),
              ("plain", "A proxy in each pod that only copies, beside Envoy's tunnels"),
              ("inpod", "One proxy for both pods (in-pod mode)"))
    for key, title in titles:
        if key not in figures:
            continue
        print(f"{title}\n")
        rows = []
        for name, unit, _ in work:
            by = figures[key][name]
            z, e, d = by["zspire"], by["envoy"], by.get("direct", {})

            def latency(sample, key):
                return f"{sample[key]:.0f}" if key in sample else ""

            rows.append([
                name, unit, f"{z['cpu']:.2f}", f"{e['cpu']:.2f}", f"{z['cpu'] / e['cpu']:.2f}",
                *(latency(s, k) for k in ("p50", "p99") for s in (d, z, e)),
            ])
        table(["work", "unit", "zspire", "envoy", "ratio", "p50 µs direct", "zspire", "envoy", "p99 µs direct", "zspire",
               "envoy"], rows)
    for key in ("memory", "held"):
        if key not in figures:
            continue
        rows = []
        for program, m in figures[key].items():
            rows.append([program] + [" / ".join(f"{k / 1024:.1f}" for k in m[key]) for key in ("start", "held", "closed")]
                        + [" / ".join(f"{k:.1f}" for k in m["per_connection"])])
        table(["RSS, client / server", "at start, MiB", f"{m['connections']:,} idle connections", "after they closed",
               "KiB a connection"], rows)
    if "fairness" in figures:
        rows = []
        for program, f in figures["fairness"].items():
            alone, beside = f["alone"], f["beside"]
            rows.append([program, *(f"{part[key]:.0f}" for key in ("p50", "p99") for part in (alone, beside)),
                         f"{beside['p99'] / alone['p99']:.1f}"])
        table(["500 requests a second", "p50 µs alone", "beside bulk", "p99 µs alone", "beside bulk", "ratio"], rows)
    if "policies" in figures:
        least = next(iter(figures["policies"].values()))
        rows = [[name, f"{cpu:.2f}", f"{cpu / least:.2f}"] for name, cpu in figures["policies"].items()]
        table(["policies, new connections", "CPU-s/100k", "ratio"], rows)
    if "services" in figures:
        few, many = figures["services"].values()
        rows = [[name, f"{cpu:.2f}"] for name, cpu in figures["services"].items()] + [["ratio", f"{many / few:.2f}"]]
        table(["services x endpoints, new connections", "CPU-s/100k"], rows)
    measured = {}
    if "push" in figures:
        quiet, pushed = figures["push"]["quiet"], figures["push"]["pushed"]
        measured["longest request in a quiet while, ms"] = quiet
        measured["longest request while 100,000 workloads arrive, more by ms"] = pushed - quiet
    if "start" in figures:
        measured["ready after start, ms"] = figures["start"]["median"]
    if "workloads" in figures:
        measured["100,000 workloads ready, s"] = figures["workloads"]["seconds"]
        measured["100,000 workloads RSS, MiB"] = figures["workloads"]["rss_mib"]
        measured["100,000 workloads peak, MiB"] = figures["workloads"]["peak_mib"]
    if "memory" in figures:
        measured["KiB a connection, each side"] = max(figures["memory"]["zspire"]["per_connection"])
    if "held" in figures:
        for held in figures["held"].values():
            measured[f"{held['connections']:,} idle connections in one process, MB"] = max(held["held"]) * 1024 / 1e6
    if "ca" in figures:
        measured["certificates a second"] = figures["ca"]["per_second"]
        measured["certificates per CPU second"] = figures["ca"]["per_cpu_second"]
    if "spire" in figures:
        spire = figures["spire"]
        measured["first SVID of 10,000 at once from a fake agent, p50 ms"] = spire["first_p50_ms"]
        measured["first SVID of 10,000 at once from a fake agent, p99 ms"] = spire["first_p99_ms"]
        measured["KiB an SVID at rest"] = spire["kib_each"]
        measured["CPU of 10,000 SVIDs at rest, %"] = spire["idle_cpu_percent"]
        measured["10,000 streams again after an agent's restart, s"] = spire["reestablished_s"]
    if measured:
        bounds = dict(GUARDRAILS)
        rows = []
        for name, value in measured.items():
            bound = bounds.get(name)
            least = name.startswith("certificates")
            aim = "" if bound is None else f"{'≥' if least else '≤'} {bound:g}"
            met = "" if bound is None else ("yes" if (value >= bound if least else value <= bound) else "NO")
            rows.append([name, f"{value:.1f}" if value >= 10 else f"{value:.2f}", aim, met])
        table(["figure", "measured", "aim", "met"], rows)
