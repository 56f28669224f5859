"""The reports of all ranks on one case, as one."""

import re
import signal

from _pytest._code.code import ReprFileLocation
from _pytest._code.code import TerminalRepr
from _pytest.reports import TestReport

from integration_tests.harness.process_set import GRACE_SECONDS
from integration_tests.harness.process_set import State

PHASES = ("setup", "call", "teardown")

# A frame of a stack: file, line, function.
INNERMOST = re.compile(r'File ".*?([^/\\]+)", line (\d+) in (\w+)')


class RankFailures(TerminalRepr):
    """What pytest shows of a failed case: a titled part for each cause.

    Args:
        item: the pytest item.
        message: string, the line of the short summary.
        parts: list of tuples of a title and a text or a rank's own
            representation of its failure.
    """

    def __init__(self, item, message, parts):
        self.parts = parts
        # pytest reads its short summary there.
        path, line, _ = item.location
        self.reprcrash = ReprFileLocation(path, line + 1, message)

    def toterminal(self, tw):
        for title, body in self.parts:
            tw.sep("- ", title)
            if isinstance(body, str):
                if body:
                    tw.line(body)
            else:
                body.toterminal(tw)


def merge(item, processes, duration):
    """One report for each phase of a case, from those of all ranks.

    Args:
        item: the pytest item.
        processes: the `ProcessSet` that ran it, or did not start.
        duration: float, the seconds that took.
    """
    ranks = processes.ranks
    sections = sections_of(ranks)
    moment = "" if processes.started else " at its start"
    message, parts = failures_of(ranks, processes.limit, moment)
    if parts:
        phases = [
            report.when
            for rank in ranks
            for report in rank.reports
            if report.failed
        ]
        default = "call" if processes.started else "setup"
        phase = min(phases, key=PHASES.index, default=default)
        longrepr = RankFailures(item, message, parts)
        return failed(item, phase, longrepr, sections, duration)
    merged = [
        merge_phase([r for rank in ranks for r in rank.reports if r.when == p])
        for p in PHASES
    ]
    merged = [report for report in merged if report is not None]
    merged[-1].sections = sections
    return merged


def merge_phase(reports):
    """The report that speaks for all, where none failed."""
    if not reports:
        return None

    def weight(report):
        # One rank's expected failure is the case's; a rank that skips is
        # nothing to mention where another ran.
        expected = report.skipped and hasattr(report, "wasxfail")
        return (expected, report.passed)

    report = max(reports, key=weight)
    report.duration = max(each.duration for each in reports)
    report.user_properties = [p for r in reports for p in r.user_properties]
    return report


def failed(item, phase, longrepr, sections=(), duration=0.0):
    """The reports of a case that failed in `phase`."""
    outcomes = {"setup": "passed", phase: "failed", "teardown": "passed"}
    if phase == "teardown":
        outcomes = {"setup": "passed", "call": "passed", phase: "failed"}
    return [
        TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome=outcome,
            longrepr=longrepr if outcome == "failed" else None,
            when=when,
            sections=sections if outcome == "failed" else (),
            duration=duration if outcome == "failed" else 0.0,
        )
        for when, outcome in outcomes.items()
    ]


def failures_of(ranks, limit, moment):
    """A summary line and titled parts, causes first; none where all is well."""
    messages = []
    parts = []
    reports = {}
    for rank in ranks:
        for report in rank.reports:
            if report.failed:
                key = (report.when, report.longreprtext)
                reports.setdefault(key, (report, []))[1].append(rank)
    for (when, _), (report, failing) in reports.items():
        parts.append((f"{name(failing)} failed in {when}", report.longrepr))
        messages.append(f"{name(failing)}: {crash_of(report)}")

    for rank in ranks:
        if rank.state is State.DIED:
            title = f"{name([rank])} died{moment}: {cause_of_death(rank)}"
            stack = stack_of_death(rank.output().get("stderr", ""))
            parts.append((title, stack))
            place = INNERMOST.search(stack)
            title += " at {}:{} in {}".format(*place.groups()) if place else ""
            messages.append(title)

    errors = [rank for rank in ranks if rank.step_error is not None]
    if errors:
        parts.append((f"{name(errors)}: out of step", errors[0].step_error))
        messages.append(f"{name(errors)} out of step")

    waiting = [rank for rank in ranks if rank.state is State.WAITING]
    if waiting:
        after = (
            f"{GRACE_SECONDS} s after the failure"
            if parts
            else f"at the limit of {limit} s"
        )
        verb = "was" if len(waiting) == 1 else "were"
        title = f"{name(waiting)} {verb} still waiting {after}"
        done = [rank for rank in ranks if rank.state is State.DONE]
        done = [rank for rank in done if not rank.failed]
        if done:
            title += f", {name(done)} done"
        messages.append(title)
        parts.append((title, ""))
        for rank in waiting:
            parts.append((f"stack of {name([rank])}", trim(rank.stack)))
    return "; ".join(messages), parts


def sections_of(ranks):
    """What each rank wrote and logged."""
    sections = []
    for rank in ranks:
        for stream, text in rank.output().items():
            if text.strip():
                sections.append((f"Captured {stream} {name([rank])}", text))
        for report in rank.reports[-1:]:
            sections += [
                (f"{title} {name([rank])}", text)
                for title, text in report.sections
            ]
    return sections


def name(ranks):
    numbers = ", ".join(str(rank.rank) for rank in ranks)
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"


def crash_of(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext if crash is None else crash.message
    return text.strip().partition("\n")[0]


def cause_of_death(rank):
    code = rank.process.wait()
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def stack_of_death(stderr):
    """What Python has said of the thread that a signal ended, "" if nothing."""
    _, _, stacks = stderr.rpartition("Fatal Python error: ")
    crashed = re.search(r"Current thread .*?(?=\n\n|\Z)", stacks, re.DOTALL)
    return trim(crashed.group()) if crashed else ""


def trim(stacks):
    """The stacks of a process, down to where pytest called the test."""
    threads = []
    for stack in stacks.strip().split("\n\n"):
        head, *frames = stack.split("\n")
        if any(" in end_with" in frame for frame in frames):
            continue
        below = [
            index
            for index, frame in enumerate(frames)
            if re.search(r"[/\\](_pytest|pluggy)[/\\]", frame)
        ]
        if below and below[0] > 0:
            frames = frames[: below[0]]
        threads.append("\n".join([head, *frames]))
    return "\n\n".join(threads)
