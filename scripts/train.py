"""`drelu-timm train` as a script, for launchers that need a file: accelerate launch scripts/train.py --model ..."""

import sys

from drelu_timm.__main__ import main

sys.exit(main(["train", *sys.argv[1:]]))
