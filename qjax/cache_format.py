"""Formats of a decoder's cache of keys and values: what a recipe says after `kv:`, as data. No JAX.

    kv:int4-g32                           KIVI: keys in groups of 32 tokens of one channel, values in groups of 32 channels of
                                          one token; the newest tokens stay in 16 bits, residual=128 of them
    kv:int8-token, kv:fp8_e4m3-token      a scale for every token of a head, and a minimum with integers; no tokens in 16 bits
    kv:int2-g32(residual=32,keys=before)  options: tokens in 16 bits; keys as they are before the rotary map, which they then
                                          go through when they are read, rather than after it
    kv:int4-token(hadamard=true)          keys and queries through a Hadamard matrix of a head's size first (QuaRot), which
                                          changes no score; what `hadamard` in the same recipe means too

Integers are asymmetric, value = code * scale + minimum with scale = (max - min) / (2^b - 1), both float16; floats have a
float32 scale = max / largest. What a token sees in 16 bits depends on its position alone, however a text is divided into calls,
and is what KIVI's code has at a step of decoding (there a prompt's own tokens see each other unrounded): token t, from 0, sees

    keys in groups     those before residual * floor(t / residual) rounded: a whole residual is rounded at once
    all else           those before t - residual rounded; without a residual, itself too

so a residual of groups is a multiple of the group's tokens and of 8, which fill whole bytes.

KIVI: Liu et al. 2024 (arXiv 2402.02750); per token: QuaRot, Ashkboos et al. 2024 (2404.00456); keys before the rotary map:
KVQuant, Hooper et al. 2024 (2401.18079).
"""

import dataclasses
import functools
import math
import re
from fractions import Fraction

from qjax.errors import QjaxError
from qjax.hadamard import require_order

FLOATS = ("fp8_e4m3", "fp8_e5m2")
KEYS = ("after", "before")
RESIDUAL = 128  # tokens; KIVI's
HALF = 2  # bytes
EXPECTED = (
    "expected int2 ... int8 with -token or -gN, or fp8_e4m3-token, and as options residual=TOKENS, keys=after or keys=before, "
    "hadamard=true with keys=after; for example kv:int4-g32 or kv:int8-token"
)


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How keys and values are kept; build it with `parse_cache_format`, print its name with `str`.

    group: of KIVI's groups, tokens of a key's channel and channels of a value's token; None: each token of a head is a group.
    residual: tokens in 16 bits. keys: "after" the rotary map, or "before" it. hadamard: keys and queries are rotated.
    """

    grid: str
    group: int | None
    residual: int
    keys: str = "after"
    hadamard: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.grid in FLOATS else int(self.grid.removeprefix("int"))

    def group_of_values(self, head_dim: int) -> int:
        """Channels that share a scale: those of a whole head where it has no more."""
        return head_dim if self.group is None else min(self.group, head_dim)

    def bytes_per_token(self, kv_heads: int, head_dim: int) -> float:
        """Exact bytes of the keys and values of a token in one layer, rounded: codes, scales and minima."""
        parameters = 4  # bytes of a group: two float16, or one float32
        by_channel = Fraction(head_dim * self.bits, 8) + Fraction(head_dim * parameters, self.group or 1)
        by_token = _packed(head_dim, self.bits) + head_dim // self.group_of_values(head_dim) * parameters
        return float(kv_heads * ((by_token if self.group is None else by_channel) + by_token))

    def window_bytes(self, kv_heads: int, head_dim: int) -> int:
        """Exact bytes of what one layer holds in 16 bits besides, of a text."""
        return 2 * kv_heads * self.residual * head_dim * HALF

    def __str__(self) -> str:
        sharing = "token" if self.group is None else f"g{self.group}"
        usual = 0 if self.group is None else RESIDUAL
        options = [f"residual={self.residual}"] if self.residual != usual else []
        options += [f"keys={self.keys}"] if self.keys != "after" else []
        options += ["hadamard=true"] if self.hadamard else []
        return f"{self.grid}-{sharing}" + (f"({','.join(options)})" if options else "")


def _packed(codes: int, bits: int) -> int:
    """Bytes of codes in whole units (`packing.py`)."""
    unit = 8 // math.gcd(8, bits)
    return -(-codes // unit) * unit * bits // 8


@functools.lru_cache(maxsize=64)
def parse_cache_format(text: str) -> CacheFormat:
    """The cache format named `text`, for example "int4-g32(residual=64)"; raises QjaxError that says what is allowed."""
    where = f"cache format {text!r}"
    found = re.fullmatch(r"\s*(\w+)-(token|g[1-9]\d{0,5})\s*(?:\(([^()]*)\))?\s*", text.lower())
    grid = {"fp8": "fp8_e4m3"}.get(found[1], found[1]) if found else ""
    if not found or not (re.fullmatch(r"int[2-8]", grid) or (grid in FLOATS and found[2] == "token")):
        raise QjaxError(f"{where}: {EXPECTED}")
    group = None if found[2] == "token" else int(found[2][1:])
    options = dict.fromkeys(("residual", "keys", "hadamard"))
    for item in filter(None, (part.strip() for part in (found[3] or "").split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in options or options[name] is not None:
            raise QjaxError(f"{where}: {item!r} is no option, or given twice; {EXPECTED}")
        options[name] = value
    usual = {"residual": 0 if group is None else RESIDUAL, "keys": "after"}
    residual, keys = (default if options[name] is None else options[name] for name, default in usual.items())
    turned = {None: False, "false": False, "true": True}.get(options["hadamard"])
    if not re.fullmatch(r"\d{1,7}", str(residual)) or keys not in KEYS or turned is None or (turned and keys == "before"):
        raise QjaxError(f"{where}: {EXPECTED}")
    result = CacheFormat(grid, group, int(residual), keys, turned)
    unit = math.lcm(group, 8) if group else 1
    if result.residual % unit or (group and not result.residual):
        raise QjaxError(
            f"{where}: a residual of {residual} tokens; keys leave it in whole groups of {group} tokens and whole bytes, give "
            f"a multiple of {unit}"
        )
    return result


def require_fit(cache: CacheFormat, head_dim: int) -> None:
    """Raises QjaxError for groups that do not divide a head's channels, and a Hadamard matrix that is not known."""
    if cache.hadamard:
        require_order(head_dim, f"kv:{cache}: a head")
    if head_dim % cache.group_of_values(head_dim):
        sizes = [size for size in range(2, head_dim + 1) if head_dim % size == 0]
        nearest = min(sizes, key=lambda size: abs(size - cache.group))
        raise QjaxError(
            f"kv:{cache}: values are grouped within a head, whose {head_dim} channels {cache.group} does not divide; take "
            f"g{nearest}, or -token"
        )
