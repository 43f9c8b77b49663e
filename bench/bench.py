"""make bench: speed and memory of zspire beside Envoy and a direct connection.

Two namespaces, `client` and `server`, joined by a veth pair. For each kind of work the programs compared
take turns (direct, zspire, envoy, direct, …) within one run and the medians of the rounds are printed:
these machines are noisy, so only ratios within a run mean anything. CPU is user+system time of both
proxies from /proc; it is the figure to trust.

    --rounds N    rounds of each measurement (3)
    --seconds N   length of each sample (3)
    --only A,B    of: traffic, inpod, frames, plain, fairness, policies, services, push, memory, held, start, workloads, ca,
                  spire
    --idle N      idle connections of memory, beside Envoy (10,000)
    --held N      idle connections of held, in one process for each side (100,000)
    --work TEXT   only the kinds of work of traffic, inpod, frames and plain that have this in their name
    --congestion NAME  congestion control of every connection (the default of this machine)
    --profile     nothing of that, but where the time goes in each kind of work
    --json FILE   the figures as JSON as well
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import envoy
import fairness
import idle
import policies
import profiling
import report
from lab import (
    APP, BULK, CLIENT, ROOT, SERVER, ZSPIRE, Network, Process, get, inside, listening, mesh_file, own_names, sh, start_nginx,
    start_zspire, wait_for, zspire_env,
)


def start_apps(run):
    nginx = start_nginx(run)
    iperf = Process("server", ["iperf3", "-s", "-B", SERVER, "-p", BULK])
    wait_for("iperf3", lambda: listening("server", BULK))
    return [nginx, iperf]


def bulk(streams, seconds, reverse=False):
    """GB moved in one direction."""
    command = ["iperf3", "-c", SERVER, "-p", BULK, "-t", seconds, "-P", streams, "-J"] + (["-R"] if reverse else [])
    # Its server sometimes has not finished with the test before, whichever program is between: said, and tried again.
    for attempt in range(3):
        done = subprocess.run(inside("client", *command), capture_output=True, text=True, timeout=seconds + 30)
        out = json.loads(done.stdout)
        if "error" not in out:
            break
        print(f"\nbench: iperf3: {out['error']}", file=sys.stderr)
    else:
        raise SystemExit("bench: iperf3 failed three times")
    return {"units": out["end"]["sum_received"]["bytes"] / 1e9}


def requests(connections, seconds, close=False, path="/"):
    """Requests (in 100,000), p50 and p99 in microseconds."""
    command = ["wrk", "-t", 1, "-c", connections, "-d", f"{seconds}s", "--latency"]
    command += ["-H", "Connection: close"] if close else []
    out = sh(*inside("client", *command, f"http://{SERVER}:{APP}{path}"), timeout=seconds + 30)
    micro = {"us": 1, "ms": 1e3, "s": 1e6}

    def percentile(p):
        number, unit = re.search(rf"^\s+{p}%\s+([\d.]+)(us|ms|s)$", out, re.M).groups()
        return float(number) * micro[unit]

    count = int(re.search(r"(\d+) requests in", out)[1])
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)|Socket errors: connect (\d+)", out)
    if bad and any(int(n) for n in bad.groups() if n):
        raise SystemExit(f"bench: wrk met errors:\n{out}")
    return {"units": count / 1e5, "p50": percentile(50), "p99": percentile(99)}


WORK = [
    ("bulk, 1 stream", "CPU-s/GB", lambda s: bulk(1, s)),
    ("bulk, 8 streams", "CPU-s/GB", lambda s: bulk(8, s)),
    ("bulk, reverse", "CPU-s/GB", lambda s: bulk(1, s, reverse=True)),
    ("keep-alive, 1 connection", "CPU-s/100k", lambda s: requests(1, s)),
    ("keep-alive, 64 connections", "CPU-s/100k", lambda s: requests(64, s)),
    ("16 KiB bodies, 16 connections", "CPU-s/100k", lambda s: requests(16, s, path="/16k")),
    ("new connections, 16 in flight", "CPU-s/100k", lambda s: requests(16, s, close=True)),
]


def traffic(network, programs, rounds, seconds, work=WORK):
    """CPU per unit, p50 and p99 of each kind of work, the programs taking turns.

    A program is what captures its traffic (ports for the rules, or a pair of calls to begin and to end) and its processes.
    """
    samples = {}
    for number in range(rounds):
        for name, _unit, work_of in work:
            for program, (outbound, inbound, processes) in programs.items():
                captured = callable(outbound)
                outbound() if captured else network.rules(outbound, inbound)
                before = [p.cpu() for p in processes]
                started = time.monotonic()
                sample = work_of(seconds)
                sample["rate"] = sample["units"] / (time.monotonic() - started)
                sample["cpu"] = sum(p.cpu() - b for p, b in zip(processes, before)) / sample["units"]
                samples.setdefault(name, {}).setdefault(program, []).append(sample)
                report.progress(f"round {number + 1}/{rounds}  {name:32} {program}")
                if captured:
                    inbound()
    network.rules()
    return {
        name: {
            program: {key: statistics.median(s[key] for s in taken) for key in taken[0]}
            for program, taken in by_program.items()
        }
        for name, by_program in samples.items()
    }


class InPod:
    """One proxy for both pods, which are enrolled as on a plain machine."""

    def __init__(self, run, mesh):
        self.agent_socket = run / "agent.sock"
        env = {
            "INPOD_UDS": str(run / "zds.sock"), "ZSPIRE_AGENT_SOCKET": str(self.agent_socket),
            "ZSPIRE_AGENT_STATE_DIR": str(run / "agent"),
        }
        self.agent = Process(None, [ZSPIRE, "node-agent"], env, run / "agent.log")
        wait_for("the node agent", self.agent_socket.exists, log=run / "agent.log")
        proxy = {**zspire_env(run, "node", mesh), **env, "PROXY_MODE": "shared"}
        del proxy["PROXY_WORKLOAD_INFO"]
        self.proxy = Process(None, [ZSPIRE, "proxy"], proxy, run / "inpod.log")
        self.processes = [self.proxy]

    def zspire(self, *arguments):
        sh(str(ZSPIRE), *arguments, "--agent", str(self.agent_socket), timeout=30)

    def begin(self):
        for pod in ("client", "server"):
            self.zspire("enroll", "--netns", f"/run/netns/{pod}", "--name", pod, "--namespace", "default",
                        "--service-account", pod)

    def end(self):
        for pod in ("client", "server"):
            self.zspire("unenroll", f"default/{pod}")

    def stop(self):
        self.proxy.stop()
        self.agent.stop()


def many_services(run, network, rounds, seconds, services=1000, endpoints=100):
    """CPU of new connections to a service: one of one endpoint, and one of many with many endpoints each."""
    vip = "10.97.0.1"
    sh(*inside("client", "ip", "route", "add", "10.97.0.0/16", "dev", "veth0"))
    sh(*inside("client", "ip", "route", "add", "10.98.0.0/16", "dev", "veth0"))
    for n in range(endpoints):
        sh(*inside("server", "ip", "addr", "add", f"10.98.0.{n + 1}/32", "dev", "veth0"))

    def mesh(path, services, endpoints):
        lines = ["workloads:"]
        lines.append(f'- {{uid: bench/client, name: client, namespace: default, serviceAccount: client, '
                     f'workloadIps: ["{CLIENT}"], protocol: HBONE, node: client, network: ""}}')
        for s in range(services):
            for e in range(endpoints):
                ip = f"10.98.0.{e + 1}" if s == 0 else f"10.{100 + s // 250}.{s % 250}.{e + 1}"
                lines.append(f'- {{uid: w-{s}-{e}, name: w-{s}-{e}, namespace: default, serviceAccount: w, '
                             f'workloadIps: ["{ip}"], protocol: TCP, node: n, network: "", '
                             f'services: {{"default/s{s}.default": {{80: {APP}}}}}}}')
        lines.append("services:")
        for s in range(services):
            lines.append(f'- {{name: s{s}, namespace: default, hostname: s{s}.default, '
                         f'vips: ["/10.97.{s // 250}.{s % 250 + 1}"], ports: {{80: {APP}}}}}')
        path.write_text("\n".join(lines) + "\n")
        return path

    def connections(seconds):
        command = ["wrk", "-t", 1, "-c", 16, "-d", f"{seconds}s", "-H", "Connection: close", f"http://{vip}:80/"]
        out = sh(*inside("client", *command), timeout=seconds + 30)
        return int(re.search(r"(\d+) requests in", out)[1]) / 1e5

    figures = {}
    for _ in range(rounds):
        for name, (s, e) in (("1 x 1", (1, 1)), (f"{services:,} x {endpoints}", (services, endpoints))):
            proxy = start_zspire(run, "client", mesh(run / "services.yaml", s, e))
            network.rules(15001, None)
            before = proxy.cpu()
            units = connections(seconds)
            figures.setdefault(name, []).append((proxy.cpu() - before) / units)
            proxy.stop()
            network.rules()
            report.progress(f"services {name}")
    return {name: statistics.median(taken) for name, taken in figures.items()}


def push(run, network, mesh, count=100_000):
    """The longest request, in milliseconds, in a quiet while and while `count` workloads arrive."""
    network.rules(15001, 15006)
    small, large = mesh.read_text(), run / "pushed.yaml"
    with large.open("w") as out:
        out.write(small.split("policies:")[0])
        for i in range(count):
            ip = f"10.{100 + i // 65536}.{i // 256 % 256}.{i % 256}"
            out.write(f'- {{uid: p-{i}, name: p-{i}, namespace: ns-{i % 500}, serviceAccount: sa, workloadIps: ["{ip}"], '
                      f'protocol: HBONE, trustDomain: cluster.local, node: n-{i % 1000}, network: ""}}\n')
        out.write("policies:" + small.split("policies:")[1])
    log = run / "probe.log"
    probe = Process("client", [sys.executable, Path(__file__).parent / "probe.py", SERVER, APP], log=log)
    time.sleep(6)
    marker = len(log.read_text().splitlines())
    os.replace(large, mesh)
    # Longer than it takes to be noticed and read; whether it was is looked at afterwards, since a dump costs time itself.
    time.sleep(8)
    probe.stop()
    network.rules()
    known = len(json.loads(get("client", 15000, "/config_dump"))["workloads"])
    if known != count + 2:
        raise SystemExit(f"bench: {known} workloads instead of {count + 2}")
    lines = [float(line) for line in log.read_text().splitlines()]
    return {"quiet": max(lines[10:marker]), "pushed": max(lines[marker:])}


def start_to_ready(run, mesh, times=5):
    """Milliseconds from exec to the first 200 of the readiness port."""
    taken = []
    for _ in range(times):
        started = time.monotonic()
        process = Process("server", [ZSPIRE, "proxy"], zspire_env(run, "server", mesh), run / "start.log")
        ready = report.first_200(process.pid, "127.0.0.1", 15021, "/healthz/ready", started)
        taken.append(ready * 1e3)
        process.stop()
    return {"median": statistics.median(taken), "all": [round(t, 1) for t in taken]}


def many_workloads(run, count=100_000):
    """A file of `count` workloads: seconds to ready, resident and peak MiB."""
    path = run / "many.yaml"
    with path.open("w") as out:
        out.write("workloads:\n")
        for i in range(count):
            ip = f"10.{100 + i // 65536}.{i // 256 % 256}.{i % 256}"
            out.write(f"""- uid: cluster1//v1/Pod/ns-{i % 500}/pod-{i}
  name: pod-{i}
  namespace: ns-{i % 500}
  serviceAccount: sa-{i % 50}
  workloadIps: ["{ip}"]
  protocol: HBONE
  trustDomain: cluster.local
  node: node-{i % 1000}
  network: ""
  canonicalName: app-{i % 500}
  canonicalRevision: v1
  workloadName: app-{i % 500}
  workloadType: deployment
  clusterId: Kubernetes
""")
        out.write(f'- {{uid: bench/server, name: server, namespace: default, serviceAccount: server, '
                  f'workloadIps: ["{SERVER}"], protocol: HBONE, node: server, network: ""}}\n')
    started = time.monotonic()
    process = Process("server", [ZSPIRE, "proxy"], zspire_env(run, "server", path), run / "many.log")
    ready = report.first_200(process.pid, "127.0.0.1", 15021, "/healthz/ready", started)
    cpu = process.cpu()
    known = len(json.loads(get("server", 15000, "/config_dump"))["workloads"])
    if known != count + 1:
        raise SystemExit(f"bench: {known} workloads instead of {count + 1}")
    rss, peak = process.memory()
    process.stop()
    # The dump itself costs memory: take the peak of a second run without it.
    process = Process("server", [ZSPIRE, "proxy"], zspire_env(run, "server", path), run / "many.log")
    report.first_200(process.pid, "127.0.0.1", 15021, "/healthz/ready", time.monotonic())
    rss, peak = process.memory()
    process.stop()
    return {"seconds": ready, "cpu": cpu, "rss_mib": rss / 1024, "peak_mib": peak / 1024}


def certificates(run, seconds):
    """CreateCertificate calls a second and per CPU second of the control plane, 16 in flight."""
    tool = ROOT / "target/release/ca-load"
    out = sh(str(tool), "--seconds", str(seconds), "--in-flight", "16", "--zspire", str(ZSPIRE),
             "--dir", str(run / "ca"), timeout=seconds + 60)
    return json.loads(out)


def subscriptions():
    """10,000 subscriptions to a fake SPIRE agent: latency of the first SVID, memory, rest, and an agent's restart."""
    out = sh(str(ROOT / "target/release/spire-load"), "--subscriptions", "10000", timeout=300)
    return json.loads(out)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=int, default=3)
    everything = "traffic,inpod,frames,plain,fairness,policies,services,push,memory,held,start,workloads,ca,spire"
    options.add_argument("--only", default=everything)
    options.add_argument("--congestion")
    options.add_argument("--profile", action="store_true")
    options.add_argument("--work", default="")
    options.add_argument("--idle", type=int, default=10_000, help="idle connections of memory")
    options.add_argument("--held", type=int, default=100_000, help="idle connections of held")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    only = {"profile"} if args.profile else set(args.only.split(","))
    work = [kind for kind in WORK if args.work in kind[0]]
    if not work:
        raise SystemExit(f"bench: no kind of work has {args.work!r} in its name: {', '.join(kind[0] for kind in WORK)}")

    for program in ("nft", "nginx", "iperf3", "wrk", "curl", "openssl", "ip"):
        if not shutil.which(program):
            raise SystemExit(f"bench: {program} is missing: run it by make bench, which installs it")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    run = Path(tempfile.mkdtemp(prefix="zspire-bench-"))
    sh("ip", "link", "set", "lo", "up")
    processes, figures = [], {}
    try:
        own_names()
        network = Network(args.congestion)
        mesh = mesh_file(run / "mesh.yaml")
        if "start" in only:
            figures["start"] = start_to_ready(run, mesh)
        if "workloads" in only:
            figures["workloads"] = many_workloads(run)
        if "ca" in only:
            figures["ca"] = certificates(run, args.seconds)
        if "spire" in only:
            figures["spire"] = subscriptions()
        if "held" in only:
            figures["held"] = idle.in_one_process(run, mesh, args.congestion, args.held)
        if only & {"services", "policies"}:
            apps = start_apps(run)
            if "services" in only:
                figures["services"] = many_services(run, network, args.rounds, args.seconds)
            if "policies" in only:
                figures["policies"] = policies.many(
                    run, network, start_zspire, lambda s: requests(16, s, close=True), args.rounds, args.seconds)
            for process in apps:
                process.stop()
            shutil.rmtree(run / "nginx")
        if only & {"traffic", "memory", "inpod", "push", "frames", "plain", "fairness", "profile"}:
            processes += start_apps(run)
            zspire = [start_zspire(run, side, mesh) for side in ("client", "server")]
            processes += zspire
            envoys = envoy.start(run, Process, wait_for, get, CLIENT, SERVER, APP, BULK)
            processes += envoys
            programs = {"direct": (None, None, []), "zspire": (15001, 15006, zspire), "envoy": (16001, envoy.PLAIN, envoys)}
            if "profile" in only:
                network.rules(15001, 15006)
                for name, _, work_of in work:
                    profiling.show(name, profiling.record(run, [p.pid for p in zspire], work_of, args.seconds))
                network.rules()
                return
            if "memory" in only:
                figures["memory"] = idle.beside_envoy(run, network, programs, args.idle)
            if "traffic" in only:
                figures["traffic"] = traffic(network, programs, args.rounds, args.seconds, work)
            if "fairness" in only:
                figures["fairness"] = fairness.beside_bulk(run, network, programs, 2 * args.seconds)
            if "push" in only:
                figures["push"] = push(run, network, mesh)
            if "frames" in only:
                # The server takes frames of 16 KiB, the least that HTTP/2 allows and what Envoy asks for.
                zspire[1].stop()
                limited = start_zspire(run, "server", mesh, HTTP2_FRAME_SIZE="16384")
                processes.append(limited)
                programs = {"zspire": (15001, 15006, [zspire[0], limited]), "envoy": (16001, envoy.PLAIN, envoys)}
                figures["frames"] = traffic(network, programs, args.rounds, args.seconds, work)
                limited.stop()
            if only & {"plain", "inpod"}:
                for process in zspire:
                    process.stop()
            if "plain" in only:
                # What the kernel's work costs without TLS and HTTP/2: the same proxies only copy.
                plain = mesh_file(run / "plain.yaml", protocol="TCP")
                copying = [start_zspire(run, side, plain) for side in ("client", "server")]
                processes += copying
                programs = {"zspire": (15001, 15006, copying), "envoy": (16001, envoy.PLAIN, envoys)}
                figures["plain"] = traffic(network, programs, args.rounds, args.seconds, work)
                for process in copying:
                    process.stop()
            if "inpod" in only:
                one = InPod(run, mesh_file(run / "inpod.yaml", nodes=("node", "node")))
                processes.append(one)
                programs = {"zspire": (one.begin, one.end, one.processes), "envoy": (16001, envoy.PLAIN, envoys)}
                figures["inpod"] = traffic(network, programs, args.rounds, args.seconds, work)
        report.show(figures, work)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))
    finally:
        for process in processes:
            process.stop()
        shutil.rmtree(run, ignore_errors=True)


if __name__ == "__main__":
    main()
