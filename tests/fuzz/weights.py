"""Safetensors files: broken ones, and whole ones that hold something else than they did."""

import json
import random

from tests.fuzz import mutations

OTHERS = ("F64", "I8", "I32", "U8", "F8_E4M3", "F8_E5M2", "BOOL", "I64", "U16", "F32", "F16", "BF16", "F4", "C64")
WIDTHS = (("F32", "I32", "U32"), ("F16", "BF16", "I16", "U16"), ("U8", "I8", "F8_E4M3", "F8_E8M0", "BOOL"), ("F64", "I64"))


def split(content: bytes) -> tuple[dict, bytes]:
    """Header and rest of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def broken(rng: random.Random, content: bytes) -> bytes:
    """The file with other bytes anywhere, or another header over the same tensors."""
    if rng.random() < 0.3:
        return mutations.binary(rng, content)
    header, rest = split(content)
    for entry in header.values():
        if rng.random() < 0.1 and "dtype" in entry:
            entry["dtype"] = rng.choice(OTHERS)
    header = mutations.json_bytes(rng, header)
    length = len(header) if rng.random() < 0.9 else rng.choice(mutations.ODD_NUMBERS[:14]) & (2**64 - 1)
    return length.to_bytes(8, "little") + header + rest


def near(rng: random.Random, content: bytes) -> bytes:
    """A whole file in which one or two tensors have other values, or another type, shape, size or name."""
    header, rest = split(content)
    header.pop("__metadata__", None)
    held = {name: (each["dtype"], each["shape"], rest[slice(*each["data_offsets"])]) for name, each in header.items()}
    for _ in range(rng.choice((1, 1, 2))):
        name, other = rng.choice(list(held)), rng.choice(list(held))
        kind, shape, data = held[name]
        match rng.randrange(9):
            case 0:
                kind = rng.choice(next(each for each in WIDTHS if kind in each))
            case 1:
                shape = rng.choice((shape[::-1], [1, *shape], [*shape, 1]))
            case 2 if shape and shape[0]:
                shape, data = [shape[0] - 1, *shape[1:]], data[: len(data) // shape[0] * (shape[0] - 1)]
            case 3:
                held[other], (kind, shape, data) = held[name], held[other]
            case 4:
                held[f"{name}.other"] = held[name]
            case 5:
                data = rng.randbytes(len(data))
            case _ if data:  # the values of a few neighbours
                at = rng.randrange(len(data))
                size = min(len(data) - at, rng.choice((1, 2, 4, 64)))
                data = data[:at] + rng.randbytes(size) + data[at + size :]
        held[name] = (kind, shape, data)
    return _joined(held)


def _joined(held: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """The file of these tensors."""
    header, end = {}, 0
    for name, (kind, shape, data) in held.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(data for _, _, data in held.values())


def changed(rng: random.Random, content: bytes) -> bytes:
    """One or the other."""
    return rng.choice((broken, near))(rng, content)
