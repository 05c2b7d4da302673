"""``python -m sfpk_kernels.cli``."""

import sys

from . import main

sys.exit(main())
