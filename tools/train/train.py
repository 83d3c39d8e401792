"""Train one bundled model on prepared rows within a budget of minutes, or of steps; an interrupted run resumes.

In: a directory made by `dataset`, a model's name, a budget. Out: Orbax checkpoints and a log of JSON lines in the
run's directory. Rows live on the device; the host only sends row numbers, which depend on the seed and the step
alone, so that a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from jaxllm.graph.models.decoder import Decoder, Params
from tools.train import model as models
from tools.train.dataset import WEIGHT_UNIT, Rows

type State = dict[str, Any]  # params, optimizer, step: arrays only


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the numbers of a run, beside the data."""

    model: str
    batch: int = 48
    code_share: float = 0.3
    peak_rate: float = 2e-3
    final_rate: float = 2e-5
    warmup_steps: int = 150
    weight_decay: float = 0.1
    clip: float = 1.0
    z_loss: float = 1e-4
    distill: float = 0.5  # weight of the teacher's distribution, when there is a teacher
    remat: models.Remat = "none"
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Both sorts of rows on the device, and which of them a step reads."""

    code: tuple[jax.Array, jax.Array]
    chat: tuple[jax.Array, jax.Array]

    @staticmethod
    def load(directory: Path) -> Data:
        def put(name: str) -> tuple[jax.Array, jax.Array]:
            rows = Rows.load(directory, name)
            return jnp.asarray(rows.tokens), jnp.asarray(rows.weights)

        return Data(put("code"), put("chat"))

    def batch(self, step: int, config: TrainConfig) -> tuple[jax.Array, jax.Array]:
        """Tokens and weights of one step: each sort of rows in a new order every time it has been read through."""
        code = round(config.batch * config.code_share)
        code_ids = _epoch_rows(step, code, self.code[0].shape[0], config.seed)
        chat_ids = _epoch_rows(step, config.batch - code, self.chat[0].shape[0], config.seed + 1)
        return _gather(self.code, self.chat, code_ids, chat_ids)


@jax.jit
def _gather(
    code: tuple[jax.Array, jax.Array], chat: tuple[jax.Array, jax.Array], code_ids: jax.Array, chat_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    tokens, weights = (jnp.concatenate([a[code_ids], b[chat_ids]]) for a, b in zip(code, chat, strict=True))
    return tokens, weights


@functools.lru_cache(maxsize=8)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows).astype(np.int32)


def _epoch_rows(step: int, count: int, rows: int, seed: int) -> np.ndarray:
    places = np.arange(step * count, (step + 1) * count)
    return np.asarray([_order(rows, seed, int(p // rows))[p % rows] for p in places], dtype=np.int32)


def rate(step: jax.Array, total: jax.Array, config: TrainConfig) -> jax.Array:
    """Linear warm-up, then linear decay to the final rate at `total`."""
    now = step.astype(jnp.float32)
    warm = (now + 1) / config.warmup_steps
    left = 1 - jnp.clip((now - config.warmup_steps) / jnp.maximum(total - config.warmup_steps, 1.0), 0.0, 1.0)
    return jnp.where(
        now < config.warmup_steps,
        config.peak_rate * warm,
        config.final_rate + (config.peak_rate - config.final_rate) * left,
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate, which the step applies; matrices alone decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1 and leaf.shape[0] > 2, tree)
        ),
    )


def start(config: TrainConfig) -> tuple[nnx.GraphDef[Decoder], State]:
    graphdef, params = models.initial(models.CONFIGS[config.model], config.seed)
    return graphdef, {"params": params, "optimizer": optimizer(config).init(params), "step": jnp.zeros((), jnp.int32)}


type Teacher = tuple[nnx.GraphDef[Decoder], Params]
type Step = Callable[[State, jax.Array, jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]


def make_step(graphdef: nnx.GraphDef[Decoder], config: TrainConfig, teacher: Teacher | None = None) -> Step:
    """The one large program of a run: loss, gradient, update. It does not depend on how many rows there are."""
    update = optimizer(config)

    def loss_of(
        params: Params, tokens: jax.Array, weights: jax.Array, knows: Params | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs, targets = tokens[:, :-1].astype(jnp.int32), tokens[:, 1:].astype(jnp.int32)
        logits = models.forward(graphdef, models.narrow(params), inputs, config.remat)
        plain, loss = models.token_losses(logits, targets, config.z_loss)
        if teacher is not None and knows is not None:
            wanted = jax.nn.softmax(jax.lax.stop_gradient(models.forward(teacher[0], knows, inputs)))
            soft = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(wanted * logits, axis=-1)
            loss = (1 - config.distill) * loss + config.distill * soft
        scale = weights.astype(jnp.float32) / WEIGHT_UNIT
        full = (weights == WEIGHT_UNIT).astype(jnp.float32)
        code = round(config.batch * config.code_share)
        metrics = {
            "code_loss": jnp.sum(plain[:code] * full[:code]) / jnp.maximum(jnp.sum(full[:code]), 1.0),
            "chat_loss": jnp.sum(plain[code:] * full[code:]) / jnp.maximum(jnp.sum(full[code:]), 1.0),
        }
        return jnp.sum(loss * scale) / jnp.sum(scale), metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: State, total: jax.Array, tokens: jax.Array, weights: jax.Array, knows: Params | None
    ) -> tuple[State, dict[str, jax.Array]]:
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["params"], tokens, weights, knows)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its i32 count with floats
            changes, kept = update.update(gradient, state["optimizer"], state["params"])
        now = rate(state["step"], total, config)
        params = jax.tree.map(lambda p, u: p - now * u, state["params"], changes)
        metrics |= {"loss": loss, "norm": optax.tree.norm(gradient), "rate": now}
        return {"params": params, "optimizer": kept, "step": state["step"] + 1}, metrics

    # The teacher's weights are an argument, not constants in the program.
    return lambda state, total, tokens, weights: step(state, total, tokens, weights, teacher and teacher[1])


def save(state: State, directory: Path, config: TrainConfig, total: int) -> Path:
    """One Orbax checkpoint, leaves by their path, and beside it what is needed to go on."""
    flat, _ = tree_flatten_with_path(state)
    path = directory.absolute() / f"step-{int(state['step']):06d}"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {keystr(key): leaf for key, leaf in flat}, force=True)
    (directory / "run.json").write_text(json.dumps({"checkpoint": path.name, "total": total, "config": asdict(config)}))
    for older in set(directory.absolute().glob("step-*")) - {path}:
        shutil.rmtree(older)
    return path


def restore(state: State, directory: Path) -> tuple[State, int]:
    """The newest checkpoint of a run and the step its schedule ends at; `state` gives the shapes."""
    note = json.loads((directory / "run.json").read_text())
    flat, tree = tree_flatten_with_path(state)
    shapes = {keystr(key): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in flat}
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(directory.absolute() / note["checkpoint"], shapes)
    return tree_unflatten(tree, [jnp.asarray(found[keystr(key)]) for key, _ in flat]), int(note["total"])


@dataclass
class Run:
    """A training run in progress: its state, its log, and how long it may still take."""

    directory: Path
    config: TrainConfig
    data: Data
    step: Step
    state: State
    log_every: int = 50

    def until(self, stop: int, total: int, deadline: float) -> None:
        """Steps up to `stop`, or to the deadline; the device is never more than a few steps behind."""
        number = int(self.state["step"])
        before = jnp.zeros(())  # nothing of the state, whose buffers the step takes over
        began = time.monotonic()
        while number < stop and time.monotonic() < deadline:
            tokens, weights = self.data.batch(number, self.config)
            self.state, metrics = self.step(self.state, jnp.float32(total), tokens, weights)
            number += 1
            if number % 8 == 0:
                jax.block_until_ready(before)
                before = metrics["loss"]
            if number % self.log_every == 0 or number == stop:
                self._log(number, metrics, time.monotonic() - began)
        jax.block_until_ready(self.state)

    def _log(self, number: int, metrics: dict[str, jax.Array], seconds: float) -> None:
        values = {name: round(float(value), 5) for name, value in metrics.items()}
        if not np.isfinite(values["loss"]):
            raise FloatingPointError(f"step {number}: loss is {values['loss']}")
        line = {"step": number, "seconds": round(seconds, 1)} | values
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def planned_steps(run: Run, deadline: float) -> int:
    """How many steps fit before the deadline, by timing some after the first, which compiles."""
    run.until(int(run.state["step"]) + 4, 10**6, deadline)
    begin, count = time.monotonic(), 16
    run.until(int(run.state["step"]) + count, 10**6, deadline)
    a_step = (time.monotonic() - begin) / count
    left = deadline - time.monotonic()
    total = int(run.state["step"]) + int(0.97 * left / a_step)
    tokens = run.config.batch * run.data.code[1].shape[1]
    print(f"{1000 * a_step:.1f} ms a step, {tokens / a_step / 1e3:.0f}k tokens/s: {total} steps planned", flush=True)
    return total


def train(
    directory: Path, data: Path, config: TrainConfig, *, minutes: float = 1e6, steps: int = 0, stop_at: int = 0,
    resume: bool = False, teacher: Teacher | None = None, teacher_name: str = "", log_every: int = 50,
    save_every: int = 1000,
) -> Run:  # fmt: skip
    """Train within `minutes` (steps planned from measured speed) or for `steps`; `stop_at` interrupts early."""
    deadline = time.monotonic() + 60 * minutes
    directory.mkdir(parents=True, exist_ok=True)
    graphdef, state = start(config)
    total = steps
    if resume:
        state, total = restore(state, directory)
    run = Run(directory, config, Data.load(data), make_step(graphdef, config, teacher), state, log_every)
    count = models.parameter_count(state["params"])
    print(f"{config.model}: {count / 1e6:.2f}M parameters on {jax.devices()[0].device_kind}", flush=True)
    if not total:
        total = planned_steps(run, deadline)
    stop = min(stop_at or total, total)
    while (done := int(run.state["step"])) < stop and time.monotonic() < deadline:
        run.until(min(done + save_every, stop), total, deadline)
        save(run.state, directory, config, total)
    done = int(run.state["step"])
    seen = {"steps": done, "planned_steps": total, "minutes": round(minutes - (deadline - time.monotonic()) / 60, 2),
            "tokens": done * config.batch * int(run.data.code[1].shape[1]), "parameters": count,
            "device": jax.devices()[0].device_kind, "config": asdict(config),
            "teacher": teacher_name,
            "code_rows": int(run.data.code[0].shape[0]), "chat_rows": int(run.data.chat[0].shape[0])}  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(seen, indent=2))
    print(seen, flush=True)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="the run's checkpoints and log")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=list(models.CONFIGS), default="first-light")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--stop-at", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--code-share", type=float, default=0.3)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--remat", choices=("none", "layer"), default="none")
    parser.add_argument("--teacher", type=Path, help="an exported model directory to distil from")
    given = parser.parse_args()
    config = TrainConfig(
        model=given.model, batch=given.batch, code_share=given.code_share, peak_rate=given.rate, remat=given.remat,
        warmup_steps=given.warmup, final_rate=given.rate / 100,
    )  # fmt: skip
    teacher = None
    if given.teacher:
        from jaxllm.graph.models.config import ModelConfig
        from jaxllm.graph.models.decoder import abstract
        from jaxllm.graph.weights.loader import load

        shape = ModelConfig.from_directory(given.teacher)
        teacher = (abstract(shape)[0], load(given.teacher, shape))
    train(
        given.directory, given.data, config, minutes=given.minutes, steps=given.steps, stop_at=given.stop_at,
        resume=given.resume, teacher=teacher, teacher_name=given.teacher.name if given.teacher else "", log_every=given.log_every,
        save_every=given.save_every,
    )  # fmt: skip


if __name__ == "__main__":
    main()
