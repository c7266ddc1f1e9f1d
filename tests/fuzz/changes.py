"""Changed files: bytes flipped, cut, doubled or put in, numbers made large, text made strange."""

from __future__ import annotations

from hypothesis import strategies as st

STRANGE = [
    b"\x00", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80", b"-1", b"0", b"1e999", b"NaN", b"null",
    b"99999999999999999999", b'"', b"'", b"[" * 40, b"{" * 40, b"\\", b"../../", b"/etc/passwd",
    b"__import__('os').system('true')", b"!!python/object/apply:os.system ['true']", b"\n",
    b"\xed\xa0\x80",
    b"{{ ''.__class__.__mro__ }}", b"true", b"[]", b"{}",
]  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """One of the whole files after up to four changes, or plain noise."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300))
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.integers(0, 5))
        if kind == 0 and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1 and place < len(content):
            content[place] = draw(st.integers(0, 255))
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + draw(st.integers(1, 40))]
        elif kind == 4:
            end = place + draw(st.integers(1, 40))
            content[place:place] = content[place:end]
        else:
            piece = draw(st.sampled_from(STRANGE))
            content[place : place + draw(st.sampled_from([0, len(piece)]))] = piece
    return bytes(content)
