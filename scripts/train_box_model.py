"""Train the model in the box on questions that this script makes itself, on a CPU.

A step's data depends on the seed and the step's number alone, and a checkpoint holds the weights and the
optimisers' state, so a run that is stopped continues where it was when the same command is given again. The
learning rate warms up, stays, and falls linearly to zero over the last ``--decay`` steps: to end a run
earlier, start it again with smaller ``--steps``. The log is one JSON object per line. ``--export`` writes a
Hugging Face folder from a checkpoint.

    python scripts/train_box_model.py --run-dir runs/box
    python scripts/train_box_model.py --run-dir runs/box --export semipd/box
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import box_folder
import box_rows
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from semipd.box import format as box_format
from semipd.box import tasks as box_tasks

MUON_RATE = 1.5  # times AdamW's


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the Llama-architecture model."""

    vocabulary: int = box_format.VOCABULARY
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    intermediate: int = 512
    theta: float = 100_000.0
    epsilon: float = 1e-5
    positions: int = 4096


def normalise(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS normalisation in fp32; the result is bf16, which is what the matrix products take."""
    states = states.float()
    return (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon) * weight).to(
        torch.bfloat16
    )


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding, halves rotated as Llama does; heads [rows, heads, length, size]."""
    first, second = heads.float().chunk(2, -1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    return turned.to(torch.bfloat16)


def project(states: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(states, weight.to(states.dtype))


class Layer(nn.Module):
    """One Llama layer; queries, keys and values share a matrix, and so do gate and up."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        heads_width = shape.heads * shape.head_size
        qkv_width = heads_width + 2 * shape.kv_heads * shape.head_size
        self.qkv = nn.Parameter(torch.randn(qkv_width, shape.hidden) * shape.hidden**-0.5)
        self.output = nn.Parameter(torch.randn(shape.hidden, heads_width) * 0.02)
        self.gate_up = nn.Parameter(torch.randn(2 * shape.intermediate, shape.hidden) * shape.hidden**-0.5)
        self.down = nn.Parameter(torch.randn(shape.hidden, shape.intermediate) * 0.02)
        self.before_attention = nn.Parameter(torch.ones(shape.hidden))
        self.before_mlp = nn.Parameter(torch.ones(shape.hidden))

    def forward(self, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        states = states + self.attend(
            normalise(states, self.before_attention, self.shape.epsilon), cosine, sine
        )
        mlp_input = normalise(states, self.before_mlp, self.shape.epsilon)
        gate, up = project(mlp_input, self.gate_up).chunk(2, -1)
        return states + project(functional.silu(gate) * up, self.down)

    def attend(self, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        shape, (rows, length, _) = self.shape, states.shape
        packed = project(states, self.qkv).view(rows, length, -1, shape.head_size).transpose(1, 2)
        query, key, value = packed.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        key = key.repeat_interleave(shape.heads // shape.kv_heads, 1)
        value = value.repeat_interleave(shape.heads // shape.kv_heads, 1)
        mixed = attention(query, key, value)
        return project(mixed.transpose(1, 2).reshape(rows, length, -1), self.output)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention. Short rows take plain products, whose backward pass is twice as fast on a CPU."""
    length, size = query.shape[-2:]
    if length > 256:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * size**-0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(future, -1e30), -1).to(torch.bfloat16)
    return torch.matmul(weights, value)


class Model(nn.Module):
    """The model up to its last normalisation; the caller applies the tied head where it is needed."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.hidden) * 0.05)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.last_norm = nn.Parameter(torch.ones(shape.hidden))

    def forward(self, ids: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        states = functional.embedding(ids, self.embedding)
        for layer in self.layers:
            states = layer(states, cosine, sine)
        return normalise(states, self.last_norm, self.shape.epsilon)


def rotary_tables(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosine and sine [rows, 1, length, head_size / 2] of positions [rows, length]."""
    exponents = torch.arange(0, shape.head_size, 2).float() / shape.head_size
    angles = positions.float()[:, None, :, None] * shape.theta**-exponents
    return angles.cos(), angles.sin()


def losses(
    model: nn.Module, embedding: Tensor, batch: dict[str, Tensor], shape: Shape
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the wanted ids and whether each was the likeliest, both [targets]."""
    states = model(batch["ids"], *rotary_tables(batch["positions"], shape))
    logits = project(states.flatten(0, 1)[batch["indices"]], embedding).float()
    wanted = batch["wanted"]
    return functional.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


@torch.no_grad()
def evaluate(
    model: nn.Module, embedding: Tensor, shape: Shape, seed: int, rounds: int = 2
) -> dict[str, float]:
    """Share of held-out questions whose whole answer is the likeliest, by kind (and recall by length)."""
    names = [(box_rows.STREAMS[0], kind) for kind in box_tasks.KINDS] + [
        (stream, "recall") for stream in box_rows.STREAMS[1:]
    ]
    shares = {}
    for stream, kind in names:
        right = asked = 0
        for round_number in range(rounds):
            ids = torch.full((stream.rows, stream.length), box_format.END)
            spans = []
            for number, row in enumerate(box_rows.held_out_rows(stream, kind, seed + round_number)):
                ids[number, : len(row.ids)] = torch.tensor(row.ids)
                spans += [(number * stream.length + begin, end - begin) for begin, end, _ in row.answers]
            indices = torch.cat([torch.arange(begin - 1, begin - 1 + size) for begin, size in spans])
            positions = torch.arange(stream.length).repeat(stream.rows, 1)
            wanted = ids.flatten()[indices + 1]
            batch = {"ids": ids, "positions": positions, "indices": indices, "wanted": wanted}
            hits = losses(model, embedding, batch, shape)[1]
            right += sum(bool(part.all()) for part in hits.split([size for _, size in spans]))
            asked += len(spans)
        shares[kind if stream.name == "short" else f"{kind}-{stream.length}"] = round(right / asked, 4)
    return shares


class Trainer:
    """The weights, the two optimisers (Muon for matrices, AdamW for the rest), and their checkpoint."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.arguments = arguments
        self.shape = Shape()
        self.model = Model(self.shape)
        matrices = [value for value in self.model.layers.parameters() if value.ndim == 2]
        vectors = [value for value in self.model.layers.parameters() if value.ndim == 1]
        others = [self.model.embedding, self.model.last_norm, *vectors]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=1.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.compiled = torch.compile(self.model, dynamic=False)
        self.step = 0
        self.seconds = 0.0
        self.tokens = 0
        self.path = Path(arguments.run_dir) / "checkpoint.pt"
        if self.path.exists():
            self.load()

    def load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.path.with_suffix(".new"))
        os.replace(self.path.with_suffix(".new"), self.path)

    def rate(self) -> float:
        """The learning rate of the current step."""
        rising = (self.step + 1) / 100
        falling = (self.arguments.steps - self.step) / self.arguments.decay
        return self.arguments.rate * min(1.0, rising, falling)

    def train_step(self) -> float:
        """One update; returns the loss of the short batch."""
        reported = 0.0
        for stream in box_rows.STREAMS:
            if self.step < stream.start or self.step % stream.every:
                continue
            batch = box_rows.make_batch(stream, self.arguments.seed, self.step, self.shape.positions)
            loss = losses(self.compiled, self.model.embedding, batch, self.shape)[0].mean()
            (loss * stream.weight).backward()
            reported = reported or loss.item()
            self.tokens += batch["ids"].numel()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.rate() * (MUON_RATE if isinstance(optimiser, torch.optim.Muon) else 1.0)
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return reported

    def run(self) -> None:
        """Train up to ``--steps``, logging and saving every ``--every`` steps."""
        began, recent = time.perf_counter(), []
        already = self.seconds
        names = ("steps", "decay", "rate", "seed", "threads")
        settings = {name: getattr(self.arguments, name) for name in names}
        self.log({"started": settings, "kinds": box_rows.mixture_at(self.step).weights})
        while self.step < self.arguments.steps:
            recent.append(self.train_step())
            if self.step % self.arguments.every == 0 or self.step == self.arguments.steps:
                accuracy = evaluate(self.compiled, self.model.embedding, self.shape, self.arguments.seed)
                self.seconds = already + time.perf_counter() - began
                self.log(
                    {"loss": round(sum(recent) / len(recent), 4), "rate": self.rate(), "held_out": accuracy}
                )
                self.save()
                recent = []

    def log(self, values: dict[str, object]) -> None:
        line = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def hugging_face_weights(model: Model) -> dict[str, Tensor]:
    """The weights under the names that transformers uses, in bf16."""
    shape = model.shape
    weights = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.last_norm}
    sizes = [shape.heads * shape.head_size, *[shape.kv_heads * shape.head_size] * 2]
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}"
        for name, part in zip("qkv", layer.qkv.split(sizes), strict=True):
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = part
        gate, up = layer.gate_up.chunk(2)
        weights |= {
            f"{prefix}.self_attn.o_proj.weight": layer.output,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": layer.down,
            f"{prefix}.input_layernorm.weight": layer.before_attention,
            f"{prefix}.post_attention_layernorm.weight": layer.before_mlp,
        }
    return {name: value.detach().to(torch.bfloat16).contiguous() for name, value in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", required=True, help="where the checkpoint and the log are kept")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--decay", type=int, default=2500, help="the last steps, over which the rate falls to zero"
    )
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--every", type=int, default=200, help="steps between evaluations, log lines and checkpoints"
    )
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--export", help="write the checkpoint to this folder in Hugging Face format and stop"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(arguments)
    if arguments.export:
        box_folder.write(Path(arguments.export), hugging_face_weights(trainer.model), trainer.shape)
    else:
        trainer.run()


if __name__ == "__main__":
    main()
