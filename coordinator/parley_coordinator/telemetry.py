"""Metrics and traces, where the operator asks for them; off, every function here does nothing.

Names, labels and attributes are those of the tables below and no others. Sizes are rounded up to a power of four before they
are counted, so that not even a sum tells one; no member, key, session or statement is in any of it.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from parley_coordinator.config import ConfigError, Telemetry
from parley_protocol.errors import ParleyError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Sample

OK: Final = "ok"
"""The code of what succeeded; the others are those of `errors.CODES`."""
SIZES: Final = tuple(float(4**power) for power in range(5, 21))
"""Buckets of sizes: 1 KiB to 1 TiB."""
SECONDS: Final = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0)
STALE_S: Final = 10.0
"""How old the number of sessions may be: a scrape does not cost a query each time."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its kind, what it says, its labels, and a histogram's buckets."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: Final[Mapping[str, Metric]] = {
    "parley_calls_total": Metric("counter", "Calls that ended, by method and code.", ("method", "code")),
    "parley_call_seconds": Metric("histogram", "How long calls took.", ("method",), SECONDS),
    "parley_calls_running": Metric("gauge", "Calls under way, streams included.", ("method",)),
    "parley_upload_bytes": Metric("histogram", "Bytes of one upload stream, rounded up.", (), SIZES),
    "parley_bundle_bytes": Metric("histogram", "Bytes of one bundle that was fetched, rounded up.", (), SIZES),
    "parley_sessions": Metric("gauge", "Sessions in the store, by phase.", ("phase",)),
    "parley_sessions_ended_total": Metric("counter", "Sessions that ended here, by code.", ("code",)),
    "parley_leases": Metric("gauge", "Sessions that this coordinator serves."),
    "parley_leases_taken_total": Metric("counter", "Sessions taken over from another coordinator."),
    "parley_leases_lost_total": Metric("counter", "Sessions that another coordinator took over."),
    "parley_enclave_seconds": Metric(
        "histogram", "How long enclaves took, by operation and code.", ("operation", "code"), SECONDS
    ),
    "parley_store_failures_total": Metric("counter", "Transactions that failed: conflict or away.", ("kind",)),
    "parley_blob_failures_total": Metric("counter", "Requests to the blob store that failed."),
    "parley_blobs_deleted_total": Metric("counter", "Blobs deleted after their time."),
}
"""Every metric. What is not here cannot be counted."""

ATTRIBUTES: Final = frozenset({"rpc.system", "rpc.method", "parley.code", "parley.size", "parley.operation"})
"""Every attribute of a span."""


_PARENT: Final[contextvars.ContextVar[Any]] = contextvars.ContextVar("span", default=None)


class _Active:
    metrics: dict[str, Any] | None = None
    tracer: Any = None
    closers: tuple[Callable[[], object], ...] = ()


def setup(config: Telemetry, sessions: Callable[[], Mapping[str, int]]) -> str:
    """Begins what a configuration asks for; the address of the metrics, or an empty text. `sessions`: their number by phase.

    ConfigError where it cannot be.
    """
    address = ""
    if config.metrics:
        address = _serve(config.metrics, sessions)
    if config.otlp:
        _trace(config.otlp)
    return address


def close() -> None:
    """Ends all, and sends what is left."""
    for closer in _Active.closers:
        closer()
    _Active.metrics, _Active.tracer, _Active.closers = None, None, ()


def _serve(where: str, sessions: Callable[[], Mapping[str, int]]) -> str:
    import prometheus_client as prometheus

    kinds = {"counter": prometheus.Counter, "histogram": prometheus.Histogram, "gauge": prometheus.Gauge}
    prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = prometheus.CollectorRegistry()
    made: dict[str, Any] = {}
    for name, metric in METRICS.items():
        if name != "parley_sessions":
            more = {"buckets": metric.buckets} if metric.buckets else {}
            made[name] = kinds[metric.kind](name, metric.help, metric.labels, registry=registry, **more)
    registry.register(_Sessions(sessions))
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError("telemetry.metrics: not address:port")
    try:
        server, thread = prometheus.start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise ConfigError(f"telemetry.metrics: cannot listen at {where}: {error.strerror}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    _Active.metrics = made
    _Active.closers += (stop,)
    return f"{host}:{server.server_port}"


class _Sessions:
    def __init__(self, count: Callable[[], Mapping[str, int]]) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._found: Mapping[str, int] = {}
        self._until = 0.0

    def describe(self) -> Iterable[Sample]:
        """Nothing is counted before the first scrape."""
        return ()

    def collect(self) -> Iterable[Sample]:
        """The number of sessions; none while the database is away."""
        from prometheus_client.core import GaugeMetricFamily

        metric = METRICS["parley_sessions"]
        family = GaugeMetricFamily("parley_sessions", metric.help, labels=metric.labels)
        with self._lock:
            if time.monotonic() >= self._until:
                try:
                    self._found = self._count()
                except ParleyError:
                    self._found = {}
                self._until = time.monotonic() + STALE_S
            for phase, number in sorted(self._found.items()):
                family.add_metric([phase], number)
        return (family,)


def _trace(endpoint: str) -> None:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "telemetry.otlp: needs Parley's extra `telemetry`: pip install '.[telemetry]' in a checkout"
        ) from error
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError("telemetry.otlp: not a URL http://HOST:PORT or https://HOST:PORT")
    provider = TracerProvider(resource=Resource({"service.name": "parley-coordinator"}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _Active.tracer = provider.get_tracer("parley_coordinator")
    _Active.closers += (provider.shutdown,)


def _metric(name: str, labels: Mapping[str, str]) -> Any:
    if set(labels) != set(METRICS[name].labels):
        raise ValueError(f"{name} has the labels {METRICS[name].labels}")
    if _Active.metrics is None:
        return None
    found = _Active.metrics[name]
    return found.labels(**labels) if labels else found


def count(name: str, **labels: str) -> None:
    """Counts one."""
    if (metric := _metric(name, labels)) is not None:
        metric.inc()


def observe(name: str, value: float, **labels: str) -> None:
    """Adds a value to a histogram; one of sizes is rounded up first."""
    if (metric := _metric(name, labels)) is not None:
        metric.observe(rounded(value) if METRICS[name].buckets == SIZES else value)


def change(name: str, by: int, **labels: str) -> None:
    """Moves a gauge."""
    if (metric := _metric(name, labels)) is not None:
        metric.inc(by)


def put(name: str, value: float, **labels: str) -> None:
    """Sets a gauge."""
    if (metric := _metric(name, labels)) is not None:
        metric.set(value)


def rounded(size: float) -> float:
    """The bucket of a size."""
    return next((bucket for bucket in SIZES if size <= bucket), SIZES[-1])


class Span:
    """A span that is under way, or nothing."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def set(self, name: str, value: str) -> None:
        """Sets an attribute; ValueError for one that is not in the table."""
        if name not in ATTRIBUTES:
            raise ValueError(f"{name} is no attribute of a span")
        if self._span is not None:
            self._span.set_attribute(name, value)


@contextmanager
def span(name: str, **attributes: str) -> Iterator[Span]:
    """A span for as long as the block lasts, within the one that is under way; `rpc_method="Inbox"` is the attribute
    `rpc.method`. What the block raises is not told."""
    parent = _PARENT.get()
    started = None
    if _Active.tracer is not None:
        from opentelemetry.trace import set_span_in_context

        started = _Active.tracer.start_span(name, context=None if parent is None else set_span_in_context(parent))
        _PARENT.set(started)
    made = Span(started)
    try:
        for key, value in attributes.items():
            made.set(key.replace("_", "."), value)
        yield made
    finally:
        if started is not None:
            # Set, not reset: a stream that its caller left may end in another context.
            _PARENT.set(parent)
            started.end()
