"""A small classifier of the ten digits, whose features judge the embedded demo."""

from torch import Tensor, nn
from torch.nn import functional as F


class DigitClassifier(nn.Module):
    """Images [B, 1, 32, 32] in [-1, 1] -> features [B, 96] of unit RMS over real digits; `logits` gives [B, 10]."""

    feature_dim = 96

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=s, padding=1)
            for i, o, s in ((1, 24, 1), (24, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 2))
        )
        self.hidden = nn.Linear(64 * 16, self.feature_dim)
        self.output = nn.Linear(self.feature_dim, 10)
        self.rms: Tensor
        self.register_buffer("rms", self.hidden.bias.new_ones(()))

    def _hidden(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self._hidden(x) / self.rms

    def logits(self, x: Tensor) -> Tensor:
        return self.output(self._hidden(x))
