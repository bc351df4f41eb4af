"""Metrics and traces: what is in the tables and nothing else, and only where the operator asks."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from parley_coordinator import telemetry
from parley_coordinator.config import ConfigError, Telemetry
from parley_protocol.agreement.signed import sign
from parley_protocol.errors import CODES, UnavailableError
from parley_protocol.v1 import coordinator_pb2 as pb
from support.coordinator import Coordinator, free_port, refused
from support.desk import MEMBERS, make_agreement
from support.enclave import Party, rows_of, until

AGREEMENT = make_agreement()


class Collector:
    """An OpenTelemetry collector over gRPC."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(
            self._export,
            request_deserializer=ExportTraceServiceRequest.FromString,
            response_serializer=ExportTraceServiceResponse.SerializeToString,
        )
        service = "opentelemetry.proto.collector.trace.v1.TraceService"
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        self.requests.append(request)
        return ExportTraceServiceResponse()

    def spans(self) -> list[Any]:
        """All spans."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def stop(self) -> None:
        """Ends it."""
        self._server.stop(None).wait()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Coordinator]:
    toml = f'[telemetry]\nmetrics = "127.0.0.1:{free_port()}"\notlp = "{collector.url}"\n'
    with Coordinator(tmp_path_factory.mktemp("c"), [sys.executable, "-c", "raise SystemExit(1)"], toml) as made:
        made.operators(MEMBERS["ann"])
        made.start()
        yield made


def scrape(coordinator: Coordinator) -> str:
    (address,) = re.findall(r'"metrics":"([^"]+)"', coordinator.log)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


@pytest.fixture(scope="module")
def played(coordinator: Coordinator) -> bytes:
    ann = coordinator.client(MEMBERS["ann"])
    ann.call("PutAgreement", pb.PutAgreementRequest(canonical=AGREEMENT.canonical))
    for name, member in MEMBERS.items():
        request = pb.PutSignatureRequest(agreement=AGREEMENT.digest, member=name, cose=sign(AGREEMENT, name, member))
        ann.call("PutSignature", request)
    (sealed,) = Party(AGREEMENT, "ann", MEMBERS["ann"], {"visits": rows_of(1, 1000)}).sealed
    assert ann.upload(sealed).complete
    with refused("unknown-session"):
        ann.call("GetSession", pb.SessionRef(session=bytes(16)))
    with refused("unavailable"):
        ann.call("OpenSession", pb.OpenSessionRequest(request_id=b"r" * 16, agreement=AGREEMENT.digest))
    return sealed.blob


def test_only_what_is_in_the_table_is_counted(coordinator: Coordinator, played: bytes) -> None:
    text = scrape(coordinator)
    seen = set()
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(\w+?)(_bucket|_sum|_count)?(?:\{(.*)\})? (\S+)", line)
        assert match, line
        name = match[1] if match[1] in telemetry.METRICS else match[1] + (match[2] or "")
        metric = telemetry.METRICS[name]
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[3] or ""))
        assert set(labels) - {"le"} <= set(metric.labels), line
        assert labels.get("code", "ok") in {*CODES, "ok"}
        if "method" in labels:
            assert labels["method"] in pb.DESCRIPTOR.services_by_name["Coordinator"].methods_by_name
        seen.add(name)
    assert {"parley_calls_total", "parley_call_seconds", "parley_upload_bytes", "parley_sessions"} <= seen
    assert 'parley_calls_total{code="ok",method="PutSignature"} 3.0' in text
    assert 'parley_calls_total{code="unknown-session",method="GetSession"} 1.0' in text
    assert 'parley_sessions{phase="lost"} 1.0' in text
    assert 'parley_sessions_ended_total{code="unavailable"} 1.0' in text


def test_no_name_no_key_and_no_exact_size(coordinator: Coordinator, played: bytes, collector: Collector) -> None:
    text = scrape(coordinator)
    (total,) = re.findall(r"parley_upload_bytes_sum (\S+)", text)
    assert float(total) in telemetry.SIZES
    assert float(total) > len(played)
    coordinator.stop()
    until(lambda: {span.name for span in collector.spans()} == {"call"})
    told = [text, *map(str, collector.requests)]
    for name, member in MEMBERS.items():
        for secret in (name, member.public.signing.hex(), member.public.fingerprint):
            assert all(not re.search(rf"\b{re.escape(secret)}\b", part) for part in told), secret
    attributes = {attribute.key for span in collector.spans() for attribute in span.attributes}
    assert {"rpc.method", "parley.code", "parley.size"} <= attributes <= telemetry.ATTRIBUTES
    codes = {a.value.string_value for span in collector.spans() for a in span.attributes if a.key == "parley.code"}
    assert {"ok", "unknown-session", "unavailable"} <= codes
    assert all(not span.events and not span.status.message for span in collector.spans())


def test_names_and_labels_that_are_not_in_the_table() -> None:
    with pytest.raises(KeyError):
        telemetry.count("parley_secrets_total")
    with pytest.raises(ValueError, match="labels"):
        telemetry.count("parley_calls_total", method="Inbox", member="ann")
    with pytest.raises(ValueError, match="no attribute"), telemetry.span("call", member="ann"):
        pytest.fail("the block was reached")
    with telemetry.span("call") as span, pytest.raises(ValueError, match="no attribute"):
        span.set("parley.member", "ann")


@pytest.mark.parametrize(
    ("size", "told"), [(0, 1024), (1, 1024), (1025, 4096), (5 << 30, 16 << 30), (1 << 50, 1 << 40)]
)
def test_sizes_are_rounded_up(size: int, told: int) -> None:
    assert telemetry.rounded(size) == told


@pytest.fixture
def off() -> Iterator[None]:
    yield
    telemetry.close()


def test_a_database_that_is_away_ends_no_scrape(off: None) -> None:
    def away() -> dict[str, int]:
        raise UnavailableError("away")

    address = telemetry.setup(Telemetry(metrics="127.0.0.1:0"), away)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        assert "parley_leases 0.0" in answer.read().decode()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Telemetry(metrics="nowhere"), "telemetry.metrics: not address:port"),
        (Telemetry(metrics="192.0.2.1:1"), "telemetry.metrics: cannot listen"),
        (Telemetry(otlp="host:1"), "telemetry.otlp: not a URL"),
    ],
)
def test_what_cannot_be_is_a_config_error(off: None, config: Telemetry, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        telemetry.setup(config, dict)


def test_traces_without_their_extra(off: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="needs Parley's extra `telemetry`"):
        telemetry.setup(Telemetry(otlp="http://127.0.0.1:1"), dict)


def test_spans_within_spans(off: None, collector: Collector) -> None:
    telemetry.setup(Telemetry(otlp=collector.url), dict)
    before = len(collector.spans())
    with telemetry.span("call", rpc_method="Inbox"):
        with telemetry.span("enclave", parley_operation="join"):
            pass
        thread = threading.Thread(target=lambda: telemetry.span("other").__enter__())
        thread.start()
        thread.join()
    telemetry.close()
    spans = {span.name: span for span in collector.spans()[before:]}
    assert spans["enclave"].parent_span_id == spans["call"].span_id
    assert spans["enclave"].trace_id == spans["call"].trace_id


def test_off_nothing_is_loaded(tmp_path: Path) -> None:
    program = "import sys, parley_coordinator.server; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert not loaded & {"prometheus_client", "opentelemetry", "boto3", "botocore", "alembic"}
