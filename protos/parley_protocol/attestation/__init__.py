"""Attestation: what an AWS Nitro enclave proves about itself, and how that is verified (SPEC, "Attestation")."""
