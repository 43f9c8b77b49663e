"""Whether a tunnel is fair: 500 requests a second beside bulk streams that take all they can get, to the same peer."""

import subprocess
import sys
import time
from pathlib import Path

import report
from lab import APP, BULK, SERVER, Process, inside

RATE, CONNECTIONS = 500, 16


def paced(run, seconds):
    """p50 and p99, in microseconds, of requests at a fixed rate."""
    log = run / "paced.log"
    probe = Process("client", [sys.executable, Path(__file__).parent / "probe.py", SERVER, APP, RATE, CONNECTIONS], log=log)
    time.sleep(seconds)
    alive = probe.alive()
    probe.stop()
    lines = log.read_text().splitlines()
    if not alive:
        raise SystemExit(f"bench: the probe has ended: {lines[-1:]}")
    taken = sorted(float(line) * 1e3 for line in lines[:-1])
    return {"p50": taken[len(taken) // 2], "p99": taken[len(taken) * 99 // 100], "requests": len(taken)}


def beside_bulk(run, network, programs, seconds, streams=4):
    """The same alone, and beside `streams` bulk streams."""
    figures = {}
    for program, (outbound, inbound, _) in programs.items():
        network.rules(outbound, inbound)
        alone = paced(run, seconds)
        bulk = subprocess.Popen(
            inside("client", "iperf3", "-c", SERVER, "-p", BULK, "-t", seconds + 4, "-P", streams),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        time.sleep(2)
        beside = paced(run, seconds)
        if bulk.wait(timeout=seconds + 30) != 0:
            raise SystemExit("bench: iperf3 failed beside the requests")
        figures[program] = {"alone": alone, "beside": beside}
        report.progress(f"fairness  {program}")
    network.rules()
    return figures
