"""Mutations that know the structure of what they damage: JSON, safetensors, zip, pickle by opcode, GGUF, lines, bytes.

Each takes the bytes of a sound file and a source of chance and returns other bytes. Anything at random in a header is
refused at its first check; what reaches deeper is a file of which one thing is wrong, so most of these take a file
apart, change one thing, and put it together again with lengths and checksums that fit.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

CANARY = "benchmarks.faults.canary"
"""A module that notes that it was imported or called: whoever does that runs what a file says."""

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
STRINGS = (
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "/dev/zero",
    "a/../b",
    "./model.safetensors",
    "model.safetensors\u0000",
    "\u001b[31mred",
    "\ud800",
    "x" * 300,
    "é" * 200,
    "model.layers.0.self_attn.q_proj.weight",
    "con\nfig.json",
    "F8_E4M3",
    "BF16",
    "hf",
    "llama",
)
DEEP = 3000


# Bytes and numbers


def flip(data: bytes, chance: random.Random) -> bytes:
    """One bit is another."""
    out = bytearray(data)
    if out:
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def scramble(data: bytes, chance: random.Random) -> bytes:
    """A run is gone, doubled, overwritten or exchanged with noise; or the file is cut, or longer."""
    size = len(data)
    start = chance.randrange(size + 1)
    end = min(size, start + chance.choice((1, 2, 4, 8, 64, 4096)))
    run = data[start:end]
    other = chance.choice((b"", run + run, bytes(len(run)), b"\xff" * len(run), chance.randbytes(len(run))))
    how = chance.randrange(5)
    if how == 0:
        return data[:start]
    if how == 1:
        return data + chance.choice((b"\0", b"\n", run, chance.randbytes(9)))
    return data[:start] + other + data[end:]


def integer(data: bytes, chance: random.Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes anywhere is one of those that go wrong."""
    width = chance.choice((1, 2, 4, 8))
    if len(data) < width:
        return data
    at = chance.randrange(len(data) - width + 1)
    if chance.random() < 0.7:
        at -= at % width
    here = int.from_bytes(data[at : at + width], "little")
    value = chance.choice((*NUMBERS, here + 1, here - 1, here * 2, len(data), len(data) + 1))
    return data[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def raw(data: bytes, chance: random.Random) -> bytes:
    return chance.choice((flip, scramble, integer))(data, chance)


def lines(data: bytes, chance: random.Random) -> bytes:
    """A line is gone, twice there, in another place, cut, or damaged."""
    parts = data.splitlines(keepends=True)
    if not parts or chance.random() < 0.2:
        return raw(data, chance)
    at = chance.randrange(len(parts))
    how = chance.randrange(5)
    if how == 0:
        del parts[at]
    elif how == 1:
        parts.insert(chance.randrange(len(parts) + 1), parts[at])
    elif how == 2:
        parts[at] = raw(parts[at], chance)
    elif how == 3:
        parts[at] = chance.choice(STRINGS).encode("utf-8", "replace") + b"\n"
    else:
        other = chance.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    return b"".join(parts)


# JSON


def value(chance: random.Random, like: Any = None) -> Any:
    """Something in the place of a value: near it, of its type, or of another."""
    if isinstance(like, bool):
        return not like
    if isinstance(like, int) and chance.random() < 0.5:
        return chance.choice((like + 1, like - 1, -like, like * 2, like // 2, 10**5000))
    if isinstance(like, str) and like and chance.random() < 0.3:
        return chance.choice((like[:-1], like + "x", like.upper(), "../" + like, like + "/", like * 50))
    if isinstance(like, list) and like and chance.random() < 0.5:
        return chance.choice((like[:-1], like + like[:1], like[::-1], like * 2))
    return chance.choice(
        (None, True, False, 1.5, 1e308, float("nan"), [], {}, [[]], chance.choice(NUMBERS), chance.choice(STRINGS))
    )


def places(content: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value."""
    found: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def tree(content: Any, chance: random.Random) -> Any:
    """One value of what JSON can hold is another, gone, or under another key; sometimes two."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = places(content)
        if not found:
            return value(chance, content)
        # Shallow places are few, and what they say matters most.
        one, key = chance.choice(found[: max(8, len(found) // 8)] if chance.random() < 0.4 else found)
        how = chance.randrange(6)
        if how == 0:
            del one[key]
        elif how == 1 and isinstance(one, dict):
            one[chance.choice((chance.choice(STRINGS), str(key) + "x", str(key)[:-1]))] = one.pop(key)
        elif how == 2:
            other, at = chance.choice(found)
            one[key] = other[at] if at in other or (isinstance(other, list) and at < len(other)) else None
            if _is_round(content):
                one[key] = None
        else:
            one[key] = value(chance, one[key])
    return content


def _is_round(content: Any) -> bool:
    try:
        json.dumps(content)
    except (ValueError, RecursionError):
        return True
    return False


def dumped(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")


def as_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON file: a value of it, its encoding, or its text is changed."""
    how = chance.random()
    if how < 0.1:
        return raw(data, chance)
    if how < 0.13:
        return chance.choice(
            (b"\xef\xbb\xbf" + data, data.decode("utf-8", "replace").encode("utf-16"), b"[" * DEEP + b"]" * DEEP)
        )
    if how < 0.16:
        start = data.find(b'"')
        end = data.find(b",", start)  # the first entry twice: which of the two counts?
        return data if end < 0 else data[: end + 1] + data[start : end + 1] + data[end + 1 :]
    try:
        return dumped(tree(json.loads(data), chance))
    except ValueError:
        return raw(data, chance)


# safetensors, GGUF


def as_safetensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file: its header's JSON, the header's length, or its bytes are changed."""
    how = chance.random()
    if how < 0.15:
        return raw(data, chance)
    if how < 0.25:
        return integer(data[:8], chance) + data[8:]
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    header = as_json(header.rstrip(b" "), chance) if how < 0.35 else dumped(tree(json.loads(header), chance))
    header += b" " * (-len(header) % 8 if chance.random() < 0.9 else chance.randrange(9))
    return len(header).to_bytes(8, "little") + header + rest


def as_gguf(data: bytes, chance: random.Random) -> bytes:
    """A GGUF file: mostly the counts, lengths and offsets of its header are changed."""
    if chance.random() < 0.3:
        return raw(data, chance)
    head = min(len(data), 2048)
    return integer(data[:head], chance) + data[head:]


# Pickles, by opcode

OPCODES = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}


def _text(word: str) -> bytes:
    data = word.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode("utf-8", "replace") + b"(" + b"".join(arguments) + b"tR"


def _inserted(chance: random.Random) -> bytes:
    """Opcodes that nobody expects: calls of code, numbers without end, things built of nothing."""
    number = chance.choice(NUMBERS)
    return chance.choice(
        (
            _call(CANARY, "touch", b"K\x01"),
            _call("os", "system", _text("true")),
            _call("builtins", "eval", _text(f"__import__('{CANARY}')")),
            _call("builtins", "getattr", _text("x"), _text("__class__")),
            _call("torch", "load", _text("x")),
            _call("collections", "OrderedDict"),
            _call("torch._utils", "_rebuild_tensor_v2", b"NK\x00))\x89N"),
            _call("torch.serialization", "_get_layout", _text("torch.strided")),
            b"\x8a" + bytes([8]) + (number % (1 << 64)).to_bytes(8, "little"),
            b"\x8b" + struct.pack("<i", chance.choice((1 << 16, -1, 2**31 - 1, 5))) + b"\x01" * 5,
            b"I" + b"9" * chance.choice((3, 5000, 100000)) + b"\n",
            b"\x95" + struct.pack("<Q", number % (1 << 64)),
            b"(" * chance.choice((1, 50, DEEP)),
            b"]" * chance.choice((1, 50, DEEP)) + b"a" * chance.choice((0, 49, DEEP - 1)),
            b"\x85" * chance.choice((1, 100, DEEP)),
            b"}" + b"b",
            b"\x81",
            b"0" * chance.choice((1, 3)),
            b"2" * chance.choice((1, 3)),
            b"\x94" * 3,
            b"q" + bytes([chance.randrange(256)]),
            b"h" + bytes([chance.randrange(256)]),
            b"r" + struct.pack("<I", chance.choice((0, 2**31, 2**32 - 1))),
            b"\x82\x01",
            b"Q",
            b"P" + b"storage\n",
            b".",
            b"\x80" + bytes([chance.choice((0, 2, 4, 5, 6, 255))]),
            chance.choice(tuple(OPCODES.values())),
        )
    )


def _argument(code: bytes, chance: random.Random) -> bytes:
    """An opcode with its argument, whose argument is another of the same length or of an honest other one."""
    name, body = code[:1], code[1:]
    if name == b"X":
        try:
            return _text(str(value(chance, body[4:].decode("utf-8", "replace"))))
        except UnicodeEncodeError:
            return _text("x")
    if name == b"K":
        return b"J" + struct.pack("<i", chance.choice((-1, 0, 1, 255, 256, 2**31 - 1, -(2**31))))
    if name in (b"M", b"J"):
        return b"\x8a\x08" + (chance.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little")
    if name == b"c":
        module, _, rest = body.partition(b"\n")
        return (
            b"c"
            + chance.choice((module, b"os", CANARY.encode(), b"torch"))
            + b"\n"
            + chance.choice((rest, b"system\n", b"touch\n"))
        )
    return name + raw(body, chance) if body else chance.choice(tuple(OPCODES.values()))


def opcodes(data: bytes) -> list[bytes]:
    """A pickle (or several, one after another), opcode by opcode with arguments."""
    out: list[bytes] = []
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        starts = [at for _, _, at in pickletools.genops(stream) if at is not None]
        ends = [*starts[1:], stream.tell()]
        out += [data[start:end] for start, end in zip(starts, ends, strict=True)]
        if len(out) > 200_000:
            break
    return out


def as_pickle(data: bytes, chance: random.Random) -> bytes:
    """A pickle: opcodes are gone, doubled, exchanged, added, or have another argument."""
    if chance.random() < 0.05:
        return raw(data, chance)
    try:
        codes = opcodes(data)
    except (ValueError, IndexError, struct.error):
        return raw(data, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(codes))
        how = chance.randrange(6)
        if how == 0:
            del codes[at]
        elif how == 1:
            codes.insert(at, codes[chance.randrange(len(codes))])
        elif how == 2:
            other = chance.randrange(len(codes))
            codes[at], codes[other] = codes[other], codes[at]
        elif how == 3:
            codes.insert(at, _inserted(chance))
        else:
            codes[at] = _argument(codes[at], chance)
        if not codes:
            break
    return b"".join(codes)


def as_legacy(data: bytes, chance: random.Random) -> bytes:
    """A torch file as it was before zip: several pickles, then the bytes of the storages."""
    stream = io.BytesIO(data)
    ends = [0]
    try:
        for _ in range(5):
            pickletools.genops(stream)
            for _ in pickletools.genops(stream):
                pass
            ends.append(stream.tell())
    except (ValueError, IndexError, struct.error):
        pass
    if len(ends) < 3 or chance.random() < 0.2:
        return raw(data, chance)
    at = chance.randrange(len(ends) - 1)
    return data[: ends[at]] + as_pickle(data[ends[at] : ends[at + 1]], chance) + data[ends[at + 1] :]


# Zip


def rebuilt(members: list[tuple[str, bytes]], chance: random.Random, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members, each at a multiple of 64 bytes as torch has them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as made:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            gap = -(out.tell() + 30 + len(name.encode("utf-8", "replace")) + 4) % 64
            info.extra = struct.pack("<HH", 0x4246, gap) + b"Z" * gap if method == zipfile.ZIP_STORED else b""
            made.writestr(info, data)
    return out.getvalue()


def as_zip(data: bytes, chance: random.Random) -> bytes:
    """A torch zip: mostly its pickle is changed; else a member's bytes or name, the directory, the way it is stored."""
    how = chance.random()
    if how < 0.12:
        return raw(data, chance)
    if how < 0.25:  # the directory at the end: offsets, lengths, names, flags
        tail = max(0, len(data) - 22 - chance.choice((0, 76, 1024)))
        return data[:tail] + raw(data[tail:], chance)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as opened:
            members = [(info.filename, opened.read(info)) for info in opened.infolist()]
    except (zipfile.BadZipFile, NotImplementedError, zlib.error):
        return raw(data, chance)
    at = chance.randrange(len(members))
    if how < 0.75:
        at = next((n for n, (name, _) in enumerate(members) if name.endswith("data.pkl")), at)
        members[at] = (members[at][0], as_pickle(members[at][1], chance))
    elif how < 0.85:
        members[at] = (members[at][0], raw(members[at][1], chance))
    elif how < 0.9:
        del members[at]
    elif how < 0.95:
        name = chance.choice((members[chance.randrange(len(members))][0], "../x", "archive/data/0", "x" * 60000, ""))
        members[at] = (name, members[at][1])
    else:
        members.append(members[at])
    method = zipfile.ZIP_DEFLATED if chance.random() < 0.02 else zipfile.ZIP_STORED
    try:
        return rebuilt(members, chance, method)
    except (ValueError, struct.error, UnicodeEncodeError):
        return raw(data, chance)


def by_content(data: bytes) -> Mutation:
    """The mutation that knows what these bytes are."""
    start = data[:64].lstrip()
    if data[:4] == b"PK\3\4":
        return as_zip
    if data[:4] == b"GGUF":
        return as_gguf
    if start[:1] in (b"{", b"["):
        return as_json
    if len(data) > 9 and data[8:9] == b"{":
        return as_safetensors
    if data[:1] == b"\x80":
        return as_pickle if data.find(pickle.STOP) == len(data) - 1 else as_legacy
    try:
        data[:4096].decode()
    except UnicodeDecodeError:
        return raw
    return lines
