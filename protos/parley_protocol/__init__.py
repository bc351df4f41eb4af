"""What the bytes are, and how a claim is verified. Imports no network, no storage and no other role."""
