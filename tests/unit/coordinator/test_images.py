"""Image files: measured once, and again when another file has their name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parley_coordinator.images import Images
from parley_protocol import measurement
from support.nitro_host import tiny_image


def test_a_file_that_has_not_changed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "i.eif"
    first = tiny_image(path)
    images = Images(lambda: 0)
    assert images.measure(path).pcrs[0] == first.pcr0
    with monkeypatch.context() as patch:
        patch.delattr(measurement, "measure")
        assert images.measure(path).pcrs[0] == first.pcr0
    second = tiny_image(path, b"other")
    assert images.measure(path).pcrs[0] == second.pcr0 != first.pcr0


def test_a_file_that_is_replaced_while_it_is_opened_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "i.eif", tmp_path / "other.eif"
    first, second = tiny_image(path), tiny_image(other, b"other")
    images = Images(lambda: 0)
    real = Path.open

    def replaced(self: Path, *arguments: Any) -> Any:
        file = real(self, *arguments)
        other.replace(path)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", replaced)
        assert images.measure(path).pcrs[0] == first.pcr0
    assert images.measure(path).pcrs[0] == second.pcr0
