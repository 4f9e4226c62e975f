"""`python -m fcn`."""

import sys

from fcn.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
