"""`python -m fastattn` is the command `fastattn`."""

from __future__ import annotations

import sys

from fastattn.cli import main

sys.exit(main())
