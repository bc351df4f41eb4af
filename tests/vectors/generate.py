"""Vectors of canonical agreements: python tests/vectors/generate.py writes them, with --check it compares.

A second implementation reads `agreements.json`: for each agreement the YAML, the files that it names, the canonical bytes and
the digests that follow. Keys and root are those of `support.agreements` and protect nothing.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from parley.agreements import parse_source, parse_yaml  # noqa: E402
from parley_protocol.agreement.model import effective  # noqa: E402
from parley_protocol.agreement.signed import sign  # noqa: E402
from support.agreements import identity, read, yaml_text  # noqa: E402 - the path stands above

FILE = HERE / "agreements.json"

EVERYTHING = """\
parley: 1
version: 2
replaces: REPLACED
title: Everything at once
purpose: One of each type, bin, join, rule and operator.
expires: 2030-02-28
platform: simulated
root: simulated-root.pem
measurements: [{file: measurements.json, until: 2029-12-31}]
members: {ä: keys/a.pub, b: keys/b.pub, c: keys/c.pub, d: keys/d.pub, e: keys/e.pub, f: keys/f.pub}
groups: {parties: [ä, b, c, d]}
unit: {name: patient, normalise: email}
tables:
  visits:
    from: parties
    key: mail
    rows_per_unit: 40
    columns:
      n: {type: int, null: true}
      cost: {type: decimal, scale: 2, in: EUR, min: -10.50, max: 99999.99}
      rate: {type: float, min: -1e-7, max: 1e30}
      urgent: {type: bool, null: true}
      code: {type: category, values: ['NO', '012', '1e5', naïve]}
      day: {type: date, min: 2000-01-01}
      at: {type: timestamp, max: 2029-12-31T23:59:59.999999Z, null: true}
  people:
    from: e
    key: mail
    rows_per_unit: 1
    columns:
      n: {type: int, min: 0, max: 120}
outputs:
  one:
    from: visits
    join: {people: left}
    where: (cost * 2 > 10.5 or not urgent) and people.n in [1, 2] and code not in ['NO'] and day >= '2001-01-01'
    by:
      code: code
      urgent: urgent
      age: {bin: people.n, edges: [18, 19, 65], labels: [minor, eighteen, adult, old]}
      cost: {bin: cost, edges: [0, 0.01]}
      rate: {bin: rate, edges: [0.5]}
      when: {bin: day, edges: [2010-01-01, 2010-01-02]}
      at: {bin: at, edges: ['2010-01-01T12:00:00Z']}
    values: {rows: count, patients: units, n: count(visits.n), s: sum(cost), m: mean(rate), v: variance(cost), d: std(rate)}
    to: [f, parties]
rules:
  everyone: {min_units: 5, min_parties: 2, coalition: 2}
  parties: {coalition: all}
  f: {min_units: 7}
session: {start: [f, b], quorum: 4, deadline: 36 hours, countersign_within: 90 seconds, max_releases: 9, consent: standing}
"""


def vector(text: str) -> dict[str, object]:
    """What one agreement's YAML becomes."""
    agreement = parse_source(text.encode(), read)
    tree, _ = parse_yaml(text.encode())
    member = next(iter(agreement.members))
    return {
        "yaml": text,
        "tree": tree,
        "members": {name: base64.b64encode(key.to_bytes()).decode() for name, key in agreement.members.items()},
        "fingerprints": {name: key.fingerprint for name, key in agreement.members.items()},
        "canonical": base64.b64encode(agreement.canonical).decode(),
        "digest": agreement.digest.hex(),
        "series": agreement.series.hex(),
        "schemas": {name: table.schema_digest.hex() for name, table in agreement.tables.items()},
        "parties": list(agreement.parties),
        "rows": {name: output.rows for name, output in agreement.outputs.items()},
        "labels": {
            name: {grouping.name: list(grouping.labels) for grouping in output.by}
            for name, output in agreement.outputs.items()
        },
        "effective": [[rule.min_units, rule.min_parties, rule.coalition] for rule in effective(agreement)],
        "signature": {
            "member": member,
            "cose": base64.b64encode(sign(agreement, member, identity(_key(member)))).decode(),
        },
    }


def _key(member: str) -> str:
    # The vector's own members have other names than their key files.
    return "a" if member == "ä" else member


def vectors() -> str:
    """The file's text: the same in every run, since Ed25519 signatures are."""
    flights = parse_source(yaml_text("flights").encode(), read)
    found = {
        "flights": vector(yaml_text("flights")),
        "pay": vector(yaml_text("pay")),
        "everything": vector(EVERYTHING.replace("REPLACED", flights.digest.hex())),
    }
    return json.dumps(found, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    text = vectors()
    if arguments == ["--check"]:
        if not FILE.exists() or FILE.read_text("utf-8") != text:
            print(f"{FILE.name} is not what the code makes: run tests/vectors/generate.py and look at the difference")
            return 1
        return 0
    FILE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
