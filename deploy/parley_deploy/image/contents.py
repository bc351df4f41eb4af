"""What is in the image, by name: which packages are fetched, and which of their files stay.

What the system is made of is listed name by name, so that nothing comes along. Wheels are taken as they are, without what is
no code. There is no shell, no package manager, no TLS (`_ssl`), and no program but Python.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Final


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SUITE: Final = "trixie"
"""The Debian release that the image is made of."""
PYTHON: Final = "python3.13"
"""Its Python."""
COMPILER: Final = "x86_64-linux-gnu-gcc-14"
"""Its compiler: the one that built its kernel."""

RUNTIME: Final = (
    *(f"{PYTHON}-minimal", f"lib{PYTHON}-minimal", f"lib{PYTHON}-stdlib"),
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libzstd1", "libexpat1", "libffi8", "libssl3t64"),
)
"""Packages of which files are in the image, beside the kernel's."""
TOOLS: Final = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libzstd1", "libgmp10", "libmpfr6", "libmpc3", "libisl23"),
    *("gcc-14-base", "cpp-14-x86-64-linux-gnu", "gcc-14-x86-64-linux-gnu", "libgcc-14-dev"),
    *("binutils", "binutils-common", "binutils-x86-64-linux-gnu", "libbinutils", "libctf0", "libctf-nobfd0"),
    *("libjansson4", "libsframe1", "libelf1t64"),
    *("make", "dash", "coreutils", "sed", "grep", "mawk", "findutils"),
    *("libacl1", "libattr1", "libcap2", "libselinux1", "libpcre2-8-0", "libssl3t64"),
)
"""Packages that compile one module of the kernel; nothing of them is in the image."""
KERNEL_META: Final = "linux-image-amd64"
"""The package that depends on the newest kernel of the suite. The one for clouds sees no second CPU without ACPI: it lacks
X86_MPPARSE."""
KERNEL_SOURCE: Final = "linux-source-6.12"

MODULES: Final = (
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
    "drivers/misc/nsm",
)
"""Modules of the kernel's package, in the order in which they are loaded; `virtio_mmio`, which is rebuilt, comes last."""

_LIBRARIES: Final = (
    *("ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1"),
    *(
        "libgcc_s.so.1",
        "libstdc++.so.6*",
        "libz.so.1*",
        "libexpat.so.1*",
        "libffi.so.8*",
        "libcrypto.so.3",
        "libzstd.so.1*",
    ),
)
_EXTENSIONS: Final = _names("""
    _contextvars _ctypes _decimal _hashlib _interpchannels _interpqueues _interpreters _queue _zoneinfo mmap resource
""")
_LIBRARY: Final = _names("""
    __future__ _collections_abc _colorize _compat_pickle _compression _opcode_metadata _sitebuiltins _strptime
    _threading_local _weakrefset abc argparse ast base64 bisect calendar codecs collections concurrent contextlib
    contextvars copy copyreg csv ctypes dataclasses datetime decimal difflib dis email encodings enum fnmatch fractions
    functools genericpath gettext glob graphlib hashlib heapq hmac importlib inspect io ipaddress json keyword linecache
    locale logging ntpath numbers opcode operator os pathlib pickle pkgutil platform posixpath pprint queue quopri random
    re reprlib runpy secrets selectors shutil signal site socket stat string struct subprocess sysconfig tempfile textwrap
    threading token tokenize traceback types typing urllib uuid warnings weakref zipfile zipimport zoneinfo
""")
"""Modules and packages of the standard library: what the enclave and its libraries import, and what these import late."""
_NOT_OF_PACKAGES: Final = (
    "ctypes/macholib",
    "ctypes/wintypes",
    "urllib/request",
    "urllib/robotparser",
    "urllib/response",
)
_WHEEL_DROPS: Final = (
    # What is no code, and what is there to compile or to test.
    *(
        "*.pyi",
        "*.pxd",
        "*.pyx",
        "*.h",
        "*.c",
        "*.a",
        "*.f",
        "*.f90",
        "*.rst",
        "*.txt",
        "*/py.typed",
        "*.data/scripts/*",
    ),
    *("*/tests/*", "*/test/*", "*/conftest.py", "*/_test*", "*/_*_tests.*", "*/_examples/*", "*.data/headers/*"),
    *("*.dist-info/[!l]*", "*.dist-info/licenses/*/*"),
    # numpy imports these when somebody asks for them alone (but `ma`, which np.unique needs). cryptography needs the library of cffi alone.
    *(f"numpy/{part}/*" for part in ("f2py", "random", "testing", "_pyinstaller", "_core/lib")),
    *("numpy/_core/include/*", "cffi/*", "pycparser/*"),
)
APPLICATION: Final = ("parley_protocol", "parley_enclave")
_NOT_OF_ENCLAVES: Final = (
    *("parley_protocol/v1/coordinator_pb2*", "parley_protocol/agreement/lint.py", "parley_protocol/bundle.py"),
    *("parley_protocol/measurement.py", "parley_enclave/init.py"),
)
"""What clients and coordinators have of the protocol; `init`, which stands elsewhere in the image."""


def runtime_keeps(name: str) -> bool:
    """Whether a file of the packages RUNTIME, named relative to /, is in the image."""
    parts = name.split("/")
    match parts:
        case ["usr", "bin", program]:
            return program == PYTHON
        case ["usr", "lib64", "ld-linux-x86-64.so.2"]:
            return True
        case ["usr", "lib", "x86_64-linux-gnu", library]:
            return any(fnmatch(library, kept) for kept in _LIBRARIES)
        case ["usr", "lib", folder, "lib-dynload", extension] if folder == PYTHON:
            return extension.partition(".")[0] in _EXTENSIONS
        case ["usr", "lib", folder, *path] if folder == PYTHON and path[-1].endswith((".py", ".pyc")):
            # Byte code stands beside its source, in __pycache__.
            module = [part for part in path if part != "__pycache__"]
            module[-1] = module[-1].partition(".")[0]
            dropped = any("/".join(module).startswith(prefix) for prefix in _NOT_OF_PACKAGES)
            return module[0] in _LIBRARY and not dropped
    return False


def wheel_keeps(name: str) -> bool:
    """Whether a file of a wheel, named as in the wheel, is in the image."""
    return not any(fnmatch(name, dropped) for dropped in _WHEEL_DROPS)


def application_keeps(name: str) -> bool:
    """Whether a file of the packages APPLICATION, named from the package on, is in the image."""
    return name.endswith((".py", ".pem")) and not any(fnmatch(name, left) for left in _NOT_OF_ENCLAVES)
