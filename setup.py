"""Builds the native libraries prcl_fast/_native.so (CPU) and prcl_fast/_native_cuda.so (CUDA), and the wheel.

Both use PyTorch's stable ABI and no Python.h, so one wheel serves every Python and every PyTorch from 2.11
on. Ninja is driven directly: torch.utils.cpp_extension refuses CUDA sources where PyTorch itself is a CPU
build, while nvcc needs neither a GPU nor a CUDA build of PyTorch.

Environment:
    PRCL_NO_NATIVE=1       build nothing; every op runs on the torch backend.
    FORCE_CUDA=1           a missing nvcc is an error instead of one line.
    TORCH_CUDA_ARCH_LIST   such as "8.0;9.0+PTX"; by default 8.0, 9.0, 10.0 and PTX of the last one.
    CUDA_HOME              where nvcc is; else it is looked for on PATH and in /usr/local/cuda.
    CXX                    the C++ compiler, for nvcc too; may have a launcher and arguments: "ccache g++".
    NVCC_CCBIN             the C++ compiler of nvcc alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHES = "8.0;9.0;10.0+PTX"
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest PyTorch that the libraries load in
DEFAULT_CUDA_HOME = Path("/usr/local/cuda")
INTERFACE = "interface.cpp"  # generated
# Paths of other characters are reached by links with plain names: nvcc splits options at commas, and passes
# paths to a shell without quoting every character.
PLAIN_PATH = re.compile(r"[\w@+./-]+", re.ASCII)
LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}
NO_NVCC = f"nvcc was not found in CUDA_HOME, on PATH or in {DEFAULT_CUDA_HOME}"
MISSING_NVCC = (
    f"prcl_fast: {NO_NVCC}, so only the CPU library is built "
    "(CUDA tensors will use the triton or torch backend)"
)


class BuildError(SystemExit):
    """Ends the build with one line; the compiler's own output has been shown above it."""


@dataclass(frozen=True)
class Flags:
    """All compiler and linker flags; `nvcc` is None where CUDA is not built.

    Relative paths in them are links in the folder of build.ninja, where ninja runs: name -> target.
    """

    source: Path
    links: dict[str, Path]
    cxx: str
    compile: list[str]
    link: list[str]
    nvcc: str | None
    cuda_compile: list[str]
    cuda_link: list[str]


def enabled(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def find_nvcc() -> str | None:
    """Looks in CUDA_HOME and on PATH, and where CUDA_HOME is not set also in the toolkit's usual folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    in_home = shutil.which("nvcc", path=str(Path(home or DEFAULT_CUDA_HOME) / "bin"))
    on_path = shutil.which("nvcc")
    return in_home or on_path if home else on_path or in_home


def architecture_flags(arches: str, known: set[str]) -> list[str]:
    """The -gencode flags of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a+PTX".

    `known` holds the architectures of this nvcc ("compute_80", ...); it is empty where nvcc cannot list them.
    """
    flags = []
    for arch in arches.replace(" ", ";").split(";"):
        if not arch:
            continue
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match is None:
            raise BuildError(f"prcl_fast: TORCH_CUDA_ARCH_LIST: {arch!r} is not like 9.0, 9.0a or 9.0+PTX")
        number = match[1] + match[2]
        if known and f"compute_{number.rstrip('af')}" not in known:
            print(f"prcl_fast: this nvcc does not know sm_{number}: left out", flush=True)
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise BuildError(f"prcl_fast: nvcc can compile for none of the architectures {arches}")
    return flags


def nvcc_host_compiler(cxx: str) -> list[str]:
    """nvcc's flags for the C++ compiler of NVCC_CCBIN, else of CXX if that is set."""
    if "NVCC_CCBIN" in os.environ:
        return [f"-ccbin={os.environ['NVCC_CCBIN']}"]
    if "CXX" not in os.environ:
        return []
    words = shlex.split(cxx)
    while len(words) > 1 and Path(words[0]).name in LAUNCHERS:
        words.pop(0)
    return [f"-ccbin={words[0]}", *(f"-Xcompiler={word}" for word in words[1:])]


def build_flags() -> Flags:
    """Every build flag has its only home here."""
    import torch

    links: dict[str, Path] = {}

    def short(name: str, path: Path) -> Path:
        if PLAIN_PATH.fullmatch(str(path)):
            return path
        links[name] = path
        return Path(name)

    source = short("source", ROOT)
    torch_dir = short("torch", Path(torch.__file__).resolve().parent)
    cxx = os.environ.get("CXX", "g++")
    common = [
        f"-I{source / 'csrc'}",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-std=c++17",
        "-O3",
    ]
    system_headers = ["-isystem", str(torch_dir / "include")]
    host = ["-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={source}=."]
    # libtorch.so needs libtorch_cpu.so and, in CUDA builds, libtorch_cuda.so: our symbols come through it.
    # PyTorch has loaded it before we do, so no run path is written.
    link = ["-shared", f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    nvcc = find_nvcc()
    cuda_compile: list[str] = []
    if nvcc is not None:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
        arches = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHES
        cuda_compile = [
            *common,
            *system_headers,
            *architecture_flags(arches, set(listed.stdout.split())),
            "-DUSE_CUDA",  # makes PyTorch's headers declare the CUDA stream functions
            "--threads=2",
            f"-Xcompiler={','.join(host)}",
            *nvcc_host_compiler(cxx),
        ]
    return Flags(
        source=source,
        links=links,
        cxx=cxx,
        compile=[*common, *system_headers, *host, "-Wall", "-Wextra", "-Wno-psabi"],
        link=link,
        nvcc=shlex.quote(nvcc) if nvcc else None,
        cuda_compile=cuda_compile,
        # The static runtime leaves nothing but the driver to be found at run time.
        cuda_link=[*(flag.replace("-Wl,", "-Xlinker=") for flag in link), "-cudart=static"],
    )


def extensions() -> list[Extension]:
    """The libraries to build here: none, CPU, or CPU and CUDA."""
    if enabled("PRCL_NO_NATIVE"):
        return []
    cpu = ["csrc/registration.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))]
    found = [Extension("prcl_fast._native", cpu)]
    if find_nvcc() is not None:
        cuda = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
        found.append(Extension("prcl_fast._native_cuda", cuda))
    elif enabled("FORCE_CUDA"):
        raise BuildError(f"prcl_fast: FORCE_CUDA=1, but {NO_NVCC}")
    return found


def ninja_file(flags: Flags, found: list[Extension], out: Path) -> str:
    """The text of out/build.ninja: one object per source, one library per extension. Makes `flags.links`."""
    for name, target in flags.links.items():
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target)

    def short(path: Path) -> Path:
        """A path in `out`, for ninja, which runs there."""
        return path if PLAIN_PATH.fullmatch(str(path)) else path.relative_to(out)

    def joined(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {flags.cxx} -MMD -MF $out.d {joined(flags.compile)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = g++  $in",
        "rule link",
        f"  command = {flags.cxx} $in {joined(flags.link)} -o $out",
        "  description = link $out",
    ]
    if flags.nvcc is not None:
        lines += [
            # Registers and spills of each kernel stay beside the object, for test_kernel_resources.py.
            "rule nvcc",
            f"  command = {flags.nvcc} -MMD -MF $out.d {joined(flags.cuda_compile)} -Xptxas=-v -c $in -o $out"
            " 2> $out.ptxas; status=$$?; grep -vE 'ptxas info|bytes stack frame|^$$' $out.ptxas >&2;"
            " exit $$status",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
            "rule cuda_link",
            f"  command = {flags.nvcc} $in {joined(flags.cuda_link)} -o $out",
            "  description = link $out",
        ]
    for extension in found:
        is_cuda = extension.name.endswith("_cuda")
        objects = []
        for source in extension.sources:
            name = Path(source).name if Path(source).is_absolute() else source.replace("/", "_")
            objects.append(str(short(out / f"{name}.o")))
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            path = short(Path(source)) if Path(source).is_absolute() else flags.source / source
            line = f"build {objects[-1]}: {rule} {path}"
            if line not in lines:  # both libraries have interface.cpp
                lines.append(line)
        library = short(out / f"{extension.name}.so")
        lines.append(f"build {library}: {'cuda_link' if is_cuda else 'link'} {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def interface_source() -> str:
    """C++ that marks a library with the signatures of its ops: see prcl_fast/ops/native.py."""
    sys.path.insert(0, str(ROOT))
    import prcl_fast.ops

    return f'__attribute__((used)) static const char mark[] = "{prcl_fast.ops.native.interface_mark()}";\n'


def write_changed(file: Path, text: str) -> None:
    """Writes the file if its text is another one, so that ninja compiles only what changed."""
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)


def ninja_command() -> list[str]:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("prcl_fast: ninja was not found; install it with: pip install ninja") from None
        return [found]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


class BuildNative(build_ext):
    """Runs ninja in build/native, --build-base/native or --build-temp; the libraries go into the package."""

    def finalize_options(self) -> None:
        # Only what was asked for on the command line: an editable install sets a fresh temporary folder each
        # time, in which everything would be compiled anew.
        base = self.get_finalized_command("build").build_base
        self.native_dir = Path(self.build_temp or ROOT / base / "native").resolve()
        super().finalize_options()

    def run(self) -> None:
        if not self.extensions:
            return
        out = self.native_dir
        out.mkdir(parents=True, exist_ok=True)
        flags = build_flags()
        if shutil.which(shlex.split(flags.cxx)[0]) is None:
            raise BuildError(
                f"prcl_fast: the C++ compiler {flags.cxx} was not found; install one (apt install g++), or "
                "set PRCL_NO_NATIVE=1 to do without the native library"
            )
        if flags.nvcc is None:
            print(MISSING_NVCC, file=sys.stderr, flush=True)
        for extension in self.extensions:
            extension.sources.append(str(out / INTERFACE))
        write_changed(out / INTERFACE, interface_source())
        write_changed(out / "build.ninja", ninja_file(flags, self.extensions, out))
        jobs = os.environ.get("MAX_JOBS")
        command = [*ninja_command(), "-C", str(out), *(["-j", jobs] if jobs else [])]
        environment = dict(os.environ)
        if not PLAIN_PATH.fullmatch(tempfile.gettempdir()):
            environment["TMPDIR"] = "."  # nvcc's own files, beside the objects
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            raise BuildError("prcl_fast: the native library did not compile; the compiler's message is above")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.native_dir / f"{ext.name}.so", target)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class BuildPackage(build_py):
    """Puts configs/ into the package. An editable install has none: there the clone's configs/ is read."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "prcl_fast", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "configs", target, ignore=shutil.ignore_patterns(".*", "__pycache__"))


class AnyPythonWheel(bdist_wheel):
    """The libraries do not link against Python, so the wheel is for any Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_py": BuildPackage, "build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )
