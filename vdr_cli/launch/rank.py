"""`python -m vdr_cli.launch.rank CODE`: vdr with arguments that no shell on the way could read.

DeepSpeed's runner joins a remote command with spaces and hands it to a shell on each host; a `--set`
value with brackets or quotes would arrive as something else. CODE is the argument list as URL-safe base64.
"""

from __future__ import annotations

import base64
import json
import sys


def encode(argv: list[str]) -> str:
    """Arguments to one word of letters, digits, dash, underscore and equals sign."""
    return base64.urlsafe_b64encode(json.dumps(argv).encode()).decode()


def decode(code: str) -> list[str]:
    """The arguments that encode() was given."""
    return list(json.loads(base64.urlsafe_b64decode(code)))


def main() -> None:
    """Run vdr as if the decoded arguments had been typed."""
    from vdr_cli.cli.app import main as vdr

    sys.argv = ["vdr", *decode(sys.argv[-1])]
    vdr()


if __name__ == "__main__":
    main()
