"""Builds the C core: one static library per instruction set, linked into one shared library that needs no torch to build.

``fptquant/_C.abi3.so`` is plain C without Python's C API (fptquant/_core.py loads it through ctypes), so neither Python.h nor
PyTorch is needed to compile it, and one wheel serves every Python from 3.11 and every PyTorch from 2.11.
"""

from __future__ import annotations

import copy
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_clib import build_clib

CSRC = Path("csrc")
X86 = platform.machine().lower() in {"x86_64", "amd64"}
FLAGS = [
    "-std=gnu17",
    "-O3",
    "-g0",
    "-fexceptions",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wstrict-prototypes",
    *(["-Werror"] if os.environ.get("CI") else []),
    *(["-DFPTQ_X86"] if X86 else []),
]
# Flags belong to an instruction set, never to the core as a whole: what runs on every processor is built without them.
ISA_FLAGS = {"scalar": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]


def kernel_sources(isa: str) -> list[str]:
    """cpu/<isa>/<op>.c where a hand-written twin exists, else the specification cpu/<op>.c compiled for that instruction set."""
    return [
        str(twin if (twin := CSRC / "cpu" / isa / source.name).exists() else source)
        for source in sorted((CSRC / "cpu").glob("*.c"))
        if source.name != "dispatch.c"
    ]


class build_clib_per_isa(build_clib):
    """Builds the libraries side by side, each in a folder of its own: one source is compiled once for each instruction set."""

    def build_libraries(self, libraries: list) -> None:  # type: ignore[type-arg]
        def build(library: tuple) -> None:  # type: ignore[type-arg]
            command = copy.copy(self)
            command.build_temp = str(Path(self.build_temp, library[0]))
            build_clib.build_libraries(command, [library])

        with ThreadPoolExecutor() as pool:
            list(pool.map(build, libraries))


headers = [str(path) for path in sorted([*CSRC.rglob("*.h"), *(CSRC / "cpu").glob("*.c")])]
libraries = [
    (
        f"fptq_{isa}",
        {
            "sources": kernel_sources(isa),
            "cflags": [*FLAGS, *flags, f"-DFPTQ_ISA={isa}"],
            "obj_deps": {"": headers},
        },
    )
    for isa, flags in ISA_FLAGS.items()
]
core = Extension(
    "fptquant._C",
    sources=[
        str(CSRC / "cpu" / "dispatch.c"),
        *(str(path) for path in sorted((CSRC / "ops").glob("*.c"))),
        *(str(path) for path in sorted((CSRC / "torch").glob("*.c"))),
    ],
    depends=[*headers, *(source for isa in ISA_FLAGS for source in kernel_sources(isa))],
    extra_compile_args=FLAGS,
    extra_link_args=["-Wl,-z,noexecstack", "-lm", "-ldl"],
    py_limited_api=True,
)
CONFIGS = ["fptquant.configs", "fptquant.configs.methods", "fptquant.configs.tables"]

# configs/ stays at the top of the repository, where people look for it, and travels in the wheel as fptquant.configs.
setup(
    packages=[*find_packages(include=["fptquant", "fptquant.*"]), *CONFIGS],
    package_dir={"fptquant.configs": "configs"},
    package_data={"fptquant": ["py.typed"], "fptquant.reports": ["*.jinja"], **{folder: ["*.yaml"] for folder in CONFIGS}},
    libraries=libraries,
    ext_modules=[core],
    cmdclass={"build_clib": build_clib_per_isa},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
