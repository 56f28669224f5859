"""Markdown tables of what was measured."""

import importlib.metadata
import os
import platform
import statistics

import catalog

TOLERANCE = 1e-4
MIB = 2**20


def environment(num_processes):
    """What the figures depend on, as a dict."""
    versions = {}
    for name in ("torch", "keras", "keras-torch-distribution"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        **versions,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "processes": num_processes,
        "threads a process": 1,
        "backend": "gloo",
        "load": round(os.getloadavg()[0], 2),
    }


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def print_head(*columns):
    """The first two lines of a table."""
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_environment(facts):
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


def print_result(result):
    """Prints one workload's tables.

    Args:
        result: dict of `run.measure`.
    """
    entries = catalog.entries(result["workload"])
    entries = [e for e in entries if e.key in result["seconds"]]
    print(
        f"\n## {result['workload']}: {result['rounds']} rounds of "
        f"{result['steps']} steps\n"
    )
    _print_times(entries, result["seconds"])
    print()
    _print_checks(entries, result["facts"])
    print()
    _print_costs(entries, result["facts"])
    if result["failed"]:
        print()
    for key, failure in result["failed"].items():
        print(f"FAILED {key}: {failure['error']}")


def _print_times(entries, seconds):
    base = seconds.get(catalog.BASE)
    peer = peer_key(seconds)
    titles = {e.key: e.title for e in entries}
    print(
        "Time of the slowest process; median (first and third quartile). "
        "Ratios are of the same round."
    )
    if peer:
        print(f"The peer is {peer}, {titles[peer]}.")
    print()
    print_head("", "variant", "ms a step", "to 1", "to the peer")
    for entry in entries:
        mine = seconds[entry.key]
        print_row(
            entry.key,
            entry.title,
            spread([1e3 * s for s in mine]),
            spread(ratios(mine, base)) if base else "",
            spread(ratios(mine, seconds[peer])) if peer else "",
        )


def _print_checks(entries, facts):
    base = facts.get(catalog.BASE)
    print(
        f"Losses of the first three steps and norm of the first gradient; "
        f"within {TOLERANCE:g} of 1, relative?\n"
    )
    print_head("", "variant", "losses", "gradient norm", "agrees")
    for entry in entries:
        mine = facts[entry.key]
        print_row(
            entry.key,
            entry.title,
            " ".join(f"{loss:.5f}" for loss in mine["losses"]),
            f"{mine['gradient_norm']:.5f}",
            ("yes" if agrees(mine, base) else "**NO**") if base else "",
        )


def _print_costs(entries, facts):
    print(
        "Process 0, a step: collectives, and MiB of what the process hands "
        "to them. `fit` adds some once a call. MiB stored after a step.\n"
    )
    print_head(
        "",
        "variant",
        "collectives",
        "MiB",
        "kinds",
        "once a call",
        "parameters",
        "gradients",
        "optimizer",
    )
    for entry in entries:
        mine = facts[entry.key]
        calls = mine["calls"]
        print_row(
            entry.key,
            entry.title,
            sum(calls.values()),
            f"{mine['bytes'] / MIB:.2f}",
            ", ".join(f"{n} {name}" for name, n in sorted(calls.items())),
            mine["run_calls"] or "",
            *(
                f"{mine[name] / MIB:.1f}"
                for name in ("parameters", "gradients", "optimizer")
            ),
        )


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def peer_key(seconds):
    """The faster of the catalog's peers, or None."""
    found = [key for key in catalog.PEERS if seconds.get(key)]
    return min(
        found, key=lambda key: statistics.median(seconds[key]), default=None
    )


def ratios(mine, others):
    return [m / o for m, o in zip(mine, others)]


def spread(values):
    """`median (first quartile-third quartile)`."""
    low = middle = high = values[0]
    if len(values) > 1:
        low, middle, high = statistics.quantiles(
            values, n=4, method="inclusive"
        )
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def agrees(mine, base):
    pairs = zip(
        [*mine["losses"], mine["gradient_norm"]],
        [*base["losses"], base["gradient_norm"]],
    )
    return all(abs(m - b) <= TOLERANCE * abs(b) for m, b in pairs)
