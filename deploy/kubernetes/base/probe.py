"""Asks the coordinator's health service over TLS: exit code 0 when it serves. (Kubernetes' own gRPC probe speaks no TLS.)

    python probe.py ADDRESS CERTIFICATE [NAME]

NAME is one that stands in the certificate; `parley-coordinator init` always puts `localhost` there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 4.0


def main(address: str, certificate: str, name: str = "localhost") -> int:
    """Asks once; prints what was wrong."""
    credentials = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
    with grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            print(error.code().name, error.details())
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
