"""Settings of every test."""

from __future__ import annotations

import os

# Threads of torch that wait by spinning starve the other half of a test on a small machine, by a
# factor of ten and more; this is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
