"""What idle connections cost in memory: some of them beside Envoy, and 100,000 in one process."""

import resource
import sys
import time
from pathlib import Path

import report
from lab import APP, ROOT, SERVER, Network, Process, get, inside, sh, start_nginx, wait_for, zspire_env

HOLD = Path(__file__).parent / "hold.py"
MANY = ROOT / "target/release/many-proxies"


def beside_envoy(run, network, programs, count):
    """KiB of both proxies: before, with `count` idle connections, and a minute after they closed."""
    result = {}
    for program, (outbound, inbound, processes) in programs.items():
        if not processes:
            continue
        network.rules(outbound, inbound)
        result[program] = measured(run, processes, {network.client: count})
        report.progress(f"{count} idle connections  {program}")
    network.rules()
    return result


def in_one_process(run, mesh, congestion, count):
    """The same of one process for each side.

    A table of descriptors may be too small for `count`, so that each process has several proxies with a table each, and each pair
    of proxies a pair of namespaces with a server and a load of its own.
    """
    # The rest is for tunnels, one for a hundred connections, and for nginx's and the load's own.
    each = min(17_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 17 // 20)
    pairs = -(-count // each)
    networks = [Network(congestion, f"client-{n}", f"server-{n}") for n in range(pairs)]
    apps = []
    for network in networks:
        network.rules(15001, 15006)
        folder = run / network.server
        folder.mkdir()
        apps.append(start_nginx(folder, network.server))
    clients = start_proxies(run, "client", mesh, [network.client for network in networks])
    servers = start_proxies(run, "server", mesh, [network.server for network in networks])
    shares = {network.client: count // pairs + (n < count % pairs) for n, network in enumerate(networks)}

    def still_there():
        captured = sum(established(network.client, "sport = :15001") for network in networks)
        delivered = sum(established(network.server, f"dport = :{APP}") for network in networks)
        if (captured, delivered) != (count, count):
            raise SystemExit(f"bench: {captured} and {delivered} connections instead of {count}")

    result = measured(run, [clients, servers], shares, still_there)
    for process in [clients, servers, *apps]:
        process.stop()
    for network in networks:
        network.remove()
    return {f"zspire, proxies in each process: {pairs}": result}


def start_proxies(run, side, mesh, namespaces):
    """One process with a proxy in each of the namespaces."""
    log = run / f"many-{side}.log"
    files = [f"/run/netns/{name}" for name in namespaces]
    process = Process(None, [MANY, *files], zspire_env(run, side, mesh), log)
    for name in namespaces:
        wait_for(f"zspire in {name}", lambda: get(name, 15021, "/healthz/ready") is not None, log=log)
    return process


def established(namespace, which):
    return len(sh(*inside(namespace, "ss", "-Htn", "state", "established", which)).splitlines())


def measured(run, processes, shares, check=lambda: None):
    """KiB of the processes around idle connections: how many from each namespace; `check` is called while they are there."""
    count = sum(shares.values())
    base = [p.memory()[0] for p in processes]
    logs = {namespace: run / f"hold-{namespace}.log" for namespace in shares}
    holders = [
        Process(namespace, [sys.executable, HOLD, SERVER, APP, share], log=logs[namespace])
        for namespace, share in shares.items()
    ]
    for namespace, log in logs.items():
        wait_for(f"idle connections from {namespace}", lambda: "holding" in log.read_text(), 300, log)
    time.sleep(2)
    held = [p.memory()[0] for p in processes]
    check()
    for holder in holders:
        holder.stop()
    closed, end = held, time.monotonic() + 60
    while time.monotonic() < end and sum(closed) > sum(base) * 1.3:
        time.sleep(2)
        closed = [p.memory()[0] for p in processes]
    return {
        "connections": count, "start": base, "held": held, "closed": closed,
        "per_connection": [(h - b) / count for h, b in zip(held, base)],
    }
