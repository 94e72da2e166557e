"""`python -m twa`."""

import sys

from .cli import main

sys.exit(main())
