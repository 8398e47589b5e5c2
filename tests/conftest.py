"""Tests run single-threaded, so that they give the same numbers on machines with other core counts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OKAVANGO_OFFLINE", "1")
