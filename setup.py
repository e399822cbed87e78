"""For who calls setup.py: the build is in pyproject.toml and CMakeLists.txt, and pip runs it."""

import subprocess
import sys

COMMANDS = {
    "install": ["install", "."],
    "develop": ["install", "--editable", "."],
    "bdist_wheel": ["wheel", "--no-deps", "--wheel-dir", "dist", "."],
}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in COMMANDS:
        sys.exit(f"command: expected one of {', '.join(COMMANDS)}, got {' '.join(sys.argv[1:]) or 'none'}")
    sys.exit(subprocess.call([sys.executable, "-m", "pip", *COMMANDS[sys.argv[1]], *sys.argv[2:]]))
