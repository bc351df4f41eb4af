"""The rate of this host's timestamp counter, which QEMU's TCG shows to its guests as their own.

A guest without ACPI measures its counter against the interval timer, which on a busy host comes too late: then it has no
counter at all, and no clock that an enclave accepts. A hypervisor of Amazon's says the rate; on QEMU's command line it is
`tsc_early_khz=`, outside what is measured. A wrong rate makes the guest's clock wrong, and nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from typing import Final

_RDTSC: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret"""
_TRIES: Final = 20


def khz(seconds: float = 0.2) -> int:
    """The counter's rate in kHz, measured; OSError where this process may not run code that it writes."""
    if platform.machine() != "x86_64":
        raise OSError(f"{platform.machine()} has no timestamp counter")
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as code:
        code.write(_RDTSC)
        place = ctypes.c_char.from_buffer(code)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))

        began, first = _both(read)
        time.sleep(seconds)
        ended, last = _both(read)
        # Nothing may point into the map when it is closed.
        del read, place
    return round((last - first) * 1_000_000 / (ended - began))


def _both(read: Callable[[], int]) -> tuple[int, int]:
    """Nanoseconds and the counter, of the try that was disturbed least."""
    tries = [(time.monotonic_ns(), read(), time.monotonic_ns()) for _ in range(_TRIES)]
    before, counter, after = min(tries, key=lambda found: found[2] - found[0])
    return (before + after) // 2, counter
