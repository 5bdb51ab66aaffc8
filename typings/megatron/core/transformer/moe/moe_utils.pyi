from torch.distributed import ProcessGroup

class ProcessGroupCollection:
    ep: ProcessGroup
    tp: ProcessGroup

def get_default_pg_collection() -> ProcessGroupCollection: ...
