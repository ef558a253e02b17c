"""A picture of a method: one decoder block, what is merged into its weights, what acts at run time, where quantizers sit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptquant.config.quantization import SitePoint
from fptquant.config.schema import Config
from fptquant.quantizers.sites import kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE: dict[str, Any] = {"color": "0.55", "lw": 1.2}
MERGED, ONLINE, QUANTIZER = "#1f5fa8", "#c2410c", "#15803d"


@dataclass(frozen=True)
class Box:
    """A part of the block: where it is drawn, and whether it holds weights."""

    label: str
    x: float
    y: float
    weight: bool = False
    width: float = 1.3


BOXES = {
    "attn_norm": Box("RMSNorm", 1.1, 3.6),
    "q_proj": Box("q_proj", 3.7, 4.5, weight=True),
    "k_proj": Box("k_proj", 3.7, 3.6, weight=True),
    "v_proj": Box("v_proj", 3.7, 2.7, weight=True),
    "q_rope": Box("RoPE", 5.2, 4.5, width=0.8),
    "k_rope": Box("RoPE", 5.2, 3.6, width=0.8),
    "attention": Box("attention", 7.25, 3.6),
    "o_proj": Box("o_proj", 9.55, 3.6, weight=True),
    "mlp_norm": Box("RMSNorm", 1.1, 0.9),
    "gate_proj": Box("gate_proj", 3.7, 1.35, weight=True),
    "up_proj": Box("up_proj", 3.7, 0.45, weight=True),
    "silu": Box("SiLU ×", 5.6, 0.9),
    "down_proj": Box("down_proj", 9.55, 0.9, weight=True),
}

ARROWS = [
    ("attn_norm", "q_proj"), ("attn_norm", "k_proj"), ("attn_norm", "v_proj"), ("q_proj", "q_rope"), ("k_proj", "k_rope"),
    ("q_rope", "attention"), ("k_rope", "attention"), ("v_proj", "attention"), ("attention", "o_proj"),
    ("mlp_norm", "gate_proj"), ("mlp_norm", "up_proj"), ("gate_proj", "silu"), ("up_proj", "silu"), ("silu", "down_proj"),
]  # fmt: skip

READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")

MERGED_INTO: dict[str, dict[str, tuple[str, ...]]] = {
    "norm_scaling": {"T_n": (*READERS, "attn_norm", "mlp_norm")},
    "query_key_rotation": {"T_k": ("q_proj", "k_proj")},
    "value_mixing": {"T_v": ("v_proj", "o_proj")},
    "up_scaling": {"T_u": ("up_proj", "down_proj")},
    "residual_rotation": {"T_r": (*READERS, *WRITERS)},
    "down_hadamard": {"T_d": ("down_proj",)},
    "out_hadamard": {"T_o": ("o_proj",)},
    "kronecker": {
        "P_a": ("q_proj", "k_proj", "v_proj"),
        "P_o": ("o_proj",),
        "P_ug": ("gate_proj", "up_proj"),
        "P_d": ("down_proj",),
    },
    "block_rotation": {
        "D_a": ("q_proj", "k_proj", "v_proj"),
        "D_o": ("o_proj",),
        "D_ug": ("gate_proj", "up_proj"),
        "D_d": ("down_proj",),
    },
}
"""Transform -> its symbols -> the parts that change."""

AT_RUN_TIME: dict[str, dict[str, tuple[str, ...]]] = {
    "residual_scaling": {"S_n": ("attn_norm", "mlp_norm", "o_in", "down_in")},
    "down_hadamard": {"T_d": ("down_in",)},
    "out_hadamard": {"T_o": ("o_in",)},
    "query_key_hadamard": {"T_h": ("q", "k")},
    "query_key_mixing": {"P_h": ("q", "k")},
    "kronecker": {"P_a": ("attn_in",), "P_o": ("o_in",), "P_ug": ("mlp_in",), "P_d": ("down_in",)},
    "block_rotation": {"D_a": ("attn_in",), "D_o": ("o_in",), "D_ug": ("mlp_in",), "D_d": ("down_in",)},
}
"""Transform -> its symbols -> the parts or places between them where it acts; S_n as with ``where: input``."""

PLACES = {
    "attn_in": (2.25, 3.6),
    "q": (6.1, 4.5),
    "k": (6.1, 3.6),
    "v": (6.1, 2.7),
    "o_in": (8.4, 3.6),
    "mlp_in": (2.25, 0.9),
    "down_in": (7.6, 0.9),
}
SITES: dict[str, SitePoint] = {
    "attn_in": "attn_in",
    "k": "k_cache",
    "v": "v_cache",
    "o_in": "o_in",
    "mlp_in": "mlp_in",
    "down_in": "down_in",
}
"""Place -> the site whose quantizer is drawn there."""


def draw_method(config: Config, file: str | Path | None = None) -> Figure:
    """One decoder block under a method.

    Boxes are parts of the block. Symbols below a box are merged into its weights, symbols in round frames act at run time, and a
    square holds the bits of a quantizer; GLOSSARY.md lists the symbols.

    Args:
        config: of the method; its quantization says which quantizers are drawn.
        file: where the picture is written, if anywhere; the ending gives the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(-0.6, 11.4)
    axes.set_ylim(-0.75, 5.25)
    axes.set_aspect("equal")
    axes.axis("off")
    _draw_residual(axes)
    for begin, end in ARROWS:
        _arrow(axes, BOXES[begin], BOXES[end])
    merged, online = _symbols(config, MERGED_INTO), _symbols(config, AT_RUN_TIME)
    weight_bits = config.quantization.weight.bits
    for name, box in BOXES.items():
        _draw_box(axes, box, merged.get(name, []), online.get(name, []), weight_bits)
    for place, position in PLACES.items():
        _draw_place(axes, position, online.get(place, []), _bits(config, place))
    _draw_legend(axes, config)
    if file is not None:
        figure.savefig(file)
    return figure


def _symbols(config: Config, table: dict[str, dict[str, tuple[str, ...]]]) -> dict[str, list[str]]:
    """Part or place -> symbols of the method's transforms there."""
    found: dict[str, list[str]] = {}
    for transform, symbols in table.items():
        if getattr(config.transforms, transform) is not None:
            for symbol, places in symbols.items():
                for place in places:
                    found.setdefault(place, []).append(symbol)
    return found


def _bits(config: Config, place: str) -> int:
    """Of the quantizer at a place; 16 where there is none."""
    site = SITES.get(place)
    if site is None:
        return 16
    override = config.quantization.overrides.get(site)
    if override is not None and override.bits is not None:
        return override.bits
    found = config.quantization.kv_cache if kind_of(site) == "kv_cache" else config.quantization.activation
    bits: int = found.bits
    return bits


def _mathematics(symbol: str) -> str:
    letter, index = symbol.split("_")
    return f"${letter}_{{{index}}}$"


def _draw_residual(axes: Axes) -> None:
    for y, way, norm, last in ((3.6, 1, "attn_norm", "o_proj"), (0.9, -1, "mlp_norm", "down_proj")):
        around = y + (1.45 if way > 0 else -1.2)
        axes.plot([-0.3, -0.3, 10.8, 10.8], [y, around, around, y + 0.2 * way], **LINE)
        for begin, end in ((-0.6, BOXES[norm].x - 0.65), (BOXES[last].x + 0.65, 10.6), (11.0, 11.4)):
            axes.annotate("", (end, y), (begin, y), arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0, **LINE})
        axes.text(10.8, y, "+", ha="center", va="center", bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "0.55"})
        axes.text(
            5.2,
            around,
            " residual ",
            color="0.4",
            fontsize=8,
            ha="center",
            va="center",
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )


def _arrow(axes: Axes, begin: Box, end: Box) -> None:
    """From side to side; a box beside several is left by a fork, and reached from above or below."""
    x, y = begin.x + begin.width / 2, begin.y
    if begin.y == end.y:
        path = [(x, y), (end.x - end.width / 2, y)]
    elif end.weight:
        fork = end.x - end.width / 2 - 0.18
        path = [(x, y), (fork, y), (fork, end.y), (end.x - end.width / 2, end.y)]
    else:
        path = [(x, y), (end.x, y), (end.x, end.y + (0.24 if y > end.y else -0.24))]
    axes.plot(*zip(*path[:-1], strict=True), **LINE)
    axes.annotate("", path[-1], path[-2], arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0, **LINE})


def _draw_box(axes: Axes, box: Box, merged: list[str], online: list[str], weight_bits: int) -> None:
    from matplotlib.patches import FancyBboxPatch

    face = "#eef4fb" if box.weight else "white"
    corner = (box.x - box.width / 2, box.y - 0.24)
    axes.add_patch(FancyBboxPatch(corner, box.width, 0.48, boxstyle="round,pad=0,rounding_size=0.06", fc=face, ec="0.3", lw=1.1))
    label = f"{box.label} · {weight_bits} bits" if box.weight and weight_bits < 16 else box.label
    axes.text(box.x, box.y, label, ha="center", va="center", fontsize=8)
    if merged:
        axes.text(box.x, box.y - 0.37, " ".join(map(_mathematics, merged)), color=MERGED, ha="center", va="center", fontsize=9)
    if online:
        _round(axes, box.x, box.y + 0.45, online)


def _draw_place(axes: Axes, position: tuple[float, float], online: list[str], bits: int) -> None:
    x, y = position
    if online:
        _round(axes, x - (0.22 if bits < 16 else 0), y, online)
    if bits < 16:
        square = {"boxstyle": "square,pad=0.2", "fc": "white", "ec": QUANTIZER}
        axes.text(x + (0.28 if online else 0), y, str(bits), color=QUANTIZER, ha="center", va="center", fontsize=8, bbox=square)


def _round(axes: Axes, x: float, y: float, symbols: list[str]) -> None:
    frame = {"boxstyle": "round,pad=0.22,rounding_size=0.5", "fc": "white", "ec": ONLINE}
    axes.text(x, y, " ".join(map(_mathematics, symbols)), color=ONLINE, ha="center", va="center", fontsize=8.5, bbox=frame)


def _draw_legend(axes: Axes, config: Config) -> None:
    activation = config.quantization.activation
    ranges = "ranges for every token" if activation.dynamic else "static ranges"
    ranges += ", centered" if activation.centered else ""
    entries: list[tuple[str, str]] = [
        ("blue: merged into the weights", MERGED),
        ("orange: at run time", ONLINE),
        (f"green: quantizers ({ranges})", QUANTIZER),
    ]
    for index, (text, color) in enumerate(entries):
        axes.text(0.2 + 3.9 * index, -0.62, text, color=color, fontsize=8.5, va="center")
