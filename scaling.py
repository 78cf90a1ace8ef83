"""Do the tricks survive at larger model sizes?"""

import sys

from lab import published


def main(argv: list[str]) -> int:
    if argv[:1] == ["fit"]:
        return published.main(argv[1:])
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
