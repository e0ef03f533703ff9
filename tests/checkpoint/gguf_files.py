"""GGUF files for tests, written from the format's description."""

import struct

import numpy as np

KINDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30,
}  # fmt: skip
BLOCKS = {  # values and bytes
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}  # fmt: skip
NUMBERS = {"<u1": 0, "<i1": 1, "<u2": 2, "<i2": 3, "<u4": 4, "<i4": 5, "<f4": 6, "|b1": 7} | {
    "<u8": 10, "<i8": 11, "<f8": 12, "|u1": 0, "|i1": 1
}  # fmt: skip


def text(value):
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def typed(value):
    """The kind of a value of metadata, and its bytes."""
    if isinstance(value, str):
        return 8, text(value)
    if isinstance(value, list):  # of strings, of lists, or of Python numbers
        if not value or isinstance(value[0], str | bytes | list):
            parts = [(8, text(one)) if isinstance(one, bytes) else typed(one) for one in value]
            inner = parts[0][0] if parts else 8
            body = b"".join(body for _, body in parts)
            return 9, struct.pack("<IQ", inner, len(parts)) + body
        value = np.array(value)
        value = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
    if isinstance(value, np.ndarray):
        head = struct.pack("<IQ", NUMBERS[value.dtype.str], value.size)
        return 9, head + value.tobytes()
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (
            (4, struct.pack("<I", value))
            if 0 <= value < 1 << 32
            else (11, struct.pack("<q", value))
        )
    return 6, struct.pack("<f", value)


def packed(metadata, tensors, version=3, alignment=32):
    """A GGUF file. A tensor is a float array, or (kind, shape, bytes)."""
    head, body = b"", b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(tensor.dtype)]
            tensor = kind, tensor.shape, tensor.tobytes()
        kind, shape, data = tensor
        body += bytes(-len(body) % alignment)
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", KINDS.get(kind, kind), len(body))
        body += data
    pairs = b""
    for key, value in metadata.items():
        kind, data = typed(value)
        pairs += text(key) + struct.pack("<I", kind) + data
    front = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + pairs + head
    return front + bytes(-len(front) % alignment) + body if tensors else front


def blocks(kind, count, seed=0):
    """Random blocks of a kind, whose scales are ordinary numbers."""
    _, size = BLOCKS[kind]
    draw = np.random.default_rng(seed)
    found = draw.integers(0, 256, (count, size), dtype=np.uint8)
    for at in SCALES[kind]:
        found[:, at : at + 2] = draw.normal(size=(count, 1)).astype("<f2").view(np.uint8)
    return found


SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
