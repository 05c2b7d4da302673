"""``python -m benchmarks``: waiting OpenMP threads sleep soon, unless the user has said how they wait."""

import os
import sys

from sfpk_command import spin_shortly

if __name__ == "__main__":
    spin_shortly(os.environ)  # before torch is loaded
    from benchmarks.command import main

    sys.exit(main())
