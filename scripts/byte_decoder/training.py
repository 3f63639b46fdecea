"""The training of a model: its state, loss, optimizer, one step, and the loop over steps."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from byte_decoder.language_model import LanguageModel


class TrainState(NamedTuple):
    params: Any  # nested dicts, the same for NNX and Linen
    opt_state: Any


def optimise(
    train_step: Callable, state: TrainState, batch: Callable[[int], Any], first: int, last: int
) -> Iterator[tuple[int, TrainState, jax.Array]]:
    """The training loop: takes the steps `first` to `last` and yields (step, state after it, loss before it).

    Args:
      train_step: (state, batch) -> (state, loss). It may donate its argument `state`.
      state: the state before the first of these steps.
      batch: step -> the batch of that step.
      first: the number of the first step, counted from 1.
      last: the number of the last step.
    """
    for step in range(first, last + 1):
        state, loss = train_step(state, batch(step))
        yield step, state, loss


def make_optimizer(
    learning_rate: float, steps: int, warmup_fraction: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW with gradient clipping. Only matrices decay; norms and the embedding do not."""

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.ndim > 1 and path[0].key != "embed", params)

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, int(steps * warmup_fraction), steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=weight_decay, mask=decays),
    )


def make_init(init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation):
    """Makes a function that takes a key and returns the state that training starts from."""

    def init_state(key):
        params = init(key)
        return TrainState(params, optimizer.init(params))

    return init_state


def make_train_step(loss: Callable[[Any, Any], jax.Array], optimizer: optax.GradientTransformation):
    """Makes the step (state, batch) -> (state, loss before the step) for a loss of (params, batch)."""

    def train_step(state, batch):
        value, grads = jax.value_and_grad(loss)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    return train_step


def mean_loss(model: LanguageModel, params, windows):
    """The training loss: the mean cross-entropy in nats of windows [B, T + 1]."""
    return losses(model, params, windows).mean()


def losses(model: LanguageModel, params, windows):
    """The cross-entropy [B, T] in nats of every next byte of windows [B, T + 1]."""
    return cross_entropy(model.logits(params, windows[:, :-1]), windows)


def cross_entropy(logits, windows):
    """Computes `losses` from the logits [B, T, V] of the windows' first T bytes."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), windows[:, 1:])
