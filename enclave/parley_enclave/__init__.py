"""What runs in the measured image: decides what is released."""

from typing import Final

ENGINE_VERSION: Final = "parley-engine/1"
"""Stands in every record: the same version gives the same bytes for the same inputs."""
