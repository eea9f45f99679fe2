"""What `compress` is asked to make."""

from __future__ import annotations

from dataclasses import dataclass

from moebert_kernels.compress import defaults
from moebert_kernels.compress.training.arguments import MAX_SEED, check_learning_rate
from moebert_kernels.compress.training.distillation import DistillSettings
from moebert_kernels.errors import ArgumentError
from moebert_kernels.models import HASH_ROUTINGS, ROUTINGS

COMPARISONS = ("random", "narrow", "layers")


@dataclass(frozen=True)
class CompressSettings:
    """What `compress` is to make; None means the paper's choice, scaled to the model.

    Attributes:
        num_experts: E.
        expert_size: F, neurons of one expert; by default the dense width / E.
        num_shared: neurons that every expert starts with; by default two thirds of F.
        tie_shared: store these once, and keep them the same in all experts; the paper unties them.
        routing: "hash-random", "hash-balance", "hash-affinity", "gate-token" or "gate-sentence".
        top_k: experts per token; more than 1 only for gates.
        fit: fit the experts to what the teacher's layers do (see `fitting`) once they are cut; the paper does
            not. Some training rows, a tenth of them and at most 512, are then held out of fit and training:
            of the fitted and the distilled student the one is kept whose predictions there are nearer to the
            teacher's.
        fit_rows: training rows that experts are fitted to, drawn at random; fewer where their hidden states
            would take more than 2 GiB.
        distill: train the student; without, it is done when it has been cut and fitted.
        epochs: of distillation.
        learning_rate: of distillation; by default 3e-5, the paper's for BERT-base, and 1e-4 for models of
            hidden size 512 or less; of students that are fitted 1e-5 and 3e-5.
        distill_weight: lambda, the weight of the distillation losses against the labels'.
        batch_size: rows of a distillation step, over all processes.
        weight_decay: of distillation.
        warmup: share of the steps of distillation in which the learning rate rises from 0.
        dropout: whether the student's dropout is on while it is distilled; by default only if it is not
            fitted: noise moves weights away from where least squares has put them.
        labels: whether it learns from labels too, where rows have them; by default only if it is not fitted:
            labels lead away from the teacher.
        bf16: score, fit and distil with matrix products in bfloat16, by autocast; weights, sums over tokens
            and what is solved stay float32 or wider.
        max_length: tokens a row is cut to; by default 128, or 384 for question answering, or as many as the
            model takes if those are fewer.
        importance_rows: training rows that importance is taken on, drawn at random; None for all.
        comparisons: models of the same cost to make, distil and measure in the same way beside the student:
            "random", the same experts filled at random; "narrow", a dense encoder that keeps as many of the
            most important neurons as a token meets in the student; "layers", the teacher with so many of its
            layers as cost what the student does.
        measure: measure latency and throughput.
        measure_length: tokens of the sequences that speed is measured on; by default as for max_length.
        seed: of everything random; with more `seeds` the first of them.
        seeds: how many times to make and distil each model, with seeds one after the other; quality is then
            the mean. The student that is kept, and what is measured, are of the first.

    Raises:
        UserError: a value makes no sense whatever the model is.
    """

    num_experts: int = defaults.NUM_EXPERTS
    expert_size: int | None = None
    num_shared: int | None = None
    tie_shared: bool = False
    routing: str = defaults.ROUTING
    top_k: int = 1
    fit: bool = True
    fit_rows: int = defaults.FIT_ROWS
    distill: bool = True
    epochs: float = defaults.EPOCHS
    learning_rate: float | None = None
    distill_weight: float = defaults.DISTILL_WEIGHT
    batch_size: int = defaults.BATCH_SIZE
    weight_decay: float = defaults.WEIGHT_DECAY
    warmup: float = defaults.WARMUP
    dropout: bool | None = None
    labels: bool | None = None
    bf16: bool = False
    max_length: int | None = None
    importance_rows: int | None = defaults.IMPORTANCE_ROWS
    comparisons: tuple[str, ...] = defaults.COMPARISONS
    measure: bool = True
    measure_length: int | None = None
    seed: int = 0
    seeds: int = 1

    def __post_init__(self):
        if self.routing not in ROUTINGS:
            raise ArgumentError("routing", f"must be one of {', '.join(ROUTINGS)}; got {self.routing!r}")
        counts = ("num_experts", "top_k", "batch_size", "importance_rows", "fit_rows", "seeds")
        for name in (*counts, "max_length", "measure_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(name, f"must be at least 1, got {value}")
        if self.measure_length is not None and not self.measure:
            raise ArgumentError(
                "measure_length", f"must not be given where nothing is measured, got {self.measure_length}"
            )
        if not 0 < self.epochs < float("inf"):
            raise ArgumentError("epochs", f"must be more than 0, got {self.epochs}")
        check_learning_rate("learning_rate", self.learning_rate)
        for name in ("distill_weight", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ArgumentError(name, f"must not be negative, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ArgumentError(
                "warmup", f"must be a share of the steps, from 0 to below 1, got {self.warmup}"
            )
        if self.seed + self.seeds > MAX_SEED + 1:
            raise ArgumentError(
                "seed", f"must be at most {MAX_SEED}, as must the last of {self.seeds}; got {self.seed}"
            )
        if self.top_k > 1 and self.routing in HASH_ROUTINGS:
            raise ArgumentError(
                "top_k", f"must be 1, got {self.top_k}: {self.routing} gives each token one expert"
            )
        if self.top_k > self.num_experts:
            raise ArgumentError("top_k", f"must not exceed the {self.num_experts} experts, got {self.top_k}")
        for name in self.comparisons:
            if name not in COMPARISONS:
                raise ArgumentError("comparisons", f"must be from {', '.join(COMPARISONS)}; got {name!r}")

    def training(self, *, seed: int, is_fitted: bool, hidden_size: int) -> DistillSettings:
        """How one of the run's students is distilled; what these settings leave open is filled in.

        Args:
            seed: of the student.
            is_fitted: whether it is.
            hidden_size: of it.
        """
        small, large = (3e-5, 1e-5) if is_fitted else (1e-4, 3e-5)
        default = small if hidden_size <= 512 else large
        return DistillSettings(
            epochs=self.epochs,
            learning_rate=default if self.learning_rate is None else self.learning_rate,
            distill_weight=self.distill_weight,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            seed=seed,
            bf16=self.bf16,
            warmup=self.warmup,
            dropout=not is_fitted if self.dropout is None else self.dropout,
            labels=not is_fitted if self.labels is None else self.labels,
        )
