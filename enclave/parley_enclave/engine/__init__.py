"""The engine: admission of sealed tables, the streaming scan, the rules. It does no I/O but through a callable."""

from parley_enclave.engine.checks import admit
from parley_enclave.engine.frames import Admitted, FrameError, Progress, Pull, Source
from parley_enclave.engine.planning import Plan, plan
from parley_enclave.engine.tasks import finish, scan

__all__ = ["Admitted", "FrameError", "Plan", "Progress", "Pull", "Source", "admit", "finish", "plan", "scan"]
