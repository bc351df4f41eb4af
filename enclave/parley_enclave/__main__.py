"""`python -m parley_enclave --listen unix:PATH|vsock:PORT --nsm unix:PATH|dev:PATH --workers N [--worker-uid UID]`

Runs an enclave until it is ended. All input comes through the channel. Standard error gets one line for each change of
phase, and never a value. With `--worker-uid` it is the process of an image: root, and looked into by nobody.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence


def log(line: str) -> None:
    """One coarse line on standard error."""
    sys.stderr.write(f"parley-enclave: {line}\n")
    sys.stderr.flush()


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    # The usual hook prints messages, which may hold a value.
    log(f"a thread failed: {failed.exc_type.__name__}")


def _end(_number: int, _frame: object) -> None:
    sys.exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an enclave; 2 for arguments that are wrong."""
    parser = argparse.ArgumentParser(prog="python -m parley_enclave", description="Run an enclave.")
    parser.add_argument("--listen", required=True, help="unix:PATH or vsock:PORT")
    parser.add_argument(
        "--nsm", required=True, help="dev:PATH of the kernel's device, or unix:PATH of the simulated module"
    )
    parser.add_argument("--workers", type=int, default=1, help="worker processes, one for each vCPU")
    parser.add_argument(
        "--worker-uid", type=int, help="run workers under this uid, and refuse a module that it could reach"
    )
    options = parser.parse_args(arguments)

    from parley_enclave import keys
    from parley_enclave.channel import Server, listen
    from parley_enclave.confine import undumpable
    from parley_enclave.device import open_device, require_private
    from parley_enclave.enclave import Enclave
    from parley_enclave.nsm import Nsm
    from parley_enclave.pool import Pool
    from parley_enclave.service import Service
    from parley_protocol.errors import UnavailableError

    threading.excepthook = _thread_failed
    # SIGTERM ends the workers too, in the `finally` below.
    signal.signal(signal.SIGTERM, _end)
    try:
        if options.worker_uid is not None:
            undumpable()
            require_private(options.nsm)
        nsm = Nsm(open_device(options.nsm))
        keys.seed_kernel(nsm.random)
        pool = Pool(options.workers, options.worker_uid)
    except ValueError as error:
        parser.error(str(error))
    except UnavailableError as error:
        log(error.message)
        return 1
    try:
        try:
            listener = listen(options.listen)
        except ValueError as error:
            parser.error(str(error))
        except OSError as error:
            log(f"cannot listen at {options.listen}: {error.strerror}")
            return 1
        with listener:
            log(f"listening, workers: {pool.size}")
            Server(listener, Service(Enclave(nsm, pool, log=log), pool, log=log).handle).run()
    except KeyboardInterrupt:
        return 0
    finally:
        pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
