"""Trains several seeds at once with train_toy.py's loop, as one program with the seeds along a leading axis."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from byte_decoder import data, training


class Member(NamedTuple):
    seed: int  # it draws the initial weights and the order of the data
    learning_rate: float


class Schedule(NamedTuple):
    steps: int
    warmup_fraction: float
    weight_decay: float


class Ensemble:
    """Members that differ only in seed and learning rate. They train together, spread evenly over the devices.

    Args:
      init: key -> parameters.
      loss: (parameters, batch) -> scalar.
      schedule: the schedule of all members. The peak of the learning rate is that of each member.
    """

    def __init__(self, init: Callable, loss: Callable, schedule: Schedule):
        self.schedule = schedule

        def optimizer(learning_rate):
            return optax.chain(training.make_optimizer(1.0, *schedule), optax.scale(learning_rate))

        def step(state, batch, learning_rate):
            return training.make_train_step(loss, optimizer(learning_rate))(state, batch)

        self._init = jax.jit(jax.vmap(training.make_init(init, optimizer(1.0))))
        self._step = jax.jit(jax.vmap(step), donate_argnums=0)

    def init(self, members: Sequence[Member]) -> training.TrainState:
        """The states before the first step. The members lie along the leading axis of every leaf."""
        keys = jnp.stack([jax.random.key(member.seed) for member in members])
        return self._init(jax.device_put(keys, _sharding(len(members))))

    def train(
        self, members: Sequence[Member], batch: Callable[[int, int], Any], state: training.TrainState
    ) -> Iterator[tuple[int, training.TrainState, jax.Array]]:
        """Runs `training.optimise` for all members. `batch(seed, step)` is the batch of a seed at a step."""
        sharding = _sharding(len(members))
        rates = jax.device_put(np.array([member.learning_rate for member in members], np.float32), sharding)

        def stacked(step):
            batches = [batch(member.seed, step) for member in members]
            return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), sharding)

        def train_step(state, batch):
            return self._step(state, batch, rates)

        return training.optimise(train_step, state, stacked, 1, self.schedule.steps)

    def final(self, members: Sequence[Member], batch: Callable[[int, int], Any]) -> training.TrainState:
        """The states after the last step."""
        final = self.init(members)
        for _, state, _ in self.train(members, batch, final):
            final = state
        return final


def text_batches(corpus: data.Corpus, seq_len: int, batch_size: int) -> Callable[[int, int], np.ndarray]:
    """Makes a function (seed, step) -> the batch that train_toy.py would learn from."""
    batches = {}

    def batch(seed, step):
        if seed not in batches:
            batches[seed] = data.training_batches(corpus.train, seq_len, batch_size, seed)
        return np.asarray(batches[seed][step - 1], np.int32)

    return batch


def member(tree: Any, index: int) -> Any:
    """The leaves of the member at `index`, on the first device."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf[index], jax.devices()[0]), tree)


def numbers(values, digits: int = 6) -> list[float | None]:
    """`values` for JSON, rounded to `digits` significant digits; None for a run that diverged."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in np.asarray(values, float)]


def _sharding(members: int):
    devices = math.gcd(members, jax.device_count())
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("member",), auto, devices=jax.devices()[:devices])
    return jax.NamedSharding(mesh, jax.P("member"))
