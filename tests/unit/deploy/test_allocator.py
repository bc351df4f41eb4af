"""The allocator's file: enough memory for nitro-cli and for the engine, in a form that AWS's line parser reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parley_deploy import allocator
from parley_deploy.allocator import MIB, SizeError, allocator_yaml, needed_mib, reserve
from parley_protocol import limits
from support.vectors import images


@pytest.fixture
def image() -> Path:
    """An image that AWS's own code built."""
    return images()["unsigned_x86_2rd"].path


def read_like_the_allocator(text: str) -> dict[str, str]:
    """What `nitro-enclaves-allocator` makes of the file: comment lines fall away, nothing counts before `---`, and every
    other line must be a known key with a value; an empty line is an unknown key, a comment behind a value is part of it."""
    config: dict[str, str] = {}
    begun = False
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("#"):
            continue
        if line == "---":
            begun = True
            continue
        if not begun:
            continue
        key = re.match(r"[-_a-z0-9]+", line.partition(":")[0], re.IGNORECASE)
        if key is None or key[0] not in ("memory_mib", "cpu_count", "cpu_pool"):
            raise ValueError(f"{number}: unexpected: {line}")
        config[key[0]] = re.sub(r"^.+:\s*", "", line)
    return config


def test_the_parser_of_this_test_is_as_strict_as_the_allocator() -> None:
    assert read_like_the_allocator("x: 1\n---\n# a\nmemory_mib: 512\n") == {"memory_mib": "512"}
    assert read_like_the_allocator("---\nmemory_mib: 512 # half\n") == {"memory_mib": "512 # half"}
    with pytest.raises(ValueError, match="2: unexpected"):
        read_like_the_allocator("---\n\nmemory_mib: 512\n")


@pytest.mark.parametrize("image_mib", [1, 30, 64, 333, 2000])
@pytest.mark.parametrize("cpus", [2, 4, 16, 64])
@pytest.mark.parametrize("page", [2, 1024])
def test_memory_suffices_for_nitro_cli_and_for_the_engine(image_mib: int, cpus: int, page: int) -> None:
    memory = needed_mib(image_mib * MIB - 1, cpus, page)
    assert memory % page == 0
    engine = (
        limits.PARTIALS_BYTES
        + limits.RELEASE_BYTES
        + cpus * (limits.WINDOW_BYTES + limits.STATE_BYTES + limits.PAYLOAD_BYTES)
    )
    assert memory >= 4 * image_mib
    assert memory * MIB >= 2 * image_mib * MIB + engine
    assert memory <= needed_mib(image_mib * MIB - 1, cpus, 2) + page, "no more than a page is lost"
    assert needed_mib(image_mib * MIB - 1, cpus + 1, page) >= memory


def test_a_great_image_needs_four_times_its_size() -> None:
    assert needed_mib(3000 * MIB, 2) == 12_000
    assert needed_mib(3000 * MIB + 1, 2) == 12_004, "nitro-cli counts whole MiB"


def test_the_file_is_read_by_the_allocator_and_says_why() -> None:
    one = reserve(50 * MIB, enclaves=3, cpus=4)
    text = allocator_yaml(one)
    assert read_like_the_allocator(text) == {"memory_mib": str(3 * one.memory_mib), "cpu_count": "12"}
    said = [int(value) for value in re.findall(r"^#\s+(\d+)  ", text, re.MULTILINE)]
    *parts, given = said
    assert given == one.memory_mib
    assert 0 <= given - sum(parts) <= 4, "the parts are the whole, but for rounding"
    assert f"memory_mib = {one.memory_mib}   cpus = 4" in text


@pytest.mark.parametrize("option", ["enclaves", "cpus", "memory_mib", "page_mib", "threads_per_core"])
@pytest.mark.parametrize("value", [0, -1, 3, 5, 65, 10**9 + 1])
def test_nonsense_is_refused_by_name(option: str, value: int) -> None:
    if (option, value) == ("enclaves", 3):
        assert reserve(MIB, enclaves=3).enclaves == 3
        return
    with pytest.raises(SizeError, match=f"--{option.removesuffix('_mib').replace('_', '-')}: "):
        reserve(MIB, **{option: value})


def test_a_smaller_memory_than_the_engine_may_need_is_refused() -> None:
    least = needed_mib(50 * MIB, 2)
    assert reserve(50 * MIB, memory_mib=least).memory_mib == least
    assert reserve(50 * MIB, memory_mib=least + 100).memory_mib == least + 100
    with pytest.raises(SizeError, match=f"--memory: {least - 2} MiB; .* {least}"):
        reserve(50 * MIB, memory_mib=least - 2)


def test_one_thread_per_core_allows_odd_counts() -> None:
    assert reserve(MIB, cpus=3, threads_per_core=1).total_cpus == 3


def test_the_command_prints_the_file_for_a_real_image(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert allocator.main([str(image), "--enclaves", "2", "--cpus", "4"]) == 0
    config = read_like_the_allocator(capsys.readouterr().out)
    assert config == {"memory_mib": str(2 * needed_mib(image.stat().st_size, 4)), "cpu_count": "8"}


def test_the_command_refuses_what_is_no_image(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_image = tmp_path / "x.eif"
    no_image.write_bytes(b"no image at all" * 100)
    for path, extra in ((no_image, []), (tmp_path / "absent", []), (image, ["--enclaves", "9"])):
        assert allocator.main([str(path), *extra]) == 1
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err.startswith("allocator: ")


def test_the_runbook_has_these_numbers() -> None:
    text = (Path(allocator.__file__).parents[1] / "RUNBOOK.md").read_text("utf-8")
    main, worker = (-(-size // MIB) for size in (allocator.MAIN_BYTES, allocator.WORKER_BYTES))
    assert (
        f"{allocator.SYSTEM_BYTES // MIB} MiB for the kernel, {main} MiB for the main process, {worker} MiB for each"
        in text
    )
    size = int(re.search(r"For the image of (\d+) MiB", text)[1])  # type: ignore[index]
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) MiB \| (\d) \| (\d+) CPUs, (\d+) GiB", text, re.MULTILINE)
    assert len(rows) == 4
    for cpus, memory, enclaves, parent_cpus, parent_gib in rows:
        one = reserve(size * MIB, enclaves=int(enclaves), cpus=int(cpus))
        assert one.memory_mib == int(memory.replace(",", ""))
        assert one.total_cpus + 2 <= int(parent_cpus)
        assert one.total_mib + 4096 <= int(parent_gib) * 1024
