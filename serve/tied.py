"""Importing it ties this process to the one that started it: the fork server's first import.

A fork server ends when nobody can ask it for processes any more. The engine that it forked can, and
dies only with the fork server: without this, both would outlive a killed worker for ever.
"""

from __future__ import annotations

import os

from serve import lifeline

lifeline.die_with(os.getppid())
