"""Files that end too early, where libsndfile plays what there is and says nothing."""

from pathlib import Path

_OGG_HEADER = 27  # bytes of a page before its table of lengths
_LAST_PAGE = 0x04  # flag of the page that ends a stream


def truncation(path: Path) -> str | None:
    """What a WAV, an AIFF or an Ogg file lacks of what it announces; None for other formats.

    FLAC and MP3 need no help: reading them to their end tells.
    """
    lost = _bytes_lost(path)
    if lost:
        return f"truncated: {lost} bytes of sound are missing"
    return "truncated: an Ogg stream without its end" if _ogg_is_cut(path) else None


def _bytes_lost(path: Path) -> int:
    """How many bytes a WAV or AIFF lacks of what its header announces.

    Writers that stream leave the length at 0 or at its maximum: those announce nothing. RF64, for
    more than 4 GiB, has its maximum there and states the length in its first chunk.
    """
    with path.open("rb") as file:
        head = file.read(28)
    order = {b"RIFF": "little", b"RF64": "little", b"FORM": "big"}.get(head[:4])
    if order is None or len(head) < 12 or head[8:12] not in (b"WAVE", b"AIFF", b"AIFC"):
        return 0
    place = slice(20, 28) if head[:4] == b"RF64" else slice(4, 8)
    announced = int.from_bytes(head[place], order)
    if announced in (0, 0xFFFFFFFF):
        return 0
    return max(0, announced + 8 - path.stat().st_size - announced % 2)


def _ogg_is_cut(path: Path) -> bool:
    """Whether an Ogg file's last page is not whole, or is not the last of its stream.

    Source: RFC 3533, section 6.
    """
    size, flags = path.stat().st_size, _LAST_PAGE
    with path.open("rb") as file:
        while (head := file.read(_OGG_HEADER))[:4] == b"OggS":
            lengths = file.read(head[-1])
            if len(head) < _OGG_HEADER or file.seek(sum(lengths), 1) > size:
                return True
            flags = head[5]
    return not flags & _LAST_PAGE
