"""python -m vdr_cli is vdr; also the target of `deepspeed --module vdr_cli`."""

from vdr_cli.cli.app import main

if __name__ == "__main__":
    main()
