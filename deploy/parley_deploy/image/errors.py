"""What can go wrong when an image is built."""

from __future__ import annotations


class ImageError(Exception):
    """The image cannot be built: the message names the input or the step, and what to do."""
