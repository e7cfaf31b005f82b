"""tests/gpu: everything that the CPU tests hold for one process, on the GPU in float32 and bfloat16."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as Xml

from common import SCRIPTS, parser_of, write_result


def main() -> None:
    args = parser_of(__doc__).parse_args()
    report = args.json.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["tests/gpu", "-m", "not gpu" if args.toy else "gpu"]
    code = subprocess.run(command, cwd=SCRIPTS.parent).returncode
    if not report.is_file():
        raise SystemExit(f"pytest ended with {code} and no report")
    suite = Xml.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = list(suite.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    write_result(
        args.json,
        {
            "ok": code == 0 and passed > 0,
            "passed": passed,
            "failed": {f"{case.get('classname')}::{case.get('name')}": message_of(case) for case in failed},
            "skipped": {f"{case.get('name')}": message_of(case) for case in skipped},
            "headlines": [f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"]
            + [f"failed: {case.get('name')}" for case in failed],
        },
    )


def message_of(case: Xml.Element) -> str:
    """The last lines of what went wrong, or the reason of a skip."""
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            return f"{found.get('message', '')[:500]}\n{(found.text or '')[-1500:]}".strip()
    return ""


if __name__ == "__main__":
    main()
