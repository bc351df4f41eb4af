"""A running coordinator: its parts put together, the gRPC server, and an end in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from parley_coordinator import log, telemetry, tls
from parley_coordinator import store as db
from parley_coordinator.agreements import Agreements
from parley_coordinator.blobs import BlobStore, Directory
from parley_coordinator.callers import Callers
from parley_coordinator.clock import now_ms
from parley_coordinator.config import Config, ConfigError
from parley_coordinator.events import Bell, Events
from parley_coordinator.guard import Guard
from parley_coordinator.inbox import Inbox
from parley_coordinator.keeper import Keeper
from parley_coordinator.kms import Kms
from parley_coordinator.kms_joins import KmsJoins
from parley_coordinator.launcher import Launcher, LocalLauncher
from parley_coordinator.leases import Leases
from parley_coordinator.live import World
from parley_coordinator.nitro import NitroLauncher
from parley_coordinator.node import Identity
from parley_coordinator.peers import Peers
from parley_coordinator.releases import Releases
from parley_coordinator.service import Parts, Service, abort
from parley_coordinator.sessions import Sessions
from parley_coordinator.store import Store
from parley_coordinator.uploads import Uploads
from parley_protocol import limits
from parley_protocol.v1 import coordinator_pb2
from parley_protocol.v1.coordinator_pb2_grpc import add_CoordinatorServicer_to_server

QUICK: Final = 8
"""Threads for what takes milliseconds: the store."""
DISK: Final = 16
"""Threads that write and read blobs, which may be far away."""
LONG: Final = 24
"""Threads that wait for an enclave which answers soon, or starts."""
JOINS: Final = 64
"""Joins that are judged at a time, over all enclaves; more wait. With LONG fewer than one enclave takes connections."""
WATCHING: Final = 2
"""Threads that read events: many who begin to watch at once wait for one another, and nobody else for them."""
STREAMS: Final = 256
"""Calls under way on one connection."""
WINDOW_BYTES: Final = 2 << 20
"""What a client may send of one stream before it is read: 20 MB/s where an answer takes 100 ms."""
METADATA_BYTES: Final = 16 << 10
"""Metadata of a call: a caller statement is below 1 KiB."""
IDLE_MS: Final = 15 * 60_000
"""How long a connection may be without a call."""
KEEPALIVE_MS: Final = 30_000
KEEPALIVE_TIMEOUT_MS: Final = 20_000
WILDCARDS: Final = ("", "0.0.0.0", "::", "*")  # noqa: S104  # compared, not bound
SERVICE: Final = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name


def launcher_of(config: Config) -> Launcher:
    """The launcher that a configuration names; ConfigError where it cannot be."""
    if config.launcher == "nitro":
        return NitroLauncher(config.nitro, config.enclaves, now_ms)
    return LocalLauncher(config.qemu if config.launcher == "qemu" else config.local, config.enclaves)


def blobs_of(config: Config) -> BlobStore:
    """The blob store that a configuration names."""
    if config.s3 is None:
        return Directory(config.blobs)
    from parley_coordinator.s3 import Bucket

    return Bucket(config.s3)


async def serve(config: Config, launcher: Launcher | None = None) -> None:
    """Runs until SIGTERM or SIGINT, with this launcher or the one that the configuration names.

    ConfigError where it cannot start; UnavailableError where its enclaves cannot be found again, whose sessions would
    otherwise be given up.
    """
    with Identity.claim(config) as identity:
        await _serve(config, launcher, identity)


async def _serve(config: Config, launcher: Launcher | None, identity: Identity) -> None:
    certificate, key = _read(config.certificate, "tls.certificate"), _read(config.key, "tls.key")
    callers = Callers(tls.server_digest(certificate))
    peers = Peers(certificate)
    store = Store(config.database)
    cluster = config.cluster
    leases = Leases(store, identity, lease_s=cluster.lease_s, abandon_s=cluster.abandon_s)
    blobs = blobs_of(config)
    world = World(store, blobs, launcher or launcher_of(config), config.deadlines, now_ms, leases, Kms(config.kms))
    sessions = Sessions(world)
    loop = asyncio.get_running_loop()
    bell = Bell(loop)
    store.on_event(bell.ring)
    parts = Parts(
        store=store,
        callers=callers,
        agreements=Agreements(store, config.quotas, now_ms),
        uploads=Uploads(store, blobs, config.quotas, now_ms),
        sessions=sessions,
        kms_joins=KmsJoins(store, now_ms),
        releases=Releases(store, blobs, now_ms),
        inbox=Inbox(store, now_ms),
        events=Events(store),
        peers=peers,
        quotas=config.quotas,
        clock=now_ms,
    )
    quick = ThreadPoolExecutor(QUICK, thread_name_prefix="quick")
    long = ThreadPoolExecutor(LONG, thread_name_prefix="long")
    joins = ThreadPoolExecutor(JOINS, thread_name_prefix="join")
    disk = ThreadPoolExecutor(DISK, thread_name_prefix="disk")
    watching = ThreadPoolExecutor(WATCHING, thread_name_prefix="watch")
    deadlines = config.deadlines
    guard = Guard(SERVICE, request_s=deadlines.request_s, calls_per_member=config.quotas.calls_per_member)
    pools = {"quick": quick, "disk": disk, "long": long, "joins": joins, "watching": watching}
    service = Service(parts, bell, guard, idle_s=deadlines.idle_s, **pools)
    guard.protect(service.admit, abort)
    metrics = telemetry.setup(config.telemetry, lambda: db.phases(store))
    server = _server(config, guard)
    add_CoordinatorServicer_to_server(service, server)
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    if config.reflection:
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    try:
        port = server.add_secure_port(config.listen, credentials)
    except RuntimeError as error:
        raise ConfigError(f"listen: cannot listen at {config.listen}") from error
    leases.address = cluster.address or _reachable(config.listen, port)
    await loop.run_in_executor(long, sessions.recover)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await server.start()
    keeper = Keeper(store, blobs, config.keep, now_ms)
    keeper.start()
    for name in ("", SERVICE):
        await healths.set(name, health_pb2.HealthCheckResponse.SERVING)
    address = f"{config.listen.rpartition(':')[0]}:{port}"
    _write_address(config.address_file, address)
    log.info("listening", address=address, metrics=metrics)
    await stopped.wait()
    log.info("stopping")
    await healths.enter_graceful_shutdown()
    service.stop()
    world.launcher.close()
    await server.stop(config.grace_s)
    await service.close()
    await loop.run_in_executor(quick, sessions.close)
    await loop.run_in_executor(quick, keeper.close)
    await peers.close()
    for pool in pools.values():
        pool.shutdown()
    blobs.close()
    telemetry.close()
    store.close()
    config.address_file.unlink(missing_ok=True)
    log.info("stopped")


def _server(config: Config, guard: Guard) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=(guard,),
        maximum_concurrent_rpcs=config.rpcs,
        options=(
            ("grpc.max_receive_message_length", limits.RPC_BYTES),
            ("grpc.max_send_message_length", limits.RPC_BYTES),
            ("grpc.max_metadata_size", METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.max_allowed_incoming_connections", config.connections),
            ("grpc.max_concurrent_streams", STREAMS),
            # What is held of a stream whose reader waits: left alone it grows to 8 MB and more, times all uploads.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
            # Who connects and goes no further is cut off, and so is whoever has had nothing to say for a while.
            ("grpc.server_handshake_timeout_ms", int(config.deadlines.handshake_s * 1000)),
            ("grpc.http2.settings_timeout", int(config.deadlines.handshake_s * 1000)),
            ("grpc.max_connection_idle_ms", IDLE_MS),
            # A client whose machine has vanished frees its stream within a minute.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            # Clients ask every 30 s whether the server is there; who asks much more often is cut off.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 4),
        ),
    )


def _reachable(listen: str, port: int) -> str:
    """Where another machine reaches this server, as far as this one can know."""
    host = listen.rpartition(":")[0]
    return f"{socket.gethostname() if host.strip('[]') in WILDCARDS else host}:{port}"


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: {path}: {error.strerror}; `parley-coordinator init` makes one") from error


def _write_address(path: Path, address: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(address + "\n", encoding="utf-8")
    os.replace(part, path)
