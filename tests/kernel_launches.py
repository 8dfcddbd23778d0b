"""Every launch of a Triton kernel that matters, as data: tests/compile_only.py compiles them without a GPU.

An op joins with one entry in TRITON for each kernel and layout that matters.
"""

import importlib
import itertools
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)


@dataclass
class Kernel:
    """A Triton kernel of minegan_fast.kernels.<op> as one launch specialises it."""

    op: str
    name: str
    layout: str
    pointers: dict[str, str | tuple[str, ...]]  # argument: element type, or those of a tuple; 16-byte aligned
    sizes: dict[str, int]  # as the launch would specialise them: 1 is a constant, multiples of 16 are known to be
    scalars: dict[str, str] = field(default_factory=dict)  # argument: type
    constants: dict[str, object] = field(default_factory=dict)
    wide_loads: bool = True  # 16-byte loads are expected
    tensor_cores: bool = False  # instructions of theirs are expected
    options: dict[str, object] = field(default_factory=dict)  # of the launch
    architectures: tuple[int, ...] = ARCHITECTURES  # that it is launched so on

    def source(self, sizes: str) -> tuple[ASTSource, str]:
        """What is compiled, and a text that two launches share if that is the same for both.

        sizes: "given"; "ones", every integer argument being 1; "odd", none being a multiple of 16, nor any address."""
        function = getattr(importlib.import_module(f"minegan_fast.kernels.{self.op}"), self.name)
        plain = {parameter.name for parameter in function.params if parameter.do_not_specialize}
        values = {name: {"given": size, "ones": 1, "odd": size | 1}[sizes] for name, size in self.sizes.items()}
        constants = self.constants | {name: 1 for name, size in values.items() if size == 1 and name not in plain}
        types = {
            name: f"*{element}" if isinstance(element, str) else tuple(f"*{e}" for e in element)
            for name, element in self.pointers.items()
        } | self.scalars
        types |= dict.fromkeys(values, "i32") | dict.fromkeys(constants, "constexpr")
        pointers = () if sizes == "odd" else self.pointers
        aligned = {*pointers, *(name for name, size in values.items() if size % 16 == 0)} - constants.keys() - plain
        signature = {name: types[name] for name in function.arg_names}
        attrs = {}
        for i, name in enumerate(function.arg_names):
            count = len(types[name]) if isinstance(types[name], tuple) else 0
            paths = [(i, j) for j in range(count)] if count else [(i,)]
            attrs |= {path: [["tt.divisibility", 16]] for path in paths if name in aligned}
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
        return source, f"{self.name} {signature} {sorted(constants.items())} {attrs} {self.options}"

    def compile(self, architecture: int, sizes: str = "given") -> bytes:
        target = GPUTarget("cuda", architecture, 32)
        return triton.compile(self.source(sizes)[0], target=target, options=self.options).asm["cubin"]


def bias_act_kernels():
    from triton import language as tl

    from minegan_fast.kernels.bias_act import _OPTIONS, _blocks

    axes = {"channels last": (4096, 512, 1), "8x8": (16, 512, 64), "64x64": (16, 512, 4096), "odd": (16, 3, 49)}
    for layout, axis in axes.items():
        sizes, scalars = dict(zip(("outer", "C", "inner"), axis, strict=True)), {"slope": "fp64", "gain": "fp64"}
        for element in ("fp32", "bf16", "fp64") if layout == "64x64" else ("fp32", "bf16"):
            constants = {"WIDE": tl.float64 if element == "fp64" else tl.float32, **_blocks(*axis)}
            common = {"sizes": sizes, "scalars": scalars, "wide_loads": layout != "odd", "options": _OPTIONS}
            for has_y in (False, True):
                names = ("x_ptr", "b_ptr", "y_ptr", "out_ptr") if has_y else ("x_ptr", "b_ptr", "out_ptr")
                flags = {"HAS_B": True, "HAS_Y": has_y} | ({} if has_y else {"y_ptr": None})
                label = f"{layout} {element}{' second order' if has_y else ''}"
                pointers = dict.fromkeys(names, element)
                yield Kernel("bias_act", "bias_act_kernel", label, pointers, constants=constants | flags, **common)
            pointers = dict.fromkeys(("dy_ptr", "y_ptr", "dx_ptr"), element)
            pointers["partial_ptr"] = "fp64" if element == "fp64" else "fp32"
            label = f"{layout} {element}"
            common["sizes"] = sizes | {"steps": 8}
            yield Kernel("bias_act", "bias_act_backward_kernel", label, pointers, constants=constants, **common)


def row_update_kernels():
    from triton import language as tl

    from minegan_fast.kernels.row_update import _OPTIONS, CHUNK

    pointers = {"words_ptr": "i64", "grads_ptr": "i64", "items_ptr": "i32"}
    pointers |= dict.fromkeys(("lr_ptr", "scale_ptr", "found_ptr"), "fp32")
    numbers = ("lr", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "decay", "momentum", "average")
    kinds = {"fp32": ("fp32", "fp32"), "bf16 weights": ("fp32", "bf16"), "fp64": ("fp64", "fp64")}
    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp64": tl.float64}
    for rule in ("adam", "adamw", "sgd", "momentum"):
        for label, (leaf, dense) in kinds.items() if rule == "adam" else [*kinds.items()][:1]:
            # both the aligned and the scalar path are in each
            constants = {"T": types[leaf], "D": types[dense], "RULE": rule, "HAS_LR": True, "HAS_AVERAGE": True}
            constants |= {"CHUNK": CHUNK, "PACK": 2 if leaf == "fp64" else 4}
            common = {"sizes": {}, "scalars": dict.fromkeys(numbers, "fp64"), "options": _OPTIONS}
            yield Kernel("row_update", "row_update_kernel", f"{rule} {label}", pointers, constants=constants, **common)


def row_score_kernels():
    from triton import language as tl

    from minegan_fast.kernels.row_score import _OPTIONS, _TILES

    elements = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}
    for long, width in ((True, 4), (True, 1), (False, 4), (False, 1)):
        for element, kind in (("fp32", "square"), ("fp32", "product"), ("bf16", "square"), ("fp64", "product")):
            BR, BK = _TILES[long]
            wide = width if width == 1 else {"bf16": 8, "fp64": 2}.get(element, 4)
            constants = {"ELEMENT": elements[element], "KIND": kind, "WIDTH": wide, "STEPS": 7, "BR": BR, "BK": BK}
            label = f"{'long' if long else 'short'} rows, {wide} wide, {element}, {kind}"
            pointers = {"table_ptr": "i64", "out_ptr": "fp64"}
            common = {"sizes": {"entries": 110}, "scalars": {"factor": "fp64"}, "options": _OPTIONS}
            common |= {"wide_loads": wide > 1}
            yield Kernel("row_score", "row_score_kernel", label, pointers, constants=constants, **common)


def row_gradient_kernels():
    from minegan_fast.kernels.row_gradient import _OPTIONS, blocks

    layers = {  # C, k, size of x, of gy, positions' stride, kernel, stride, transposed
        "512x32x32": (512, 26, (1, 32, 32), (1, 32, 32), 1, (1, 3, 3), 1, False),
        "512x32x32 channels last": (512, 26, (1, 32, 32), (1, 32, 32), 512, (1, 3, 3), 1, False),
        "128x256x256 6 rows": (128, 6, (1, 256, 256), (1, 256, 256), 1, (1, 3, 3), 1, False),
        "512x65x65 stride 2": (512, 26, (1, 65, 65), (1, 32, 32), 1, (1, 3, 3), 2, False),
        "512x32x32 stride 2 transposed": (512, 26, (1, 32, 32), (1, 65, 65), 1, (1, 3, 3), 2, True),
        "64x16x16x16": (64, 4, (16, 16, 16), (16, 16, 16), 1, (3, 3, 3), 1, False),
    }
    for layout, (C, k, S, P, position, kernel, stride, transposed) in layers.items():
        channel = 1 if position > 1 else S[0] * S[1] * S[2]
        taps = kernel[0] * kernel[1] * kernel[2]
        sizes = {"B": 16, "C": C, "columns": k * taps, "steps": 8, "k": k}
        sizes |= {"x_batch": C * S[0] * S[1] * S[2], "x_channel": channel, "x_position": position}
        sizes |= {f"S{i}": size for i, size in enumerate(S)} | {f"P{i}": size for i, size in enumerate(P)}
        padding = tuple(size // 2 if stride == 1 else 0 for size in kernel)
        constants = {"STRIDE": (1, stride, stride), "PADDING": padding, "DILATION": (1, 1, 1), "TAPS": taps}
        constants |= {"K1": kernel[1], "K2": kernel[2], "DIMS": 3 if kernel[0] > 1 else 2, "TRANSPOSED": transposed}
        for element, precision in (("fp32", "tf32"), ("fp32", "tf32x3"), ("bf16", "tf32")):
            pointers = {"x_ptr": element, "gy_ptr": element, "partial_ptr": "fp32"}
            yield Kernel(
                "row_gradient", "row_gradient_kernel", f"{layout} {element} {precision}", pointers, sizes,
                constants=constants | blocks(k * taps, element == "bf16") | {"PRECISION": precision},
                wide_loads=False, tensor_cores=True, options=_OPTIONS,
            )  # fmt: skip


def upfirdn2d_kernels():
    from triton import language as tl

    from minegan_fast.kernels.upfirdn2d import _OPTIONS, blocks, heavy

    layers = {  # outer, inner, size of x, of y, up, down, padding before
        "blur 257x257": (2048, 1, (257, 257), (256, 256), 1, 1, 1),
        "blur 256x256": (2048, 1, (256, 256), (257, 257), 1, 1, 2),
        "blur 257x257 channels last": (16, 128, (257, 257), (256, 256), 1, 1, 1),
        "twice 128x128": (48, 1, (128, 128), (256, 256), 2, 1, 2),
        "twice 64x64 channels last": (16, 512, (64, 64), (128, 128), 2, 1, 2),
        "half 256x256": (2048, 1, (256, 256), (128, 128), 1, 2, 1),
        "half 8x8 channels last": (16, 512, (8, 8), (4, 4), 1, 2, 1),
    }
    wides = {"fp32": tl.float32, "bf16": tl.float32, "fp64": tl.float64}
    for layer, (outer, inner, size, out, up, down, before) in layers.items():
        plane = max(size[0] * size[1], out[0] * out[1]) * inner
        names = ("outer", "inner", "H", "W", "OH", "row_length", "before_y", "before_x")
        sizes = dict(zip(names, (outer, inner, *size, out[0], out[1] * inner, before, before), strict=True))
        constants = {"UY": up, "UX": up, "DY": down, "DX": down, "KH": 4, "KW": 4, "PHASE": -before % up}
        for element, separable in (("fp32", True), ("bf16", True), ("fp32", False), ("fp64", True)):
            pointers = {"x_ptr": element, "f_ptr": "fp64" if element == "fp64" else "fp32", "y_ptr": element}
            flags = {"SEPARABLE": separable, "FLIP": False, "WIDE": wides[element]}
            tile = blocks(outer, out[0], out[1] * inner, plane, up, heavy(down, inner, element == "fp64"))
            label = f"{layer} {element}{'' if separable else ' not separable'}"
            yield Kernel(
                "upfirdn2d", "upfirdn2d_kernel", label, pointers, sizes, {"gain": "fp64"}, constants | flags | tile,
                wide_loads=inner > 1, options=_OPTIONS,
            )  # fmt: skip


def plane_kernels(op: str, tensors: dict[str, tuple[str, ...]], summing: tuple[str, ...]):
    """Of modulated_conv2d and noise_bias_act, which share their tiles: images by kernel; those with sums."""
    from triton import language as tl

    from minegan_fast.kernels.noise_bias_act import _OPTIONS, blocks

    for layout, (C, P, last) in {"channels last": (512, 4096, True), "64x64": (512, 4096, False)}.items():
        sizes = {"splits": 64, "C": C, "P": P, "channel_stride": 1 if last else P, "position_stride": C if last else 1}
        for element in ("fp32", "bf16"):
            for name, images in tensors.items():
                small = (
                    ("n_ptr", "d_ptr", "f_ptr", "h_ptr", "k_ptr", "sums_ptr")
                    if op == "noise_bias_act"
                    else ("k_ptr", "s_ptr", "gs_ptr", "ds_ptr")
                )
                pointers = dict.fromkeys(images, element) | dict.fromkeys(small, "fp32")
                constants = {"WIDE": tl.float32} | blocks(C, P, last)
                scalars, own = {}, dict(sizes)
                if op == "noise_bias_act":
                    own |= {"noise_batch": P} | ({} if "double" in name else {"f_batch": 0, "h_batch": 0})
                    scalars = {"slope": "fp64", "gain": "fp64"}
                if name in summing:
                    own |= {"B": 16, "steps": 8}
                label = f"{layout} {element}"
                yield Kernel(op, name, label, pointers, own, scalars, constants, options=_OPTIONS)


def modulated_conv2d_kernels():
    kernels = {
        "modulate_kernel": ("x_ptr", "y_ptr"),
        "modulate_backward_kernel": ("gy_ptr", "x_ptr", "gx_ptr"),
        "modulate_double_backward_kernel": ("hx_ptr", "gy_ptr", "x_ptr", "dgy_ptr", "dx_ptr"),
    }
    yield from plane_kernels("modulated_conv2d", kernels, tuple(kernels)[1:])


def noise_bias_act_kernels():
    kernels = {
        "noise_bias_act_kernel": ("c_ptr", "y_ptr"),
        "noise_bias_act_backward_kernel": ("gy_ptr", "y_ptr", "gc_ptr"),
        "noise_bias_act_double_backward_kernel": ("hc_ptr", "gy_ptr", "y_ptr", "dgy_ptr", "dy_ptr"),
    }
    yield from plane_kernels("noise_bias_act", kernels, tuple(kernels)[1:])


def demodulation_kernels():
    from triton import language as tl

    from minegan_fast.kernels.demodulation import _OPTIONS, _OUTPUTS, _SAMPLES, blocks

    for label, K, strides in (
        ("3x3", 9, (4608, 9, 1)),
        ("3x3 channels last", 9, (4608, 1, 512)),
        ("1x1", 1, (512, 1, 1)),
    ):
        tile = blocks(512, K)
        weight = {"K": K, **dict(zip(("row_stride", "input_stride", "tap_stride"), strides, strict=True))}
        for element, wide in (("fp32", tl.float32), ("fp64", tl.float64)):
            common = {"wide_loads": False, "options": _OPTIONS}
            name = f"{label} {element}"
            pointers = dict.fromkeys(("s_ptr", "w_ptr", "d_ptr", "q_ptr"), element)
            yield Kernel(
                "demodulation", "demodulation_kernel", name, pointers, {"B": 16, "O": 512, "I": 512, **weight},
                {"eps": "fp64"}, {"WIDE": wide, "BB": _SAMPLES, **tile}, **common,
            )  # fmt: skip
            pointers = dict.fromkeys(("gd_ptr", "d_ptr", "s_ptr", "w_ptr", "gw_ptr"), element) | {"rows_ptr": "i64"}
            sizes = {"B": 16, "O": 512, "I": 512, **weight}
            yield Kernel("demodulation", "rows_kernel", name, pointers, sizes, {}, {"WIDE": wide, **tile}, **common)
    for element, wide in (("fp32", tl.float32), ("fp64", tl.float64)):
        pointers = dict.fromkeys(("gd_ptr", "d_ptr", "s_ptr", "q_ptr", "gs_ptr"), element)
        constants = {"WIDE": wide, "BO": _OUTPUTS, "BI": blocks(512, 9)["BI"]}
        yield Kernel(
            "demodulation", "styles_kernel", element, pointers, {"O": 512, "I": 512}, {}, constants, wide_loads=False,
            options=_OPTIONS,
        )  # fmt: skip


def minibatch_stddev_kernels():
    from triton import language as tl

    from minegan_fast.kernels.minibatch_stddev import _OPTIONS, tile

    types = {"fp32": tl.float32, "bf16": tl.float32, "fp64": tl.float64}
    for size, groups, last in ((4, 4, False), (4, 4, True), (16, 1, False)):
        blocks = tile(size, 512 * 16)
        sizes = {"size": size, "groups": groups, "C": 512, "pixels": 16, "features": 1, "tiles": 8192 // blocks["BE"]}
        for element in ("fp32", "bf16", "fp64") if size == 4 else ("fp32",):
            wide = "fp64" if element == "fp64" else "fp32"
            constants = {"CHANNELS_LAST": last, "WIDE": types[element]}
            label = f"{groups} groups of {size}{' channels last' * last} {element}"
            tensors = {"given_ptr": element, "D_ptr": wide, "y_ptr": element, "out_ptr": element, "partial_ptr": wide}
            passes = {"forward": ("given_ptr", "D_ptr", "out_ptr"), "backward": ("y_ptr", "partial_ptr")}
            for which, unused in (passes | {"second order": ()}).items():
                pointers = {"x_ptr": element} | {k: v for k, v in tensors.items() if k not in unused}
                yield Kernel(
                    "minibatch_stddev", "minibatch_stddev_kernel", f"{which} {label}", pointers, sizes,
                    constants=constants | blocks | {"PASS": which} | dict.fromkeys(unused), options=_OPTIONS,
                )  # fmt: skip
            yield Kernel(
                "minibatch_stddev", "append_kernel", label, {"y_ptr": element, "partial_ptr": wide}, sizes,
                constants=constants | {"BT": 256, "BLOCK": 256}, wide_loads=False, options=_OPTIONS,
            )  # fmt: skip


def winner_kernels():
    from triton import language as tl

    from minegan_fast.kernels.winner import _OPTIONS, tile

    for N, element in ((2, "fp32"), (8, "fp32"), (8, "bf16"), (8, "fp64"), (64, "fp32")):
        pointers = {"scores_ptr": element} | dict.fromkeys(("who_ptr", "counts_ptr", "nans_ptr", "order_ptr"), "i64")
        constants = {"WIDE": tl.float64 if element == "fp64" else tl.float32, **tile(N)}
        sizes = {"N": N, "B": 32}
        yield Kernel(
            "winner", "winner_kernel", f"{N} branches {element}", pointers, sizes, constants=constants,
            wide_loads=False, options=_OPTIONS,
        )  # fmt: skip


def mmd_kernels():
    from minegan_fast.kernels.mmd import _OPTIONS, SQUARED_KERNELS, blocks

    sizes = {"rows": 2048, "columns": 8192, "D": 2048, "op_stride": 10240, "oq_stride": 10240}
    inputs = ("p_ptr", "q_ptr", "hp_ptr", "hq_ptr", "op_ptr", "oq_ptr", "t_ptr", "s_ptr", "A_ptr", "B_ptr")
    kernels = ("gaussian", "laplacian", "energy", "polynomial")
    cases = [(kernel, order) for kernel in kernels for order in (0, 1, 2)] + [("polynomial", -1), ("gaussian", -1)]
    for kernel, order in cases:
        for mode in ("tf32", "tf32x3", "exact") if kernel in SQUARED_KERNELS else ("tf32x3",):
            used = {"t_ptr", "s_ptr"} if kernel == "laplacian" else {*inputs[:6]}
            used -= {"s_ptr", "hp_ptr", "hq_ptr"} if order < 2 else set()
            used |= {*("A_ptr",) * (order != 0), *("B_ptr",) * (order == 2)}
            pointers = dict.fromkeys(used, "fp32") | {"numbers_ptr": "fp64", "totals_ptr": "fp64", "close_ptr": "i32"}
            constants = {"KERNEL": kernel, "ORDER": order, "DIAGONAL": order != 2, "EXACT": mode == "exact"}
            squarings = (0, 2, 2, 2, 2) if kernel in ("gaussian", "laplacian") else (0,)
            constants |= {"SQUARINGS": squarings, "PRECISION": mode}
            label = f"{kernel} order {order} {mode}"
            for architectures in ((80,), (90, 100)):
                tile = blocks(kernel, order, mode == "exact", architectures[0] // 10)
                options = {name: tile.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in tile}
                options |= _OPTIONS
                yield Kernel(
                    "mmd", "mmd_tile_kernel", label, pointers, sizes, {"weight": "fp64"},
                    constants | tile | dict.fromkeys({*inputs} - used), options=options, wide_loads=False,
                    tensor_cores=kernel != "laplacian" and mode != "exact", architectures=architectures,
                )  # fmt: skip


def mmd_groups_kernels():
    from minegan_fast.kernels.mmd_groups import _OPTIONS, blocks

    inputs = dict.fromkeys(("x_ptr", "y_ptr", "A_ptr", "B_ptr"), "fp32")
    tables = {"starts_ptr": "i32", "firsts_ptr": "i32", "numbers_ptr": "fp64", "totals_ptr": "fp64"}
    for N, aligned in ((32, True), (32, False), (256, True)):
        pairs, slopes = blocks(N)
        options = [
            {name: tile.pop(name) for name in ("num_warps", "num_stages")} | _OPTIONS for tile in (pairs, slopes)
        ]
        common = {"wide_loads": False, "tensor_cores": True}
        sizes = {"N": N + 1, "M": 201, "stride": 1697}
        label = f"batch of {N}{', aligned' * aligned}"
        for gradient in (True, False):
            constants = pairs | {"UNBIASED": True, "GRADIENT": gradient, "ALIGNED": aligned}
            yield Kernel(
                "mmd_groups", "pairs_kernel", label + ", gradient" * gradient, inputs | tables, sizes,
                constants=constants, options=options[0], **common,
            )  # fmt: skip
        yield Kernel(
            "mmd_groups", "slopes_kernel", label, inputs | {"g_ptr": "fp32", "starts_ptr": "i32", "out_ptr": "fp32"},
            sizes, constants=slopes | {"ALIGNED": aligned}, options=options[1], **common,
        )  # fmt: skip
    pointers = {name: inputs[name] for name in ("A_ptr", "B_ptr")}
    yield Kernel(
        "mmd_groups", "diagonal_kernel", "", pointers, {"N": 33, "M": 201}, constants={"BLOCK": 256}, wide_loads=False,
        options=_OPTIONS,
    )  # fmt: skip


def miner_kernels():
    from minegan_fast.kernels.miner import _BI, _BK, _BM, _BN, _OPTIONS

    # A chain of two layers, and one of two with a mapping network of eight.
    for label, tensors, aligned in (("2 layers", 7, True), ("2 layers, mapping network", 23, True), ("odd", 7, False)):
        pointers = {"tensors": ("fp32",) * tensors, "scratch_ptr": "fp32", "words_ptr": "i64", "floats_ptr": "fp32"}
        pointers |= dict.fromkeys(("units_ptr", "steps_ptr", "counter_ptr"), "i32")
        constants = {"PRECISION": "tf32x3", "ALIGNED": aligned, "BM": _BM, "BN": _BN, "BK": _BK, "BI": _BI}
        yield Kernel(
            "miner", "miner_kernel", label, pointers, {"first": 0, "last": 10}, constants=constants, wide_loads=False,
            tensor_cores=True, options=_OPTIONS | {"launch_cooperative_grid": True},
        )  # fmt: skip


def manhattan_kernels():
    from minegan_fast.kernels.manhattan import _OPTIONS, _SIGNS, _TILE

    sizes = {"rows": 2048, "columns": 8192, "D": 2048}
    for slopes in (False, True):
        pointers = dict.fromkeys(("p_ptr", "q_ptr", "out_ptr") + ("hp_ptr", "hq_ptr") * slopes, "fp32")
        constants = {"SLOPES": slopes, **_TILE} | ({} if slopes else {"hp_ptr": None, "hq_ptr": None})
        label = "slopes" if slopes else "distances"
        yield Kernel(
            "manhattan", "pairs_kernel", label, pointers, sizes, constants=constants, wide_loads=False, options=_OPTIONS
        )  # fmt: skip
    pointers = dict.fromkeys(("A_ptr", "p_ptr", "q_ptr", "out_ptr"), "fp32")
    strides = {"row_stride": 8192, "column_stride": 1}
    yield Kernel(
        "manhattan", "signs_kernel", "signs", pointers, sizes | strides, constants=dict(_SIGNS), options=_OPTIONS
    )  # fmt: skip


def penalty_kernels():
    from triton import language as tl

    from minegan_fast.kernels.penalty import _OPTIONS, BLOCK, table

    shapes = {"3x256x256": 3 * 256 * 256, "odd": 3 * 37 * 41}
    for (shape, length), element in itertools.product(shapes.items(), ("fp32", "bf16", "fp64")):
        wide, label = "fp64" if element == "fp64" else "fp32", f"{shape} {element}"
        WIDE = tl.float64 if element == "fp64" else tl.float32
        sizes = {"length": length, "stride": length, "splits": 12}
        common = {"wide_loads": shape != "odd", "options": _OPTIONS}
        yield Kernel(
            "penalty", "squares_kernel", label, {"g_ptr": element, "partial_ptr": "fp64"}, sizes,
            constants={"WIDE": WIDE, "STEPS": 8, "BLOCK": BLOCK}, **common,
        )  # fmt: skip
        pointers = {"g_ptr": element, "scale_ptr": wide, "dpenalty_ptr": wide, "dg_ptr": element}
        sizes = {"length": length, "stride": length, "out_stride": length}
        constants = {"WIDE": WIDE, "BLOCK": BLOCK}
        yield Kernel("penalty", "penalty_backward_kernel", label, pointers, sizes, constants=constants, **common)
        pointers = dict.fromkeys(("real_ptr", "fake_ptr", "out_ptr"), element)
        sizes, scalars = {"length": length, "stride": length}, dict.fromkeys(("seed", "low", "high"), "i64")
        yield Kernel("penalty", "interpolate_kernel", label, pointers, sizes, scalars, constants, **common)
    results = dict.fromkeys(("mean_ptr", "penalty_ptr", "lengths_ptr", "scale_ptr", "new_mean_ptr"), "fp32")
    for (count, splits), squared in itertools.product(((16, 96), (4, 512), (1030, 1)), (False, True)):
        scalars = dict.fromkeys(("center", "decay", "inverse", "share"), "fp64")
        label = f"{count} samples, {splits} sums{', squared' * squared}"
        yield Kernel(
            "penalty", "penalty_kernel", label, {"partial_ptr": "fp64"} | results, {"count": count, "splits": splits},
            scalars, {"SQUARED": squared} | table(count, splits), wide_loads=False, options=_OPTIONS,
        )  # fmt: skip


TRITON = {
    "bias_act": bias_act_kernels,
    "row_update": row_update_kernels,
    "row_score": row_score_kernels,
    "row_gradient": row_gradient_kernels,
    "upfirdn2d": upfirdn2d_kernels,
    "modulated_conv2d": modulated_conv2d_kernels,
    "noise_bias_act": noise_bias_act_kernels,
    "demodulation": demodulation_kernels,
    "minibatch_stddev": minibatch_stddev_kernels,
    "miner": miner_kernels,
    "winner": winner_kernels,
    "manhattan": manhattan_kernels,
    "mmd": mmd_kernels,
    "mmd_groups": mmd_groups_kernels,
    "penalty": penalty_kernels,
}
