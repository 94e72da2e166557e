"""What tests/fuzz.py does to files: damage to bytes, JSON, zip archives, pickles and the metadata
of torch.distributed.checkpoint.
"""

import copy
import io
import json
import pickle
import pickletools
import struct
import zipfile

NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    1 << 15,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 40,
    (1 << 60) - 1,
    1 << 60,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]


def number(rng):
    return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randrange(-300, 300)


# Bytes -------------------------------------------------------------------------------------------


def place(rng, data):
    """Mostly near the ends, where formats keep what they need."""
    n = max(1, len(data))
    return rng.choice(
        (rng.randrange(n), rng.randrange(min(n, 400)), n - 1 - rng.randrange(min(n, 400)))
    )


def damage(rng, data, other=b""):
    at, way = place(rng, data), rng.randrange(9)
    if way == 0:
        return (
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"x"
        )
    if way == 1:
        size = rng.choice((1, 2, 8, 64))
        return (
            data[:at]
            + rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
            + data[at + size :]
        )
    if way == 2:
        return data[: rng.choice((at, len(data) - 1, 0, 8))]
    if way == 3:
        return data + rng.choice((b"\0", b" ", rng.randbytes(50), data, bytes(4096)))
    if way == 4:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if way == 5:
        return data[:at] + data[at + rng.choice((1, 4, 8, 100)) :]
    if way == 6:
        return data[:at] + other[rng.choice((at, place(rng, other))) :]
    if way == 7:
        back = rng.randrange(1, 200)
        return data[:at] + data[max(0, at - back) : at] + data[at:]
    return set_number(rng, data, rng.choice((at, at & ~7, 0)), rng.choice((2, 4, 8)))


def set_number(rng, data, at, size):
    value = number(rng) & ((1 << 8 * size) - 1)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


# JSON --------------------------------------------------------------------------------------------


class Object(list):
    """A JSON object as pairs, so that names may occur twice."""


class Raw(str):
    """JSON text as it is."""


ODD = [
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J",
    "\ud800",
    "__proto__",
    "F8_E4M3",
    "model-1.safetensors",
    "x" * 5000,
    "F32",
    "BF16",
    "deltas",
]
RAW = [
    "NaN",
    "-Infinity",
    "1e999",
    "1" * 5000,
    "[" * 3000 + "]" * 3000,
    "-0",
    "1.5",
    "1e2",
    '{"a":1,"a":2}',
    "true",
    "null",
]


def dumps(node):
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Object):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(dumps, node)) + "]"
    return json.dumps(node)


def strange(rng, old):
    way = rng.randrange(7)
    if way == 0:
        return number(rng)
    if way == 1:
        return rng.choice(ODD)
    if way == 2:
        return Raw(rng.choice(RAW))
    if way == 3:
        return rng.choice((None, True, False, [], Object(), [old], [[]], Object([("a", old)])))
    if isinstance(old, int):
        return old + rng.choice((-1, 1, 8, 1 << 32, -2 * old))
    if isinstance(old, str) and old:
        return rng.choice((old[:-1], old + "x", old.upper(), old * 2))
    return [old, old] if not isinstance(old, list) else old[:-1] if rng.random() < 0.5 else old * 2


def containers(node):
    """Every object and list in a tree; nothing that is nested too deeply."""
    found, todo = [], [node]
    while todo:
        inner = todo.pop()
        if isinstance(inner, list):
            found.append(inner)
            todo += [v for _, v in inner] if isinstance(inner, Object) else inner
    return found


def change_json(rng, root):
    filled = [c for c in containers(root) if c]
    if not filled:
        return strange(rng, root)
    inner = rng.choice(filled)
    k, way = rng.randrange(len(inner)), rng.randrange(6)
    if way == 0:
        del inner[k]
    elif way == 1:
        inner.insert(rng.randrange(len(inner) + 1), copy.deepcopy(inner[k]))
    elif way == 2 and isinstance(inner, Object):
        inner[k] = (rng.choice([*ODD, inner[k][0] + "x", inner[0][0]]), inner[k][1])
    elif way == 3:
        j = rng.randrange(len(inner))
        inner[k], inner[j] = inner[j], inner[k]
    elif isinstance(inner, Object):
        name, old = inner[k]
        # JSON inside a text
        inside = isinstance(old, str) and old[:1] in "{[" and old and rng.random() < 0.9
        inner[k] = (
            name,
            (
                damage_json(rng, old.encode()).decode("utf-8", "replace")
                if inside
                else strange(rng, old)
            ),
        )
    else:
        inner[k] = strange(rng, inner[k])
    return root


def damage_json(rng, data):
    try:
        root = json.loads(data, object_pairs_hook=Object)
    except (ValueError, RecursionError):
        return damage(rng, data)
    return dumps(change_json(rng, root)).encode("utf-8", "surrogatepass")


def patch_header(rng, data):
    """The JSON header of a safetensors file, with the length that it then has, or another."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.1:
        return set_number(rng, data, 0, 8)
    text = damage_json(rng, text) if rng.random() < 0.85 else damage(rng, text)
    if rng.random() < 0.5 and len(text) < length <= len(data):
        text = text.ljust(length)
    return len(text).to_bytes(8, "little") + text + rest


# Zip archives ------------------------------------------------------------------------------------

#: (offset, size) of the fields of a directory's entry, of a record's own header, and of the
#: directory's end
CENTRAL = [
    (4, 2),
    (6, 2),
    (8, 2),
    (10, 2),
    (16, 4),
    (20, 4),
    (24, 4),
    (28, 2),
    (30, 2),
    (32, 2),
    (36, 2),
    (42, 4),
    (46, 1),
]
LOCAL = [(0, 4), (4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 1)]
END = [(4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)]


def found(data, signature):
    at, places = data.find(signature), []
    while at >= 0:
        places.append(at)
        at = data.find(signature, at + 1)
    return places


def damage_zip(rng, data):
    if rng.random() < 0.45:
        signature, fields = rng.choice(
            ((b"PK\1\2", CENTRAL), (b"PK\1\2", CENTRAL), (b"PK\3\4", LOCAL), (b"PK\5\6", END))
        )
        if not (places := found(data, signature)):
            return damage(rng, data)
        at, size = rng.choice(fields)
        at += rng.choice(places)
        if rng.random() < 0.5:
            return set_number(rng, data, at, size)
        old = int.from_bytes(data[at : at + size], "little") + rng.choice(
            (-64, -4, -1, 1, 4, 64, 8)
        )
        return (
            data[:at] + (old & ((1 << 8 * size) - 1)).to_bytes(size, "little") + data[at + size :]
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(r.filename, archive.read(r)) for r in archive.infolist()]
    except Exception:
        return damage(rng, data)
    if not records:
        return damage(rng, data)
    k, kinds = rng.randrange(len(records)), {}
    pickles = [i for i, (name, _) in enumerate(records) if name.endswith(".pkl")]
    way = rng.choice((0, 0, 0, 0, 1, 2, 3, 4, 5))
    if way == 0 and pickles:
        records[pickles[0]] = (records[pickles[0]][0], damage_pickle(rng, records[pickles[0]][1]))
    elif way == 1:
        records[k] = (records[k][0], damage(rng, records[k][1]))
    elif way == 2:
        name = records[k][0]
        records[k] = (
            rng.choice(
                (
                    name + "x",
                    name.upper(),
                    "../" + name,
                    "/" + name,
                    records[0][0],
                    name.replace("0", "1"),
                    "x\x1b[2J/" + name,
                )
            ),
            records[k][1],
        )
    elif way == 3:
        records.insert(rng.randrange(len(records)), (records[k][0], rng.choice(records)[1]))
    elif way == 4:
        kinds[k] = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    else:
        j = rng.randrange(len(records))
        records[k], records[j] = (records[k][0], records[j][1]), (records[j][0], records[k][1])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for i, (name, content) in enumerate(records):
            archive.NameToInfo.clear()  # it would warn of names that occur twice
            archive.writestr(zipfile.ZipInfo(name), content, kinds.get(i, zipfile.ZIP_STORED))
    return out.getvalue()


# Pickles -----------------------------------------------------------------------------------------

NAMES = [
    "os system", "posix system", "builtins exec", "builtins eval", "builtins print",
    "builtins getattr", "builtins set", "builtins bytearray", "builtins complex",
    "collections OrderedDict", "collections Counter", "torch Tensor", "torch FloatTensor",
    "torch.sparse FloatTensor", "torch Size", "torch device", "torch.nn.parameter Parameter",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_nested_tensor",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state",
    "torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_device_tensor_from_numpy", "torch._tensor _rebuild_from_type_v2",
    "torch float16", "torch float64", "torch quint8", "torch complex64", "torch FloatStorage",
    "torch DoubleStorage", "torch ByteStorage", "torch.storage UntypedStorage",
    "torch.storage TypedStorage", "argparse Namespace", "_codecs encode",
    "torch.serialization _get_layout", "pathlib PosixPath", "a\x1b[2J b",
    "torch.distributed.checkpoint.metadata ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata TensorProperties", "copyreg _reconstructor",
    "copyreg __newobj__", "copy_reg _reconstructor", "__builtin__ getattr", "builtins dict",
    "collections defaultdict", "collections deque", "functools partial", "some.module Class",
    "torch.distributed.tensor DTensor", "numpy._core.multiarray _reconstruct",
]  # fmt: skip
LAUGHS = b")" + b"".join(
    b"r" + struct.pack("<I", 900 + k) + b"j" + struct.pack("<I", 900 + k) + b"\x86"
    for k in range(45)
)
RUNS = [
    b"cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85R",
    b"cbuiltins\nprint\nX\x06\x00\x00\x00canary\x85R",
]
RUNS += [
    b"cbuiltins\nexec\nX\x13\x00\x00\x00open('canary', 'w+')\x85R",
    b"cposix\nsystem\nX\x0c\x00\x00\x00touch canary\x85R",
]
DEEP = b"]" * 2000 + b"a" * 1999
BITS = [
    b"N",
    b"\x88",
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"b",
    b"s",
    b"u",
    b"a",
    b"e",
    b"Q",
    b"\x81",
    b"0",
    b"2",
    b"1",
    b"l",
    b"d",
    b"o",
    b"ios\nsystem\n",
    b"\x8f",
    b"\x90",
    b"\x91",
    b"\x92",
    b"\x93",
    b"g0\n",
    b"p7\n",
    b".",
]
#: numbers and texts as lines, and with long lengths
LINES = [
    b"I7\n", b"I01\n", b"L7L\n", b"L" + b"9" * 5000 + b"L\n", b"F1.5\n", b"F1e999\n", b"Fnan\n",
    b"S'x'\n", b"S'x\n", b"S'\\x'\n", b"V\\ud800\n", b"V\\u12\n", b"U\1\xff", b"T\1\0\0\0x",
    b"g-1\n", b"p99999999999999999999\n", b"p" + b"9" * 5000 + b"\n", b"\x8b\2\0\0\0ab",
    b"\x8b\xff\xff\xff\xffab", b"\x96\2" + bytes(7) + b"ab",
]  # fmt: skip


def gadget(rng):
    way = rng.randrange(13)
    if way == 12:
        return rng.choice(LINES) + rng.choice((b"", b"0"))
    if way == 0:
        return rng.choice(RUNS) + rng.choice((b"", b"0"))
    if way == 1:
        return b"}" + LAUGHS + b"Ns" + rng.choice((b"", b"0"))
    if way == 2:
        return rng.choice((b"j", b"r")) + struct.pack("<I", number(rng) & 0xFFFFFFFF)
    if way == 3:
        return rng.choice((b"h", b"q")) + bytes([rng.randrange(40)])
    if way == 4:
        return large(rng)
    if way == 5:
        return rng.choice((b"X", b"B", b"T")) + struct.pack("<I", number(rng) & 0xFFFFFFFF)
    if way == 6:
        return rng.choice((b"\x8d", b"\x8e", b"\x95", b"\x96")) + struct.pack(
            "<Q", number(rng) & (1 << 64) - 1
        )
    if way == 7:
        return name(rng) + rng.choice(
            (large(rng) + b"\x85R", b")R", b"h" + bytes([rng.randrange(40)]) + b"\x85R", b"")
        )
    if way == 8:
        return rng.choice((DEEP, b"(" * 500, LAUGHS))
    return rng.choice(BITS)


def large(rng):
    data = number(rng).to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(rng):
    module, _, what = rng.choice(NAMES).partition(" ")
    return f"c{module}\n{what}\n".encode()


def instructions(data):
    """Byte ranges of the instructions of all pickles that follow each other in the data; and where
    the last ends.
    """
    spans, stream = [], io.BytesIO(data)
    try:
        while len(spans) < 100_000:
            begin, last = stream.tell(), None
            for _, _, at in pickletools.genops(stream):
                if last is not None:
                    spans.append((last, at))
                last = at
            spans.append((last, stream.tell()))
            if stream.tell() == begin:
                break
    except Exception:  # what follows is no pickle
        pass
    return spans


def damage_pickle(rng, data):
    spans = instructions(data)
    if not spans:
        return damage(rng, data)
    begin, end = rng.choice(spans)
    op, way = data[begin : begin + 1], rng.randrange(9)
    if way == 0:
        return data[:begin] + gadget(rng) + data[begin:]
    if way == 1:
        return data[:begin] + gadget(rng) + data[end:]
    if way == 2:
        return data[:begin] + data[end:]
    if way == 3:
        return data[:end] + data[begin:end] + data[end:]
    if way == 4:
        other = rng.choice(spans)
        return data[:begin] + data[other[0] : other[1]] + data[end:]
    if way == 5 and (names := [s for s in spans if data[s[0] : s[0] + 1] == b"c"]):
        begin, end = rng.choice(names)
        return data[:begin] + name(rng) + data[end:]
    if way == 6 and (
        numbers := [s for s in spans if data[s[0] : s[0] + 1] in (b"J", b"K", b"M", b"\x8a")]
    ):
        begin, end = rng.choice(numbers)
        return (
            data[:begin]
            + (large(rng) if rng.random() < 0.5 else b"K" + bytes([rng.randrange(8)]))
            + data[end:]
        )
    if op in b"XU\x8c" and rng.random() < 0.5:
        text = rng.choice(ODD).encode("utf-8", "surrogatepass")
        return data[:begin] + b"X" + struct.pack("<I", len(text)) + text + data[end:]
    at = rng.randrange(begin, end)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


# Metadata of torch.distributed.checkpoint --------------------------------------------------------


def damage_metadata(rng, data):
    """An object of it changed. Of our own files only: this unpickles them."""
    metadata = pickle.loads(data)
    change_metadata(rng, metadata)
    return pickle.dumps(metadata, protocol=rng.choice((2, 4)))


def change_metadata(rng, metadata):
    names, way = list(metadata.state_dict_metadata), rng.randrange(8)
    key = rng.choice(names)
    tensor, place_ = (
        metadata.state_dict_metadata[key],
        rng.choice(list(metadata.storage_data.values())),
    )
    if way == 0:
        place_.relative_path = rng.choice(
            [*ODD[:8], ".metadata", "__0_1.distcp", 3, None, ("a",) * 3]
        )
    elif way == 1:
        place_.offset = rng.choice((number(rng), place_.offset + 1, "x", None))
    elif way == 2:
        place_.length = rng.choice((number(rng), place_.length - 1, place_.length + 1, 0))
    elif way == 3 and hasattr(tensor, "chunks"):
        chunk = rng.choice(tensor.chunks)
        which = rng.choice(("offsets", "sizes"))
        setattr(
            chunk,
            which,
            tuple(rng.choice((number(rng), v)) for v in getattr(chunk, which))
            + rng.choice(((), (), (1,))),
        )
    elif way == 4 and hasattr(tensor, "chunks"):
        tensor.chunks = rng.choice(([], tensor.chunks * 2, [None], 3))
    elif way == 5 and hasattr(tensor, "size"):
        tensor.size = rng.choice(
            (
                (*tensor.size, number(rng)),
                tuple(tensor.size)[:-1],
                (1 << 40,) * 3,
                [3, 5],
                None,
                (2,) * 100,
            )
        )
    elif way == 6:
        other = rng.choice(names)
        metadata.state_dict_metadata[key] = metadata.state_dict_metadata[other]
        metadata.planner_data = rng.choice(
            (
                None,
                {key: (other,)},
                {n: ("a", n) for n in names},
                dict.fromkeys(names, ("same",)),
                {key: ("a",) * 5000},
            )
        )
    else:
        metadata.storage_data = rng.choice(
            ({}, None, dict(list(metadata.storage_data.items())[1:]), {3: place_})
        )
