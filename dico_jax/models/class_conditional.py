"""Networks that are told a class: all that is known of labels is here."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.models.denoiser import Condition, Denoiser


class ClassConditional(Denoiser):
    """Base of networks whose condition is {"label": int32 (N,)}, or the labels (N,) alone.

    Labels are 0..num_classes - 1, or `null_class`.

    Attributes:
      num_classes: number of classes.
      class_dropout_prob: probability of dropping the label in training; 0 for no null class.
    """

    num_classes: int = 1000
    class_dropout_prob: float = 0.1

    condition_tables = ("y_embedder",)

    def __post_init__(self):
        self.check_positive("num_classes")
        if not 0 <= self.class_dropout_prob < 1:
            fix = "must be in [0, 1): the published models use 0.1"
            raise UsageError("model.class_dropout_prob", self.class_dropout_prob, fix)
        super().__post_init__()

    @property
    def null_class(self) -> int | None:
        """The label that stands for no label, or None for a model trained without one."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    @property
    def num_label_rows(self) -> int:
        """Rows of a label table: the classes, and the null class where there is one."""
        return self.num_classes + (self.class_dropout_prob > 0)

    @property
    def condition_dropout(self) -> float:  # type: ignore[override]
        """The probability with which training replaces a condition by the null condition."""
        return self.class_dropout_prob

    def as_condition(self, condition: Any) -> Condition:
        """The tree of labels, which may be given alone."""
        labels = condition["label"] if isinstance(condition, Mapping) else condition
        return {"label": labels.astype(np.int32)}

    def zero_condition(self, n: int) -> Condition:
        """Labels 0."""
        return {"label": np.zeros(n, np.int32)}

    def null_condition(self, n: int) -> Condition | None:
        """The null class, where there is one."""
        null = self.null_class
        return None if null is None else {"label": np.full(n, null, np.int32)}

    @classmethod
    def complete_options(cls, options: dict[str, Any], source: Any) -> dict[str, Any]:
        """The options, with as many classes as the source has where num_classes is unset."""
        if options.get("num_classes") is not None:
            return options
        return options | {"num_classes": len(source.class_names)}

    def check_source(self, source: Any) -> None:
        """Raises UsageError for a source of more classes."""
        if (found := len(source.class_names)) > self.num_classes:
            fix = f"is too few for {source!r}: use {found}"
            raise UsageError("model.num_classes", self.num_classes, fix)

    def default_conditions(self, indices: np.ndarray, source: Any) -> Condition:
        """Every class in turn."""
        return {"label": np.asarray(indices % self.num_classes, np.int32)}

    def grid_conditions(self, rows: int, source: Any) -> tuple[Condition, list[str]]:
        """Classes spread over all, in at most `rows` rows, and their names."""
        spread = np.linspace(0, self.num_classes - 1, min(rows, self.num_classes))
        conditions = {"label": spread.round().astype(np.int32)}
        return conditions, self.describe_conditions(conditions, source.class_names)

    def describe_conditions(self, conditions: Condition, class_names: Sequence[str]) -> list[str]:
        """The names of classes, or their numbers where they have none."""
        labels = [int(label) for label in self.as_condition(conditions)["label"]]
        return [class_names[k] if k < len(class_names) else str(k) for k in labels]

    def parse_conditions(
        self, text: str, num_images: int, seed: int, class_names: Sequence[str] = ()
    ) -> Condition:
        """The labels of all images, int32 (num_images,), that the flag --classes asks for.

        Args:
          text: "all" for every class in turn, "random" for classes drawn from the seed, or numbers
            or names with commas between, taken in turn.
          num_images: how many.
          seed: for "random"; label i depends on the seed and i alone.
          class_names: of the classes, by number.

        Raises:
          UsageError: something else, or a class that the model does not have.
        """
        if text == "random":
            # Philox's stream can be cut anywhere: more images leave the first as they were.
            generator = np.random.Generator(np.random.Philox(seed))
            return {"label": generator.integers(0, self.num_classes, num_images).astype(np.int32)}
        if text == "all":
            return {"label": np.resize(np.arange(self.num_classes, dtype=np.int32), num_images)}
        numbers = [self._class_number(part.strip(), text, class_names) for part in text.split(",")]
        return {"label": np.resize(np.array(numbers, np.int32), num_images)}

    def _class_number(self, part: str, text: str, class_names: Sequence[str]) -> int:
        if part in class_names and not (part.isdecimal() and int(part) < self.num_classes):
            return list(class_names).index(part)
        if not part.lstrip("-").isdecimal():
            close = difflib.get_close_matches(part, class_names, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UsageError(
                f"--classes={text!r}: {part!r} is no class; write numbers such as 1,2,3, names of "
                f"classes, 'all' or 'random'{hint}"
            )
        if not 0 <= int(part) < self.num_classes:
            fix = f": the model has no class {part}, use 0 to {self.num_classes - 1}"
            raise UsageError("--classes", text, fix)
        return int(part)

    def named_arrays(self, conditions: Condition) -> dict[str, np.ndarray]:
        """Labels under the name that ADM's evaluator reads, int64."""
        return {"arr_1": np.asarray(self.as_condition(conditions)["label"], np.int64)}
