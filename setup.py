"""Drives CMake; everything about the native build is decided in CMakeLists.txt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds the target `_C` and puts it where setuptools expects it.

    Environment: `QN_CMAKE_ARGS` adds options (e.g. `-DQN_CUDA=ON -DQN_WERROR=ON`);
    `CMAKE_BUILD_PARALLEL_LEVEL` sets the number of jobs (default: all CPUs).
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        # The cache of an earlier `pip install` names tools of its build environment, which is gone.
        # Without it the configuration is made anew; objects that are up to date are kept.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            str(ROOT),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *os.environ.get("QN_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, cwd=build_dir, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(
            ["cmake", "--build", ".", "--target", "_C", "-j", jobs], cwd=build_dir, check=True
        )


setup(
    ext_modules=[Extension("qwen_native._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
