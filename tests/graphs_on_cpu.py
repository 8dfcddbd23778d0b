"""A stand-in for CUDA graphs that needs no GPU."""

from minegan_fast.training.captured import CudaGraphs


class GraphsOnCPU(CudaGraphs):
    """What was captured runs again at every replay, as it was captured: what it took from anything but its inputs is
    still the old. The capture itself computes the first replay's values.

    calls: "forget", "warm up", "capture", "replay", in their order. waits: where every warm-up is said to wait.
    """

    def __init__(self, waits: str = ""):
        self.calls, self.waits = [], waits

    def forget(self):
        self.calls.append("forget")

    def warm_up(self, function):
        self.calls.append("warm up")
        return function(), self.waits

    def capture(self, function):
        self.calls.append("capture")
        values, replays = function(), []

        def replay():
            self.calls.append("replay")
            if replays:
                for name, value in function().items():
                    values[name].copy_(value)
            replays.append(1)

        return values, replay
