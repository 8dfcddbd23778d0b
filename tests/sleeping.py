"""A stand-in for a GPU and the memory where generators sleep."""

import torch


class StandIn:
    """`Transfers` on the CPU. events: what was asked of it; most: the most fetches of whole modules that were alive."""

    def __init__(self, poison=True):
        self.poison, self.values, self.events, self.alive, self.most = poison, {}, [], 0, 0

    def host(self, tensor):
        host = tensor.detach().clone()
        if self.poison:
            self.values[id(host)] = (host.clone(), host)
            host.fill_(torch.nan)
        return host

    def fetch(self, hosts, device):
        self.alive += 1
        self.most = max(self.most, self.alive)
        self.events.append(("fetch", len(hosts)))
        return [(self.values[id(h)][0] if self.poison else h).clone() for h in hosts], {"under way"}

    def arrive(self, tensors, copying):
        if copying:
            self.events.append(("arrive", len(tensors)))
        copying.clear()

    def release(self, tensors, copying):
        self.alive -= 1
        self.events.append(("release", len(tensors)))
        for tensor in tensors:
            tensor.fill_(torch.nan)
