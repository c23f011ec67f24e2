"""Loads on the whole engine: offline, beside transformers, and token streams beside long prompts."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu import Scale, Setup

OFFLINE_TARGET, PEER_TARGET = 8000.0, 2.0
ITL_TARGET, GOODPUT_TARGET, AGREEMENT = 2.0, 1.3, 0.15
GOAL = 0.9  # share of requests that meet both targets
STRIDE = 1.2  # between the rates at which goodput is looked for
MOST_RATES = 6
DRAIN = 6.0  # seconds that the last arrivals are given
LAST = 40.0  # seconds kept for what comes after the loads
AGED = 120.0  # seconds after which an offline run is given up

Load = list[tuple[float, list[int], int]]


@dataclass
class Recorder:
    """Gaps and first tokens of every request, from the engine's events."""

    scale: Scale
    last: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    met: int = 0
    done: int = 0
    failed: int = 0
    ttft: list[float] = field(default_factory=list)

    def __call__(self, event: Any) -> None:
        if type(event).__name__ == "Tokens":
            self.tokens += len(event.tokens)
            for request in event.requests:
                if request.id in self.last:
                    self.gaps.append(event.now - self.last[request.id])
                self.last[request.id] = event.now
        elif type(event).__name__ == "Finished":
            request = event.request
            self.done += 1
            self.failed += request.error is not None
            if request.first_token_at is None or request.error is not None:
                return
            self.ttft.append(request.first_token_at - request.arrival)
            span = request.last_token_at - request.first_token_at
            per_token = span / max(len(request.output) - 1, 1)
            self.met += self.ttft[-1] <= self.scale.ttft and per_token <= self.scale.tpot


def run_offline(setup: Setup, size: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Output tokens per second with everything submitted at once, under the ways that suit that."""
    from semipd.core.partition import Shared
    from semipd.core.policies import Limits, PrefillFirst, SemiPD

    units = setup.executor.device.units
    limits = Limits(units, batch=setup.scale.slots - 2), Limits(units, batch=setup.scale.slots - 2)
    policies: dict[str, Any] = {"prefill-first": PrefillFirst(limits[0])}
    if setup.left() > 400.0:
        policies["semi-pd shared"] = SemiPD(limits[1], Shared(units))
    count, prompt, output = size or setup.scale.offline
    rows = {name: one_offline(setup, policy, count, prompt, output) for name, policy in policies.items()}
    for name, row in rows.items():
        setup.say(
            f"  {name:16s} {count} x {prompt} in, {output} out: {row['output_tokens_per_s']:.0f} output "
            f"tokens/s (target {OFFLINE_TARGET:.0f}), {row['seconds']:.1f} s"
        )
    best = max(rows.values(), key=lambda row: row["output_tokens_per_s"])
    return {**best, "ways": rows}


def one_offline(setup: Setup, policy: Any, count: int, prompt: int, output: int) -> dict[str, Any]:
    from semipd.core.types import Request

    rng = random.Random(0)
    recorder = Recorder(setup.scale)
    engine = setup.engine(policy, [recorder])
    for index in range(count):
        tokens = [rng.randrange(setup.vocabulary) for _ in range(prompt)]
        engine.add(Request(f"{index}", tokens, output, arrival=engine.clock.now()))
    begin, limit = engine.clock.now(), time.monotonic() + AGED
    while not engine.idle and time.monotonic() < limit:
        engine.step()
    seconds = engine.clock.now() - begin
    drain(engine)
    rate = recorder.tokens / max(seconds, 1e-9)
    return {
        "output_tokens_per_s": rate,
        "seconds": seconds,
        "failed": recorder.failed,
        "tokens": recorder.tokens,
    }


def run_transformers(setup: Setup) -> dict[str, Any]:
    """Transformers' continuous batching on the same card and shape; then the same load on this engine. Its
    attention is torch's own (sdpa): the others are packages, or downloads."""
    import torch
    import transformers

    count, prompt, tokens = setup.scale.peers
    ours = run_offline(setup, setup.scale.peers)
    config = transformers.AutoConfig.from_pretrained(setup.folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(setup.backend.device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    rng = random.Random(0)
    prompts = [[rng.randrange(setup.vocabulary) for _ in range(prompt)] for _ in range(count)]
    generation = transformers.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
    )
    made = model.eval().generate_batch(prompts, generation_config=generation)
    if len(made) < count or any(output.error is not None for output in made.values()):
        raise RuntimeError(f"transformers finished {len(made)} of {count} requests; its log says why")
    # From the first request to the end of the last: without its own warming up, as ours is without.
    begin = min(output.created_time for output in made.values())
    seconds = max(output.lifespan[1] for output in made.values()) - begin
    produced = sum(len(output.generated_tokens) for output in made.values())
    rate = produced / seconds
    ratio = ours["output_tokens_per_s"] / rate
    setup.say(f"  transformers: {rate:.0f} output tokens/s; ours is {ratio:.2f} times that")
    setup.say(f"  target {PEER_TARGET:g}: {verdict(ratio >= PEER_TARGET)}")
    return {"ours": ours, "output_tokens_per_s": rate, "ratio": ratio}


def arrivals(setup: Setup, rate: float, seconds: float, seed: int = 1) -> Load:
    """(time, prompt, output length): conversation-like lengths, one prompt in twenty a long one."""
    rng, scale = random.Random(seed), setup.scale
    now, made = 0.0, []
    while now < seconds:
        now += rng.expovariate(rate)
        length = min(max(int(scale.typical * rng.lognormvariate(0.0, 1.0)), 8), scale.long // 2)
        if rng.random() < 0.05:
            length = scale.long
        output = min(max(int(150 * rng.lognormvariate(0.0, 0.8)), 4), scale.outputs)
        made.append((now, [rng.randrange(setup.vocabulary) for _ in range(length)], output))
    return made


def ways(setup: Setup) -> dict[str, Callable[[], Any]]:
    """Every way by name, as what makes its policy: one carries what it learnt from run to run."""
    from semipd.core.partition import Shared, Static
    from semipd.core.policies import Chunked, Limits, PrefillFirst, SemiPD

    device = setup.executor.device
    units, pairs = device.units, device.legal_splits

    def limits() -> Limits:
        return Limits(units, batch=setup.scale.slots - 2)

    made: dict[str, Callable[[], Any]] = {
        f"chunked {size}": lambda size=size: Chunked(limits(), size) for size in setup.scale.chunks
    }
    for share in (0.25, 0.5):
        if pairs:
            pair = min(pairs, key=lambda pair: abs(pair[1] - share * units))
            made[f"semi-pd {pair[0]}:{pair[1]}"] = lambda pair=pair: SemiPD(limits(), Static(*pair, units))
    if pairs and (cost := fitted(setup)) is not None:
        made["auto"] = lambda: automatic(setup, cost)
    made["semi-pd shared"] = lambda: SemiPD(limits(), Shared(units))
    made["prefill-first"] = lambda: PrefillFirst(limits())
    return made


def automatic(setup: Setup, cost: Any) -> Any:
    """The policy that `--split auto` makes, with this card's own profile."""
    from semipd.core.auto import Auto
    from semipd.core.deadline import ByDeadline
    from semipd.core.order import PromptWork
    from semipd.core.partition import Targets
    from semipd.core.policies import PREFILL_TOKENS, Limits

    device = setup.executor.device
    work = PromptWork(cost, device.units)
    targets = {"default": Targets(setup.scale.ttft, setup.scale.tpot)}
    order = ByDeadline(work, targets, PREFILL_TOKENS)
    limits = Limits(device.units, batch=setup.scale.slots - 2, order=order)
    return Auto(limits, device, cost, targets, work)


def fitted(setup: Setup) -> Any:
    """What the card's profile predicts with; None where it was not profiled."""
    from semipd.bench.profile_gpu import device_entries
    from semipd.execute.step_profile import ProfiledCost, read_profile
    from semipd.model.spec import load_spec

    if setup.profile is None:
        return None
    _, memory = setup.backend.memory()
    itemsize = 4 if setup.dtype == "float32" else 2
    entries = device_entries(setup.profile, load_spec(setup.folder), itemsize, memory)
    return ProfiledCost(read_profile(entries["steps"], entries["units"], "the profile"))


def run_mixed(setup: Setup, rate: float, seconds: float) -> dict[str, Any]:
    """Every way on the same arrivals; then goodput of the best chunked one and of the best of ours."""
    made, load = ways(setup), arrivals(setup, rate, seconds)
    rows: dict[str, dict[str, Any]] = {}
    kept = LAST + 0.35 * setup.left()  # to look for goodput
    for index, (name, policy) in enumerate(made.items()):
        most = min(3 * load[-1][0] + DRAIN, (setup.left() - kept) / (len(made) - index))
        if most < load[-1][0] + DRAIN / 2:
            setup.say(f"  {name:18s} left out: the time is up")
            continue
        rows[name] = one_mixed(setup, policy(), load, rate, most)
        show(setup, name, rows[name], rate)
        setup.note("mixed", {"rate": rate, "seconds": seconds, "rows": rows, "unfinished": True})
    chosen = chosen_ways(rows)
    if len(chosen) < 2:
        return {"rate": rate, "seconds": seconds, "rows": rows}
    found = {}
    for name in chosen:

        def run(at: float, name: str = name) -> float:
            arriving = arrivals(setup, at, seconds)
            row = one_mixed(setup, made[name](), arriving, at, arriving[-1][0] + DRAIN)
            return float(row["attainment"])

        found[name] = goodput(
            run, rate, rows[name]["attainment"], enough(setup, name == chosen[0], seconds)
        )
        setup.say(f"  {name:18s} goodput {found[name]:.2f}/s at {GOAL:.0%} of requests within targets")
    result = {"rate": rate, "seconds": seconds, "rows": rows, "goodput": found, **compare(rows, found)}
    setup.say(
        f"  against chunked: P99 ITL {result['itl_ratio']:.2f} times lower (target {ITL_TARGET:g}: "
        f"{verdict(result['itl_ratio'] >= ITL_TARGET)}), goodput {result['goodput_ratio']:.2f} times "
        f"(target {GOODPUT_TARGET:g}: {verdict(result['goodput_ratio'] >= GOODPUT_TARGET)})"
    )
    return result


def enough(setup: Setup, first: bool, seconds: float) -> Callable[[], bool]:
    """Whether another run of so many seconds fits; the first of two ways leaves half of the time."""
    least = LAST + seconds + DRAIN
    if first:
        least = max(least, LAST + 0.5 * (setup.left() - LAST))
    return lambda: setup.left() > least


def chosen_ways(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """(best chunked, best of ours): most requests within both targets, then the lowest P99 ITL."""
    chosen = []
    for mine in (False, True):
        names = [name for name in rows if name.startswith(("semi-pd", "auto") if mine else "chunked")]
        names.sort(key=lambda name: (-rows[name]["attainment"], rows[name]["itl_p99_ms"]))
        chosen += names[:1]
    return chosen


def compare(rows: Mapping[str, Mapping[str, Any]], found: Mapping[str, float]) -> dict[str, Any]:
    """How many times lower P99 ITL is, and higher goodput, than the best chunked way's."""
    chunked, ours = found
    return {
        "chunked": chunked,
        "ours": ours,
        "itl_ratio": rows[chunked]["itl_p99_ms"] / max(rows[ours]["itl_p99_ms"], 1e-9),
        "goodput_ratio": found[ours] / max(found[chunked], 1e-9),
    }


def goodput(
    attainment: Callable[[float], float], rate: float, here: float, go_on: Callable[[], bool]
) -> float:
    """The highest rate of those STRIDE apart that meets GOAL, straight between it and the next; `here`:
    what is attained at `rate`. Ends early, with what is known, when `go_on` is False."""
    found = {0: here}
    step = 1 if here >= GOAL else -1
    for index in range(step, step * MOST_RATES, step):
        if not go_on():
            break
        found[index] = attainment(rate * STRIDE**index)
        if (found[index] >= GOAL) is (step < 0):
            break
    met = [index for index in found if found[index] >= GOAL]
    if not met:
        return rate * STRIDE ** min(found) * found[min(found)]
    low = max(met)
    part = 0.0
    if low + 1 in found and found[low] > found[low + 1]:
        part = (found[low] - GOAL) / (found[low] - found[low + 1])
    return rate * STRIDE ** (low + part)


def one_mixed(
    setup: Setup, policy: Any, load: Load, rate: float, most: float = 600.0, engine: Any = None
) -> dict[str, Any]:
    """One way on these arrivals, for at most so many seconds. engine: another than the card's."""
    from semipd.core.types import Request

    recorder = Recorder(setup.scale)
    engine = setup.engine(policy, [recorder]) if engine is None else engine(policy, [recorder])
    begin = engine.clock.now()
    pending = list(load)[::-1]
    while pending or not engine.idle:
        now = engine.clock.now()
        if now >= begin + most:
            break  # far behind: what was not served has missed its targets
        while pending and begin + pending[-1][0] <= now:
            at, prompt, output = pending.pop()
            engine.add(Request(f"{at}", prompt, output, arrival=begin + at))
        engine.step(begin + min(pending[-1][0] if pending else most, most))
    seconds = max(engine.clock.now() - begin, 1e-9)
    drain(engine)
    return {
        "itl_p50_ms": 1e3 * quantile(recorder.gaps, 0.5),
        "itl_p99_ms": 1e3 * quantile(recorder.gaps, 0.99),
        "ttft_p90_s": quantile(recorder.ttft, 0.9),
        "attainment": recorder.met / len(load),
        "output_tokens_per_s": recorder.tokens / seconds,
        "tokens": recorder.tokens,
        "done": recorder.done,
    }


def drain(engine: Any) -> None:
    """End what still runs."""
    for request_id in [request.id for request in engine.live.by_slot.values()]:
        engine.abort(request_id)
    for request in list(engine.live.waiting):
        engine.abort(request.id)
    for _ in range(1000):
        if engine.idle:
            break
        engine.step(engine.clock.now() + 0.01)


def run_predicted(setup: Setup, rate: float, seconds: float, measured: Any) -> dict[str, Any]:
    """The measured ways again in the simulator, on the profile of this card; how far the two are apart."""
    from semipd.execute.sim import SimExecutor, VirtualClock

    cost = fitted(setup)
    if cost is None or not measured or "goodput" not in measured:
        setup.say("  left out: it needs the parts profile and mixed")
        return {}
    made = ways(setup)

    def engine(policy: Any, observers: Any) -> Any:
        clock = VirtualClock()
        return setup.engine(policy, observers, SimExecutor(setup.executor.device, cost, clock), clock)

    def run(name: str, at: float) -> dict[str, Any]:
        return one_mixed(setup, made[name](), arrivals(setup, at, seconds), at, engine=engine)

    rows, found = {}, {}
    for name in measured["goodput"]:
        rows[name] = run(name, rate)
        show(setup, name, rows[name], rate)
        here = rows[name]["attainment"]
        found[name] = goodput(lambda at, name=name: run(name, at)["attainment"], rate, here, lambda: True)
    result = {"rows": rows, "goodput": found, **compare(rows, found)}
    for key in ("itl_ratio", "goodput_ratio"):
        result[f"{key}_difference"] = off = result[key] / max(measured[key], 1e-9) - 1.0
        setup.say(
            f"  {key}: {result[key]:.2f} predicted, {measured[key]:.2f} measured, {off:+.0%} (target "
            f"{AGREEMENT:.0%}: {verdict(abs(off) <= AGREEMENT)})"
        )
    return result


def show(setup: Setup, name: str, row: Mapping[str, Any], rate: float) -> None:
    setup.say(
        f"  {name:18s} ITL p50 {row['itl_p50_ms']:6.1f} p99 {row['itl_p99_ms']:7.1f} ms   "
        f"TTFT p90 {row['ttft_p90_s']:6.2f} s   {row['attainment']:4.0%} within targets at {rate:g}/s   "
        f"{row['output_tokens_per_s']:6.0f} tokens/s"
    )


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else math.nan
