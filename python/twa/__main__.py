"""`python -m twa`."""

import sys

from .cli.main import main

sys.exit(main())
