"""What happens when a loss or its gradients are not finite: config.training.on_nan.

"stop" ends the run. "skip" leaves the step's update out and goes on. "rollback" returns to the
newest checkpoint and takes the steps after it again with other draws.

On the devices, `is_finite` makes a flag of each step, which nobody waits for. On the host,
`NanWatch` reads the flags where the loop waits anyway, above all before a checkpoint is saved. So
every checkpoint is good, and after a return no weight survives that a bad step has touched.

A run has a number, its attempt, which grows by 1 with every return. It is folded into the keys of
the steps (`attempt_key`) and stored with every checkpoint. So a run that is killed and started
again takes the same steps and returns to the same checkpoints. The order of the examples stays, and
so does what is drawn of an autoencoder's posterior. What other noise does not mend, such as a
learning rate that is too high, stops the run after MAX_ROLLBACKS returns to one checkpoint.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dico_jax.errors import TrainingStopped, UsageError

POLICIES = ("stop", "skip", "rollback")
MAX_SKIPPED_IN_A_ROW = 100
MAX_ROLLBACKS = 3

_ADVICE = (
    "look for examples that are not finite, or start with a lower "
    "--config.optimizer.learning_rate in a new workdir"
)


def check_on_nan(on_nan: str) -> None:
    """Raises UsageError unless `on_nan` is one of POLICIES."""
    if on_nan not in POLICIES:
        fix = f"is unknown: use one of {', '.join(map(repr, POLICIES))}"
        raise UsageError("training.on_nan", on_nan, fix)


def is_finite(loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Whether a step's loss and the global norm of its gradients are finite: bool scalar.

    Gradients that are finite but too large for their norm do not count as finite either.
    """
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def keep_if(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the bool scalar `finite` is true, else `old`: two trees alike, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def attempt_key(key: jax.Array, attempt: jax.Array) -> jax.Array:
    """`key` itself in attempt 0 (int scalar), and a key of its own in each later one."""
    return jnp.where(attempt == 0, key, jax.random.fold_in(key, attempt))


class NanWatch:
    """Decides on the host what follows from steps that were not finite.

    Every process reads the same flags, so all of them decide alike.

    Attributes:
      attempt: the run's attempt, to be given to every step and saved with every checkpoint.
    """

    def __init__(self, on_nan: str, attempt: int = 0, say: Callable[[str], None] = print):
        """Starts a watch.

        Args:
          on_nan: one of POLICIES.
          attempt: what the checkpoint that the run goes on from has stored; 0 in a new run.
          say: prints a line.
        """
        self.attempt = attempt
        self._on_nan, self._say = on_nan, say
        self._flags: list[tuple[int, jax.Array]] = []
        self._skipped, self._skipped_in_a_row = 0, 0
        self._rollbacks, self._rolled_back_to = 0, -1

    def add(self, step: int, finite: jax.Array) -> None:
        """Takes the flag of one step, without waiting for it."""
        self._flags.append((step, finite))

    def check(self, newest_checkpoint: int | None) -> int | None:
        """Reads the flags since the last check; waits for their steps.

        Args:
          newest_checkpoint: its step, or None while there is none.

        Returns:
          None to go on; or the step to return to, 0 for the initial state, and `attempt` has grown.

        Raises:
          TrainingStopped: the run cannot go on.
        """
        flags, self._flags = jax.device_get(self._flags), []
        if self._on_nan == "skip":
            for step, finite in flags:
                self._count_skipped(step, bool(finite), newest_checkpoint)
            return None
        bad = next((step for step, finite in flags if not finite), None)
        if bad is None:
            return None
        if self._on_nan == "stop":
            raise TrainingStopped(
                f"{_bad_step('stop', bad)}; {_newest(newest_checkpoint)}: start again with "
                "--config.training.on_nan=skip or =rollback to go on from there, or with a lower "
                "--config.optimizer.learning_rate in a new workdir"
            )
        return self._roll_back(bad, newest_checkpoint)

    def metrics(self) -> dict[str, float]:
        """What to log: steps skipped since the last call, or returns to a checkpoint so far."""
        if self._on_nan == "skip":
            skipped, self._skipped = self._skipped, 0
            return {"skipped_steps": float(skipped)}
        return {"rollbacks": float(self.attempt)} if self._on_nan == "rollback" else {}

    def _count_skipped(self, step: int, finite: bool, newest_checkpoint: int | None) -> None:
        if finite:
            self._skipped_in_a_row = 0
            return
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrainingStopped(
                f"{_bad_step('skip', step)}, nor at the {MAX_SKIPPED_IN_A_ROW - 1} steps before; "
                f"{_newest(newest_checkpoint)}: {_ADVICE}"
            )

    def _roll_back(self, bad: int, newest_checkpoint: int | None) -> int:
        target = newest_checkpoint or 0
        if target != self._rolled_back_to:
            self._rollbacks, self._rolled_back_to = 0, target
        if self._rollbacks == MAX_ROLLBACKS:
            raise TrainingStopped(
                f"{_bad_step('rollback', bad)}, after {MAX_ROLLBACKS} returns to step {target}; "
                f"{_newest(newest_checkpoint)}: {_ADVICE}"
            )
        self._rollbacks += 1
        self.attempt += 1
        self._say(
            f"warning: {_bad_step('rollback', bad)}; going on from step {target} with other noise "
            f"(return {self._rollbacks} of at most {MAX_ROLLBACKS})"
        )
        return target


def _bad_step(on_nan: str, step: int) -> str:
    return f"config.training.on_nan={on_nan}: loss or gradients were not finite at step {step}"


def _newest(checkpoint: int | None) -> str:
    if checkpoint is None:
        return "no checkpoint has been saved yet"
    return f"the newest good checkpoint is step {checkpoint}"
