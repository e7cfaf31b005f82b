"""python -m vdr_cli is vdr; also the target of `deepspeed --module vdr_cli`, where the arguments may come encoded."""

import sys

from vdr_cli.cli.app import main
from vdr_cli.launch.arguments import decode

if __name__ == "__main__":
    sys.argv[1:] = decode(sys.argv[1:])
    main()
