"""`python -m geofast` is the `geofast` command."""

import sys

from .cli import main

sys.exit(main())
