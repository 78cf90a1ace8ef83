import sys

from lab.records.record import main

sys.exit(main(sys.argv[1:]))
