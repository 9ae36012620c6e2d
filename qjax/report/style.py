"""How figures look, as data: one colour and one marker per method in every figure, sizes of a two-column paper.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color), which colour-blind readers can tell apart, and some darker ones; markers
differ too, so that nothing rests on colour alone. Variants of a method (options, groupings) differ in line style and filling.
"""

import hashlib

WIDTHS = {"single": 3.35, "double": 6.9}  # inches: one column, both columns
HEIGHTS = {"single": 2.5, "double": 3.0}
PNG_DPI = 300
GREY = "#595959"
LABEL_SIZE = 7
SMALL_SIZE = 6  # points; nothing is smaller

METHOD_STYLES = {  # method -> colour, marker
    "rtn": ("#0072B2", "o"),
    "gptq": ("#D55E00", "s"),
    "awq": ("#009E73", "^"),
    "awq+gptq": ("#CC79A7", "D"),
    "nf4": ("#E69F00", "P"),
    "fp4_e2m1": ("#56B4E9", "X"),
    "fp4_bnb": ("#7A4EB0", "v"),
    "fp8_e4m3": ("#A6761D", "p"),
    "fp8_e5m2": ("#666600", "p"),
    "bf16": (GREY, "*"),
    "fp16": (GREY, "d"),
    "fp32": (GREY, ">"),
    "smoothquant": ("#8C6D1F", "<"),
    "hqq": ("#000000", "h"),
}
FALLBACK_COLOURS = ("#4D4D4D", "#882255", "#117733", "#332288", "#AA4499", "#6B6B00")
FALLBACK_MARKERS = ("p", ">", "*", "d", "H")
LINE_STYLES = ("-", "--", "-.", ":")

RC = {  # matplotlib's settings, on top of its defaults
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that figures are the same everywhere
    "font.size": LABEL_SIZE,
    "axes.titlesize": 7.5,
    "axes.labelsize": 8,
    "xtick.labelsize": LABEL_SIZE,
    "ytick.labelsize": LABEL_SIZE,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "figure.dpi": PNG_DPI,  # the width of letters changes a little with it
}


def method_style(method: str) -> tuple[str, str]:
    """Colour and marker of a method; an unknown one gets the same in every figure, by a hash of its name.

    Unknown transforms before a rounding keep its colour and change its marker.
    """
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    code = hashlib.sha256(method.encode()).digest()
    transforms, _, rounding = method.rpartition("+")
    colour, taken = method_style(rounding) if transforms else (FALLBACK_COLOURS[code[0] % len(FALLBACK_COLOURS)], None)
    markers = [marker for marker in FALLBACK_MARKERS if marker != taken]
    return colour, markers[code[1] % len(markers)]


def ink(colour: str, darkest: float = 0.2) -> str:
    """The colour for text: darkened until its relative luminance (WCAG 2) is at most `darkest`, legible on white."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    while _luminance(channels) > darkest:
        channels = [0.95 * channel for channel in channels]
    return "#" + "".join(f"{round(255 * channel):02X}" for channel in channels)


def _luminance(channels: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
