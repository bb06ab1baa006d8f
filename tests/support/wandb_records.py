"""What W&B recorded offline, read from its files."""

import struct


def records(folder):
    """The records of each offline run of a folder, oldest run first: a list of lists."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, whole, found = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB; checksum, length and kind before each piece
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):  # whole, or the last piece
                found.append(Record.FromString(whole))
                whole = b""
        runs.append(found)
    return runs
