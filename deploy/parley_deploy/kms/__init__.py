"""KMS, emulated for demos and tests: boto3 talks to it unchanged, by its endpoint URL.

    python -m parley_deploy.kms --dir DIR --root ROOT [--listen 127.0.0.1:0]

Keys, aliases, tags, rotation and grants are moto's; what moto lacks is done here: callers and their signatures, key
policies with their conditions, `Recipient` with its attestation document (verified under the local root ROOT by the
same code that clients use), and `CiphertextForRecipient` in the BER form that AWS sends. Nothing imports this package
but `parley demo` and tests; what it protects is worth as much as the local root, which is nothing.

Other than AWS: only symmetric keys, no GenerateDataKeyPair, DeriveSharedSecret or ReEncrypt; a document of a NitroTPM is refused
as a document (AWS takes it, and the enclave's condition keys are then absent); the texts of ValidationException for
documents are our own, since AWS publishes none; the date of a signed request is not checked.
"""
