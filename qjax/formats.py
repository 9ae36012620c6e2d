"""Number formats as data, and the grammar of their names.

A format says which values a code can stand for and which weights share a scale:

    int4-g128        affine (zero point) 4-bit integers, groups of 128 along the input axis, float16 scales
    int4-g128-sym    symmetric: codes -8..7, scale = max|w| / 7.5, so that the outermost cell ends at max|w| (bound `edge`)
    int4-g128-sym-max    symmetric with scale = max|w| / 7 (bound `max`: the outermost code is max|w| itself)
    nf4-g64-dq       NormalFloat4, float32 scales that are quantized in turn to 8 bits in blocks of 256
    nf4-b64          blocks of 64 over the flattened weight, the layout of bitsandbytes
    fp8_e4m3-channel one scale per output channel; `tensor` is one scale for all
    int2-g32-sym-full    symmetric with levels -2..1 times a scale that may be negative: the group's outermost weight is -2
    int3-g64-z16     affine with real zero points, stored as float16 (or z32)
    int4-g32-m16     affine with minima instead of zero points, stored as float16: GGUF's Q4_1; its K-quants are int4-g32-k6m-k6
                     (Q4_K, scales k6 and minima k6m in super-blocks: read from files, not rounded to),
                     int6-g16-sym-full-k8s (Q6_K) and so on; iq4_nl-g32-fp16 is IQ4_NL
    int3-g128-bf16   scales stored as bfloat16 (or fp16, fp32)
    mxfp4            fp4_e2m1-g32-e8m0: scales are powers of two; mxfp4_ceil, mxfp4_even: by another rule (`scales.py`)
    nvfp4            fp4_e2m1-g16-e4m3: scales are 8-bit floats times one float32
    bf16             no codes at all: the weight in another floating-point type
    int4, nf4, fp8   a grid alone has the group that is usual: integers g128, 4-bit codebooks g64, FP8 channel

Order of the parts: grid, granularity, then in any order sym, the bound, how zeros and scales are stored. `str(format)` is
canonical: parts that are the grid's default are left out. Bound and tie rule are part of a format because they change 2- and
3-bit results a lot: integers round half to even; NF4 and bitsandbytes' FP4 ties go to the smaller value, as in bitsandbytes'
CPU library; FP4-E2M1 and FP8 ties go to the even code (OCP MX specification 1.0, 2023).

NF4: Dettmers et al. 2023 (arXiv 2305.14314); FP8: Micikevicius et al. 2022 (2209.05433); full-range symmetric integers: the
code of AutoRound (Cheng et al. 2023, 2309.05516).
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Collection, Sequence

from qjax import words
from qjax.codebooks import Codebook, codebooks, middle_codebook
from qjax.errors import QjaxError
from qjax.file_scales import SCALES
from qjax.scales import Floats, packed_rows
from qjax.zeros import ZEROS, Zeros

BOUNDS = ("max", "edge", "full")
REAL_ZEROS = tuple(name for name, codec in ZEROS.items() if not codec.whole)
FLOATS = {"fp32": 32, "bf16": 16, "fp16": 16}
INTEGERS = {f"int{bits}": bits for bits in range(1, 9)}

GRIDS = {  # name -> bits of a code
    **INTEGERS,
    "nf4": 4,
    "fp4_e2m1": 4,
    "fp4_bnb": 4,
    "iq4_nl": 4,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    **FLOATS,
}
MICROSCALING = {"mxfp4": "fp4_e2m1", "mxfp8_e4m3": "fp8_e4m3", "mxfp8_e5m2": "fp8_e5m2"}
UNQUANTIZED = "none"  # the recipe of a model as it is
ALIASES = {  # what a name stands for
    "fp4": "fp4_e2m1",
    "fp8": "fp8_e4m3",
    "mxfp8": "fp8_e4m3-g32-e8m0",
    **{f"{name}{rule}": f"{grid}-g32-e8m0{rule}" for name, grid in MICROSCALING.items() for rule in ("", "_ceil", "_even")},
    "nvfp4": "fp4_e2m1-g16-e4m3",
}
SHORT = {text: name for name, text in ALIASES.items() if "-" in text}  # and which of them are printed
DEFAULT_GRANULARITY = {
    **dict.fromkeys(INTEGERS, "g128"),  # of GPTQ's and AWQ's checkpoints
    **dict.fromkeys(("nf4", "fp4_e2m1", "fp4_bnb"), "g64"),  # the block of QLoRA
    "iq4_nl": "g32",
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), "channel"),
}


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format; build it with `parse_format`, print its name with `str`.

    granularity: "tensor" | "channel" | "group" (of `group` weights along the input axis) | "flat" (of `group` weights over
    the flattened weight, output channel after output channel) | "none" (plain floating point).
    bound: "max" | "edge" | "full" for symmetric integers, else "". scales, zeros: how they are stored, names of `scales.SCALES`
    and `zeros.ZEROS`; zeros are "none" but for affine integers.
    """

    grid: str
    granularity: str = "none"
    group: int = 0
    bound: str = ""
    scales: str = "fp32"
    zeros: str = "none"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return GRIDS[self.grid]

    @property
    def is_float(self) -> bool:
        """True for fp32, bf16 and fp16: the weight itself is stored."""
        return self.grid in FLOATS

    @property
    def is_affine(self) -> bool:
        """True for integers with a zero point."""
        return self.zeros != "none"

    @property
    def has_whole_zeros(self) -> bool:
        """False for real zero points, which are added before rounding, and for minima, which are taken off."""
        return not self.is_affine or self.zero_codec.whole

    @property
    def has_minima(self) -> bool:
        """Whether values of code 0 are stored instead of zero points."""
        return self.is_affine and self.zero_codec.minima

    @property
    def is_read_only(self) -> bool:
        """Whether it is one of files alone, which are read, not rounded to: minima that are stored together."""
        return self.is_affine and self.zero_codec.together

    @property
    def symmetric(self) -> bool:
        """True for integers without one."""
        return self.bound != ""

    @property
    def is_flat(self) -> bool:
        """True for blocks of the flattened weight, whose scales are kept as one axis."""
        return self.granularity == "flat"

    def crosses_columns(self, in_features: int) -> bool:
        """Whether groups of a weight with so many inputs go over the ends of its output columns."""
        return self.is_flat and in_features % self.group != 0

    @property
    def scale_codec(self) -> Floats:
        """How scales are stored."""
        return SCALES[self.scales].of_layout(self.is_flat)

    @property
    def zero_codec(self) -> Zeros | None:
        """How zero points are stored, None where there are none."""
        return ZEROS.get(self.zeros)

    @property
    def codebook(self) -> Codebook | None:
        """The codebook, or None where codes are integers. One-bit symmetric integers are the two values -1 and 1."""
        if self.grid == "int1" and self.bound in ("max", "edge"):
            return Codebook((-1.0, 1.0), (0.0,), 2.0 if self.bound == "edge" else 1.0)
        return codebooks().get(self.grid)

    @property
    def largest_code(self) -> int:
        """Codes run from 0 to here."""
        return len(self.codebook.values) - 1 if self.codebook else 2**self.bits - 1

    @property
    def largest_value(self) -> float:
        """What the largest magnitude of a group is scaled to; of affine integers, its whole range."""
        if self.codebook:
            return self.codebook.bound
        below = {"max": 1.0, "edge": 0.5, "full": 0.0}
        return self.largest_code if self.is_affine else 2 ** (self.bits - 1) - below[self.bound]

    @property
    def mantissa(self) -> int:
        """Binary digits of the largest values after the first."""
        float_like = re.fullmatch(r"fp\d_e\dm(\d)", self.grid)
        return int(float_like[1]) if float_like else max(self.bits - 2, 0)

    def nbytes(self, in_features: int, out_features: int) -> int:
        """Exact bytes of an (in_features, out_features) weight in this format: codes, scales, zero points, everything."""
        if self.is_float:
            return self.bits // 8 * in_features * out_features
        size = packed_rows(in_features, self.bits) * out_features
        shape = self.parameter_shape(in_features, out_features)
        if self.is_affine:
            size += self.zero_codec.nbytes(shape, self.bits, self.is_flat)
        return size + self.scale_codec.nbytes_of(shape)

    def bits_per_weight(self, in_features: int = 4096, out_features: int = 4096) -> float:
        """Exact bits per weight of an (in_features, out_features) weight."""
        return 8 * self.nbytes(in_features, out_features) / (in_features * out_features)

    def parameter_shape(self, in_features: int, out_features: int) -> tuple[int, int]:
        """(rows, columns) of the scales before a flat format flattens them."""
        match self.granularity:
            case "tensor":
                return 1, 1
            case "channel":
                return 1, out_features
            case "flat" if self.crosses_columns(in_features):
                return math.ceil(in_features * out_features / self.group), 1
            case _:
                return math.ceil(in_features / self.group), out_features

    def groups(self, in_features: int, out_features: int) -> int:
        """How many scales a weight has."""
        return math.prod(self.parameter_shape(in_features, out_features))

    def __str__(self) -> str:
        if self.is_float:
            return self.grid
        sizes = {"group": f"g{self.group}", "flat": f"b{self.group}"}
        parts = [self.grid, sizes.get(self.granularity, self.granularity)]
        if self.symmetric:
            parts += ["sym", self.bound] if self.bound != "edge" else ["sym"]
        if self.is_affine and self.zeros != "codes":
            parts.append(self.zeros)
        if self.scales != default_scales(self.grid):
            parts.append(self.scales)
        name = "-".join(parts)
        return SHORT.get(name, name)

    @property
    def grid_name(self) -> str:
        """The grid, or the name that says scales too: mxfp4."""
        return str(self) if str(self) in ALIASES else self.grid

    @property
    def searched(self) -> "Format":
        """The format that ranges are searched in: scales that cannot be moved alone are quantized after the search."""
        return self if self.scale_codec.movable else dataclasses.replace(self, scales=default_scales(self.grid))


def not_rounded_to(fmt: Format) -> str:
    """What to say where somebody would round to a format that is read only."""
    nearest = dataclasses.replace(fmt, zeros="m16", scales=default_scales(fmt.grid))
    return f"{fmt} is a format of files: it can be read, not rounded to; the nearest that can be is {nearest}"


_ever_registered: dict[tuple[str, str], Codebook | Floats] = {}


def _require_the_same(kind: str, name: str, value: Codebook | Floats) -> None:
    """Raises QjaxError where the name once stood for something else in this process, whether it is still registered or not:
    compiled programs are told apart by a format's name.
    """
    if _ever_registered.setdefault((kind, name), value) != value:
        raise QjaxError(
            f"register_{kind}: {name!r} had other values earlier in this process, and what was compiled for them would run; "
            "give another name"
        )


def register_codebook(name: str, values: Sequence[float]) -> None:
    """Makes a table of 2, 4, ..., 256 values in [-1, 1] a grid, for formats as NAME-g64: the largest |weight| of a group is
    scaled to 1, ties between values go down.

    Raises QjaxError for a name that is or was in use with other values or that no format can spell, and for values that are
    not sorted or not as many.
    """
    book = middle_codebook(tuple(values))
    bits = (len(values) - 1).bit_length()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or (name in (*GRIDS, *ALIASES) and codebooks().get(name) != book):
        raise QjaxError(f"register_codebook: {name!r} is in use or cannot be spelled in a format; give another name")
    if not 1 <= bits <= 8 or len(values) != 2**bits or list(values) != sorted(set(values)) or max(map(abs, values)) > 1:
        raise QjaxError(f"register_codebook: {name}: expected 2, 4, ..., 256 sorted values in [-1, 1], got {len(values)}")
    _require_the_same("codebook", name, book)
    codebooks()[name] = book
    GRIDS[name] = bits
    parse_format.cache_clear()


def register_scales(name: str, codec: Floats) -> None:
    """Makes a codec (`scales.Floats` or what derives from it) one that formats name, as int4-g64-NAME.

    Raises QjaxError for a name that is or was in use for another or that no format can spell.
    """
    taken = SCALES.get(name, codec) != codec or name in ("sym", *BOUNDS, *ZEROS)
    if taken or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or _is_granularity(name):
        raise QjaxError(f"register_scales: {name!r} is in use or cannot be spelled in a format; give another name")
    _require_the_same("scales", name, codec)
    SCALES[name] = codec
    parse_format.cache_clear()


def from_outside(fmt: Format) -> dict[str, Codebook | Floats]:
    """The codebook and the codec of a format that were registered, by kind and name."""
    used = (("codebook", fmt.grid), ("scales", fmt.scales))
    return {f"{kind} {name}": _ever_registered[kind, name] for kind, name in used if (kind, name) in _ever_registered}


def default_scales(grid: str) -> str:
    """float16 for integers (GPTQ's and AWQ's files), float32 for codebooks (bitsandbytes')."""
    return "fp16" if grid in INTEGERS else "fp32"


@functools.lru_cache(maxsize=1024)
def parse_format(text: str | Format) -> Format:
    """The format named `text`, for example "int4-g128", "nf4-g64-dq", "fp8_e4m3-channel"; a Format is returned as it is.

    Raises QjaxError that names the part that is wrong and lists what is allowed, or what was probably meant.
    """
    if isinstance(text, Format):
        return text
    try:
        return _parse_format(text)
    except QjaxError:
        if found := suggestion(text, _parse_format):
            raise QjaxError(f"format {text!r}: {found}") from None
        raise


def suggestion(text: str, parse: Callable[[str], object], methods: Collection[str] = ()) -> str:
    """What to say of a text that is no format, or no recipe of these methods: another name that `parse` takes; "" for none."""
    for what, name in words.advice(text, methods=methods, grids=[*GRIDS, *ALIASES], parts=["sym", *BOUNDS, *ZEROS, *SCALES]):
        with contextlib.suppress(QjaxError):
            return f"{what} {str(parse(name))!r}{'?' if what.startswith('did') else ''}"
    return ""


def _parse_format(text: str) -> Format:
    head, *parts = text.strip().lower().split("-")
    grid, *implied = ALIASES.get(head, head).split("-")
    parts = [*implied, *parts]
    if grid not in GRIDS:
        near = difflib.get_close_matches(head, [*GRIDS, *ALIASES], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise QjaxError(f"format {text!r}: unknown grid {head!r}; {hint}allowed: {', '.join([*GRIDS, *ALIASES])}")
    if grid in FLOATS:
        if parts:
            raise QjaxError(f"format {text!r}: {grid} takes no further parts, got {parts[0]!r}")
        return Format(grid)
    options = ("sym", *BOUNDS, *ZEROS, *SCALES)  # after fp8 they would be read as its exponent: fp8-e4m3
    if grid in DEFAULT_GRANULARITY and (not parts or (parts[0] in options and not grid.startswith("fp8"))):
        parts = [DEFAULT_GRANULARITY[grid], *parts]
    granularity, group = _parse_granularity(text, head, parts[0] if parts else "")
    return Format(grid, granularity, group, **_parse_options(text, grid, parts[1:]))


def _is_granularity(part: str) -> bool:
    return part in ("tensor", "channel") or re.fullmatch(r"[gb][0-9]{1,9}", part) is not None


def _parse_granularity(text: str, head: str, part: str) -> tuple[str, int]:
    if not _is_granularity(part):
        raise QjaxError(
            f"format {text!r}: after {head!r} comes who shares a scale, got {repr(part) if part else 'nothing'}; "
            "allowed: tensor, channel, gN (N weights along the input axis), bN (N of the flattened weight)"
        )
    if part in ("tensor", "channel"):
        return part, 0
    size = int(part[1:])
    if size < 1:
        raise QjaxError(f"format {text!r}: a group needs at least 1 weight, got {part!r}")
    return {"g": "group", "b": "flat"}[part[0]], size


def _parse_options(text: str, grid: str, parts: list[str]) -> dict[str, object]:
    """The fields of a Format after its granularity."""
    integer = grid in INTEGERS
    kinds = (
        {"sym": ("sym",), "bound": BOUNDS, "zeros": [name for name, codec in ZEROS.items() if not codec.whole]}
        if integer
        else {}
    )
    kinds["scales"] = tuple(SCALES)
    given = {}  # kind -> part
    for part in parts:
        kind = next((kind for kind, allowed in kinds.items() if part in allowed), None)
        if kind is None:
            names = [*(["sym", *(f"sym-{bound}" for bound in BOUNDS), *REAL_ZEROS] if integer else []), *SCALES]
            raise QjaxError(
                f"format {text!r}: unknown part {part!r} for {grid}; "
                f"allowed after tensor, channel, gN or bN: {', '.join(names)}"
            )
        if kind in given:
            raise QjaxError(f"format {text!r}: {part!r} comes after {given[kind]!r}, which is of its kind; give one")
        given[kind] = part
    symmetric = given.pop("sym", "")
    if "bound" in given and not symmetric:
        raise QjaxError(f"format {text!r}: the bound {given['bound']!r} goes with sym (affine grids span min..max)")
    if "zeros" in given and symmetric:
        raise QjaxError(f"format {text!r}: {given['zeros']!r} stores zero points, and sym has none; leave one of them out")
    if given.get("bound") == "full" and not SCALES[given.get("scales", default_scales(grid))].signed:
        raise QjaxError(f"format {text!r}: scales of sym-full may be negative, which {given['scales']} cannot store")
    zeros = "codes" if integer and not symmetric else "none"
    return {"scales": default_scales(grid), "bound": "edge" if symmetric else "", "zeros": zeros, **given}
