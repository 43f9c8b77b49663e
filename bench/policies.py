"""What policies cost: CPU of new connections with few of them and with many, each of which is asked."""

import statistics

import report
from lab import CLIENT, SERVER


def mesh(path, count):
    """`count` policies that deny somebody else, and one that allows the client."""
    lines = ["workloads:"]
    for name, address in (("client", CLIENT), ("server", SERVER)):
        lines.append(f'- {{uid: bench/{name}, name: {name}, namespace: default, serviceAccount: {name}, '
                     f'workloadIps: ["{address}"], protocol: HBONE, trustDomain: cluster.local, node: {name}, network: ""}}')
    lines.append("policies:")
    for n in range(count):
        lines.append(f"- {{action: Deny, name: deny-{n}, namespace: default, scope: Namespace, dryRun: false, "
                     f"rules: [[[{{principals: [!Exact cluster.local/ns/default/sa/stranger-{n}]}}]]]}}")
    lines.append("- {action: Allow, name: allow-client, namespace: default, scope: Namespace, dryRun: false, "
                 "rules: [[[{principals: [!Exact cluster.local/ns/default/sa/client]}]]]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def many(run, network, start, connections, rounds, seconds, counts=(1, 1_000, 10_000)):
    """CPU-s/100k of both proxies by the number of policies: the medians of rounds in which the numbers take turns."""
    figures = {}
    for number in range(rounds):
        for count in counts:
            file = mesh(run / "policies.yaml", count)
            proxies = [start(run, side, file) for side in ("client", "server")]
            network.rules(15001, 15006)
            before = [proxy.cpu() for proxy in proxies]
            units = connections(seconds)["units"]
            figures.setdefault(count, []).append(sum(p.cpu() - b for p, b in zip(proxies, before)) / units)
            for proxy in proxies:
                proxy.stop()
            network.rules()
            report.progress(f"round {number + 1}/{rounds}  {count} policies")
    return {f"{count:,}": statistics.median(taken) for count, taken in figures.items()}
