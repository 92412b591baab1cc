"""`python -m drelu_timm` under FSDP on the CPU: torch shards models there, Accelerate on GPUs and their like alone."""

import sys

from accelerate import Accelerator, DistributedType, PartialState

from drelu_timm.__main__ import main
from drelu_timm.training import distributed


class ShardingAccelerator(Accelerator):
    """Takes several processes on the CPU for GPUs."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.fsdp_plugin = options["fsdp_plugin"]
        self.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


distributed.Accelerator = ShardingAccelerator
sys.exit(main(sys.argv[1:]))
