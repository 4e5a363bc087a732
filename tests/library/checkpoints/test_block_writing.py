"""Files written in blocks: every byte in its place, whatever the pieces; and what a disk changes is seen."""

import fcntl
import os

import pytest
import torch

from library.checkpoints import block_writing
from library.checkpoints.block_writing import write_and_compare
from library.checkpoints.tensor_writing import write_tensors
from library.errors import UserError


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_writing, "BLOCK", 8192)


@pytest.mark.parametrize("length", [0, 1, 4096, 8192, 8193, 5 * 8192 + 17])
@pytest.mark.parametrize("piece", [100, 8192, 20000])
def test_a_file_holds_the_pieces_it_was_given(tmp_path, small_blocks, length, piece):
    content = os.urandom(length)
    with open(tmp_path / "file", "x+b") as file:
        write_and_compare(file, (content[start : start + piece] for start in range(0, length, piece)))
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_can_be_written_on_as_usual_afterwards(tmp_path, small_blocks):
    with open(tmp_path / "file", "x+b") as file:
        write_and_compare(file, [b"a" * 10000])
        file.seek(0)
        file.write(b"bcd")
    assert (tmp_path / "file").read_bytes() == b"bcd" + b"a" * 9997


def test_a_file_system_that_knows_the_page_cache_only_will_do(tmp_path, small_blocks, monkeypatch):
    real = fcntl.fcntl

    def refusing(descriptor, command, flags=0):
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    with open(tmp_path / "file", "x+b") as file:
        write_and_compare(file, [b"a" * 10000])
    assert (tmp_path / "file").read_bytes() == b"a" * 10000


def test_a_disk_that_changes_a_byte_is_told_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before, real = path.read_bytes(), os.preadv

    def flipping(descriptor, buffers, offset):
        count = real(descriptor, buffers, offset)
        buffers[0][100] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", flipping)
    with pytest.raises(UserError, match="could not be written .the disk gives back something else than it got"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
