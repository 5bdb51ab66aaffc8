from torch.distributed import ProcessGroup

class ProcessGroupCollection:
    ep: ProcessGroup
    tp: ProcessGroup
    tp_ep: ProcessGroup
    expt_tp: ProcessGroup

def get_default_pg_collection() -> ProcessGroupCollection: ...
