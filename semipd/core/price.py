"""What a missed target is worth in seconds of latency: as much as it takes for the targets to be kept."""

from __future__ import annotations

from collections.abc import Mapping

from semipd.core.partition import Targets
from semipd.core.types import Event, Finished, FinishReason

KEPT = 0.93  # share of requests that should keep both targets, if nobody says: goodput asks for 0.9
RISE = 2.5  # by which the price rises with a request that does not
LEAST, MOST = 1.0, 100.0


class Price:
    """An observer. targets: by service class, one of them "default". kept: share of the requests that
    should keep theirs, below 1.

    "The least latency at which `kept` of the requests keep their targets" has a multiplier for its
    constraint, found by small steps (dual ascent): `value`, in seconds, rises with every request that
    missed a target, falls with every other one, and comes to rest where so many are kept. So nobody waits
    longer for the sake of targets that none is about to miss, and near saturation they count for the most.
    """

    def __init__(self, targets: Mapping[str, Targets], kept: float = KEPT) -> None:
        self._targets = targets
        self._fall = RISE ** (1.0 - 1.0 / kept)
        self.value = MOST

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Finished):
            return
        request = event.request
        if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        targets = self._targets.get(request.service_class) or self._targets["default"]
        first, gaps = request.first_token_at, max(len(request.output) - 1, 1)
        kept = first - request.arrival <= targets.ttft
        kept = kept and request.last_token_at - first <= targets.tpot * gaps
        self.value = min(max(self.value * (self._fall if kept else RISE), LEAST), MOST)
