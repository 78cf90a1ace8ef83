"""python -m cost --track gpt2-small --tricks record --hardware 8xH100 [--world-size 16] [--gpu-price 1.8]

What a run would take on hardware that you need not have. `./run.sh plan`.
"""

import sys

from cost.predict import predict, report
from engine.command import command

if __name__ == "__main__":
    sys.exit(command("plan", lambda: report(predict(sys.argv[1:])), sys.argv[1:]))
