from torch import nn

HAVE_TE: bool

class TENorm(nn.Module): ...
