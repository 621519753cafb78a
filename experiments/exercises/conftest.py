"""What `python -m pytest experiments/exercises` says at its end: which answers are right."""

import re


def pytest_terminal_summary(terminalreporter):
    def answers(outcome):
        """{function: report} of the answers with that outcome."""
        reports = terminalreporter.stats.get(outcome, [])
        names = [re.search(r"test_answer\[(\w+)\]", report.nodeid) for report in reports]
        return {name[1]: report for name, report in zip(names, reports, strict=True) if name}

    for outcome, word in (("passed", "right"), ("skipped", "not written yet")):
        if answers(outcome):
            terminalreporter.write_line(f"{word}: {', '.join(answers(outcome))}")
    for name, report in answers("failed").items():
        why = report.longrepr.reprcrash.message.splitlines()[0]
        terminalreporter.write_line(f"wrong: {name}: {why}")
