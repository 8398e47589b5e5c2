"""`python -m okavango` is the command line."""

import sys

from okavango.cli import main

sys.exit(main())
