"""Times Keras's distributed training beside hand-written torch.

    python benchmarks/run.py mlp
    python benchmarks/run.py gpt --rounds 10 --steps 10 --json gpt.json
    python benchmarks/run.py all --only 1,2,2l,9,9a,9b

In every round each variant runs a few steps, one variant after another, in
the same two gloo processes of one thread each. So all variants meet the same
disturbances, and a ratio compares two samples of one round.

A variant that fails is reported as FAILED and the others go on.
"""

import argparse
import json
import sys

import catalog
import report
import session
from processes import ProcessError
from processes import launch

DEFAULT = ("mlp", "gpt")
SMALL = ("tiny_mlp", "tiny_gpt")


def main():
    options = parse_arguments()
    names = DEFAULT if options.workload == "all" else (options.workload,)
    output = {
        "environment": report.environment(options.processes),
        "results": [],
    }
    report.print_environment(output["environment"])
    for name in names:
        result = measure(name, options)
        report.print_result(result)
        output["results"].append(result)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(output, file, indent=1)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workload", nargs="?", default="all", choices=(*DEFAULT, "all", *SMALL)
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help="keys of variants, separated by commas; 1 is always run",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=180,
        help="seconds of silence after which a variant counts as stuck",
    )
    parser.add_argument(
        "--trace", action="store_true", help="print tracebacks of failures"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    return parser.parse_args()


def measure(workload, options):
    """Measures the variants of one workload.

    A variant during which the processes die, disagree or fall silent is left
    out, and the rest begins anew in fresh processes.

    Returns:
        Dict: `workload`, `rounds`, `steps`; `seconds`, for each key the
        seconds a step of each round; `facts`, for each key what
        `session.examine` returns; `failed`, for each key error and traceback.
    """
    known = [entry.key for entry in catalog.entries(workload)]
    if options.only:
        known = [k for k in known if k in (catalog.BASE, *options.only)]
    failed = {}
    while True:
        keys = [key for key in known if key not in failed]
        watcher = Watcher(options)
        arguments = (workload, keys, options.rounds, options.steps)
        try:
            for message in launch(
                session.worker, arguments, options.processes, options.patience
            ):
                watcher.handle(*message)
            break
        except ProcessError as e:
            if watcher.key is None:
                raise
            error, trace = watcher.troubles.get(watcher.key, (str(e), ""))
            watcher.failed(watcher.key, error, trace)
            failed |= watcher.failures
    return {
        "workload": workload,
        "rounds": options.rounds,
        "steps": options.steps,
        "seconds": watcher.seconds,
        "facts": watcher.facts,
        "failed": failed | watcher.failures,
    }


class Watcher:
    """Keeps what the processes report, and shows progress."""

    def __init__(self, options):
        self.options = options
        self.key = None
        self.facts = {}
        self.troubles = {}
        self.failures = {}
        self.seconds = {}

    def handle(self, kind, *values):
        if kind == "start":
            (self.key,) = values
        elif kind == "facts":
            key, facts = values
            self.facts[key] = facts
            self.say(f"{key} ready")
        elif kind == "trouble":
            key, error, trace = values
            self.troubles[key] = (error, trace)
        elif kind == "failed":
            self.failed(*values)
        elif kind == "round":
            self.say(f"round {values[0]} of {self.options.rounds}")
        elif kind == "seconds":
            (self.seconds,) = values

    def failed(self, key, error, trace):
        self.failures[key] = {"error": error, "trace": trace}
        self.say(f"{key} FAILED {error}")
        if self.options.trace and trace:
            self.say(trace)

    def say(self, text):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
