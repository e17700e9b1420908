"""The directory of a zip file, read strictly.

Format facts: APPNOTE.TXT of PKWARE (end of central directory record, its Zip64 form, central and
local file headers), and the files that torch.save writes: entries are stored uncompressed, names
are UTF-8, and a Zip64 end record is always there. What such files never have is refused: compressed
entries (so that no entry can grow when it is read), encryption, several disks, entries that share
bytes or names, local headers that contradict the directory.
"""

import dataclasses
import struct

from dico_jax.errors import UsageError
from dico_jax.pytorch.tensor_refs import AGAIN, FileBytes, shown

_END = struct.Struct("<4s4H2LH")  # end of central directory
_LOCATOR = struct.Struct("<4sLQL")  # where the Zip64 end record is
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the Zip64 field"

_MAX_ENTRIES = 100_000
_MAX_DIRECTORY = 16 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class ZipEntry:
    """An entry of a zip file.

    Attributes:
      name: its name.
      start: position of its data in the file.
      nbytes: bytes of its data in the file.
      declared: bytes that it says to have once unpacked.
      method: how it is packed; 0 is not at all.
      crc: CRC-32 of the unpacked data.
    """

    name: str
    start: int
    nbytes: int
    declared: int
    method: int
    crc: int


def read_directory(file: FileBytes) -> dict[str, ZipEntry]:
    """The entries of zip file `file` by name, in the directory's order.

    Raises:
      UsageError: the file is cut short or damaged, has too many entries, encrypted ones, or ones
        that share bytes or a name.
    """
    count, size, offset = _find_directory(file)
    if count > _MAX_ENTRIES or size > _MAX_DIRECTORY:
        raise UsageError(f"{file.name} declares {count} zip entries; at most {_MAX_ENTRIES}")
    data = file.read(offset, size)
    entries: dict[str, ZipEntry] = {}
    extents = []
    at = 0
    for _ in range(count):
        central, at = _central(file, data, at)
        entry = _locate(file, central, offset)
        if entry.name in entries:
            raise UsageError(f"{file.name} has two zip entries named {shown(entry.name)}; {AGAIN}")
        entries[entry.name] = entry
        extents.append((central.header, entry.start + entry.nbytes, entry.name))
    if at != size:
        raise _damaged(file, "its zip directory does not have the declared size")
    _check_apart(file, extents)
    return entries


def _damaged(file: FileBytes, what: str) -> UsageError:
    return UsageError(f"{file.name} is cut short or damaged: {what}; {AGAIN}")


def _find_directory(file: FileBytes) -> tuple[int, int, int]:
    """The directory's number of entries, size and position, from the records at the file's end."""
    tail_at = max(0, file.size - _END.size - 0xFFFF)  # a comment of up to 64 KiB may follow
    tail = file.read(tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise _damaged(file, "there is no zip directory at its end")
    _, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail) or disk or first_disk or here != count:
        raise _damaged(file, "the record at its end is not a zip directory's")
    end = tail_at + at
    locator_at = end - _LOCATOR.size
    if locator_at >= 0 and file.read(locator_at, 4) == b"PK\6\7":
        end = _LOCATOR.unpack(file.read(locator_at, _LOCATOR.size))[2]
        record = _END64.unpack(file.read(end, _END64.size))
        if record[0] != b"PK\6\6" or record[4] or record[5] or record[6] != record[7]:
            raise _damaged(file, "its Zip64 end record is not one")
        small, large = (count, size, offset), record[7:]
        # Two programs must not see two directories in one file.
        for value, value64, full in zip(small, large, (_FULL16, _FULL32, _FULL32), strict=True):
            if value not in (value64, full):
                raise _damaged(file, "its two end records differ")
        count, size, offset = large
    if offset + size != end:
        raise _damaged(file, "its zip directory is not where it should be")
    return count, size, offset


@dataclasses.dataclass(frozen=True)
class _Central:
    """What a central header says: raw name, sizes, CRC-32, position of the local header."""

    name: bytes
    method: int
    nbytes: int
    declared: int
    crc: int
    header: int


def _central(file: FileBytes, data: bytes, at: int) -> tuple[_Central, int]:
    """The central header at `at` in directory `data`, and the position of the next one."""
    if len(data) - at < _CENTRAL.size:
        raise _damaged(file, "its zip directory ends early")
    fields = _CENTRAL.unpack_from(data, at)
    signature, flags, method = fields[0], fields[3], fields[4]
    crc, packed, declared = fields[7:10]
    n_name, n_extra, n_comment = fields[10:13]
    header = fields[16]
    at += _CENTRAL.size
    end = at + n_name + n_extra + n_comment
    if signature != b"PK\1\2" or end > len(data):
        raise _damaged(file, "its zip directory is not one")
    name = data[at : at + n_name]
    if _FULL32 in (declared, packed, header):
        extra = data[at + n_name : at + n_name + n_extra]
        declared, packed, header = _zip64(file, extra, [declared, packed, header])
    if flags & 0x41:
        raise UsageError(f"{file.name}: zip entry {shown(name)} is encrypted; save it without")
    return _Central(name, method, packed, declared, crc, header), end


def check_stored(file: FileBytes, entries: dict[str, ZipEntry]) -> None:
    """Refuses compressed entries: reading one could take any amount of memory.

    Raises:
      UsageError: there is one.
    """
    for entry in entries.values():
        if entry.method != 0 or entry.nbytes != entry.declared:
            raise UsageError(
                f"{file.name}: zip entry {shown(entry.name)} is compressed ({entry.nbytes} bytes "
                f"for {entry.declared}), which torch.save never does; pack it again without "
                "compression (zip -0)"
            )


def _zip64(file: FileBytes, extra: bytes, values: list[int]) -> list[int]:
    """`values` with those that did not fit replaced from the extra field with id 1, in order."""
    at = 0
    while len(extra) - at >= 4:
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            try:
                return [next(wide) if v == _FULL32 else v for v in values]
            except (StopIteration, RuntimeError):
                break
        at += 4 + length
    raise _damaged(file, "a Zip64 size is missing")


def _locate(file: FileBytes, central: _Central, directory_at: int) -> ZipEntry:
    """The entry of a central header: its data begin after the local header, which must agree."""
    if central.header + _LOCAL.size + len(central.name) > directory_at:
        raise _damaged(file, f"zip entry {shown(central.name)} lies outside of it")
    local = file.read(central.header, _LOCAL.size + len(central.name))
    signature, _, flags, method, _, _, _, _, _, n_name, n_extra = _LOCAL.unpack_from(local)
    start = central.header + _LOCAL.size + n_name + n_extra
    if (
        signature != b"PK\3\4"
        or local[_LOCAL.size :] != central.name
        or n_name != len(central.name)
        or method != central.method
        or flags & 0x41
    ):
        raise _damaged(file, f"the two headers of zip entry {shown(central.name)} differ")
    if start + central.nbytes > directory_at:
        raise _damaged(
            file, f"zip entry {shown(central.name)} declares {central.nbytes} bytes, past its end"
        )
    try:
        name = central.name.decode("utf-8")
    except UnicodeDecodeError:
        raise _damaged(file, f"a zip entry's name is not UTF-8: {shown(central.name)}") from None
    return ZipEntry(name, start, central.nbytes, central.declared, central.method, central.crc)


def _check_apart(file: FileBytes, extents: list[tuple[int, int, str]]) -> None:
    """Refuses entries that share bytes (one stored gigabyte could stand for thousands)."""
    free = 0
    for start, end, name in sorted(extents):
        if start < free:
            raise UsageError(f"{file.name}: zip entry {shown(name)} overlaps another one; {AGAIN}")
        free = end
