"""Parts of students, for the tests of alignment."""

from __future__ import annotations

from typing import Any, cast

from localign.alignment.student import Decoder, Student


def decoder_of(student: Student | Any) -> Decoder:
    """The decoder of a student that has one."""
    assert isinstance(student, Student)
    assert student.decoder is not None
    return student.decoder


def decoder_block(student: Student, number: int) -> Any:
    """A transformer block of the decoder; timm builds it, so its attributes have no types."""
    return cast(Any, decoder_of(student).blocks[number])
