"""The builder of enclave images, and the hash-locked requirements of what runs in one (`requirements.lock`)."""
