"""`drelu-timm train` as a file, for launchers that want one: accelerate launch scripts/train.py --model ..."""

import sys

from drelu_timm.__main__ import main

sys.exit(main(["train", *sys.argv[1:]]))
