#!/usr/bin/env python3
"""Check that no inline function is shared between objects of different ISA levels.

The linker keeps one copy of a weak symbol. If two levels define the same one, the scalar level may
end up with AVX-512 code: every weak symbol of a level's objects must be in that level's namespace.
Sanitizers add weak symbols of their own, so look at an ordinary build.

usage: check_isa_objects.py BUILD_DIR
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

WEAK = re.compile(r"^[0-9a-f]+ ([WVu]) (.*)$")


def foreign_symbols(obj: Path, level: str) -> list[str]:
    """Weak symbols defined in `obj` whose name lacks the namespace `level`."""
    listing = subprocess.run(["nm", "-C", str(obj)], capture_output=True, text=True, check=True)
    weak = [match[2] for match in map(WEAK.match, listing.stdout.splitlines()) if match]
    return [name for name in weak if f"::{level}::" not in name]


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)  # noqa: T201
        return 2
    objects = sorted(Path(sys.argv[1]).glob("CMakeFiles/qn_kernels_*.dir/**/*.o"))
    if not objects:
        print(f"isa objects: none under {sys.argv[1]}, expected qn_kernels_*.dir/**/*.o")  # noqa: T201
        return 1
    found = []
    for obj in objects:
        level = re.search(r"qn_kernels_(\w+)\.dir", obj.as_posix())
        assert level is not None
        found += [f"{obj.name} ({level[1]}): {name}" for name in foreign_symbols(obj, level[1])]
    print("\n".join(found) or f"isa objects: {len(objects)} objects share no weak symbol")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
