"""A Nitro enclave image run in QEMU: its kernel and init, vsock and a module that signs under the local root.

`machine` is the command, `qemu` gets an emulator, `vhost`, `vsock` and `nsm` are the devices that QEMU has not: they run
in the process beside it and speak vhost-user.
"""
