"""GGUF's quantized blocks, decoded one number at a time as ggml defines them: what faster code is checked against."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from gguf import GGMLQuantizationType as Kind

# Where the float16 scales of a block lie.
SCALES: dict[Kind, tuple[int, ...]] = {
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,),
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
}  # fmt: skip


def decode_block(raw: bytes, kind: Kind) -> list[float]:
    """The 32 or 256 numbers of one block."""
    scales = [struct.unpack_from("<e", raw, at)[0] for at in SCALES[kind]]
    if kind is Kind.Q8_0:
        return [scales[0] * value for value in struct.unpack_from("<32b", raw, 2)]
    if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        return list(_small(raw, kind, scales))
    return list({Kind.Q2_K: _q2, Kind.Q3_K: _q3, Kind.Q6_K: _q6}.get(kind, _q4_or_q5)(raw, scales))


def _small(raw: bytes, kind: Kind, scales: list[float]) -> Iterator[float]:
    fifth = int.from_bytes(raw[-20:-16], "little") if kind in (Kind.Q5_0, Kind.Q5_1) else None
    for at in range(32):
        value = raw[-16 + at % 16] >> (4 if at >= 16 else 0) & 15
        if fifth is not None:
            value |= (fifth >> at & 1) << 4
        if len(scales) == 2:
            yield value * scales[0] + scales[1]
        else:
            yield (value - (8 if fifth is None else 16)) * scales[0]


def _q2(raw: bytes, scales: list[float]) -> Iterator[float]:
    for at in range(256):
        half, pair, inside = at // 128, at % 128 // 32, at % 32
        value = raw[16 + 32 * half + inside] >> 2 * pair & 3
        packed = raw[at // 16]
        yield scales[0] * (packed & 15) * value - scales[1] * (packed >> 4)


def _q3(raw: bytes, scales: list[float]) -> Iterator[float]:
    mask, low, packed = raw[:32], raw[32:96], raw[96:108]
    for at in range(256):
        half, pair, inside, group = at // 128, at % 128 // 32, at % 32, at // 16
        value = low[32 * half + inside] >> 2 * pair & 3
        if not mask[inside] >> (4 * half + pair) & 1:
            value -= 4
        lower = packed[group] & 15 if group < 8 else packed[group - 8] >> 4
        upper = packed[8 + group % 4] >> 2 * (group // 4) & 3
        yield scales[0] * ((lower | upper << 4) - 32) * value


def _q4_or_q5(raw: bytes, scales: list[float]) -> Iterator[float]:
    packed, low = raw[4:16], raw[-128:]
    fifth = raw[16:48] if len(raw) == 176 else None
    for at in range(256):
        group, inside = at // 32, at % 32
        if group < 4:
            scale, least = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            least = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        value = low[32 * (group // 2) + inside] >> 4 * (group % 2) & 15
        if fifth is not None:
            value |= (fifth[inside] >> group & 1) << 4
        yield scales[0] * scale * value - scales[1] * least


def _q6(raw: bytes, scales: list[float]) -> Iterator[float]:
    low, high = raw[:128], raw[128:192]
    packed = struct.unpack_from("<16b", raw, 192)
    for at in range(256):
        half, quarter, inside = at // 128, at % 128 // 32, at % 32
        value = low[64 * half + 32 * (quarter % 2) + inside] >> 4 * (quarter // 2) & 15
        value |= (high[32 * half + inside] >> 2 * quarter & 3) << 4
        yield scales[0] * packed[at // 16] * (value - 32)
